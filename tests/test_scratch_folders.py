"""Work folders of a model from nothing: what is in them stays, or is made anew; scenes of a part of the grammar."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from src.errors import ExitCode, UserError
from src.model_shapes import read_shapes
from src.scratch import latent_space, learning, phase_report, phases, unet, vae
from src.scratch.__main__ import main
from src.scratch.card import page_of
from src.scratch.phases import Work, settings_of
from src.scratch.pictures import read_pictures
from src.scratch.settings import ADDED, ScratchSettings, UnetSettings
from src.terminal import Terminal
from tests.test_scratch import arguments, copied, made  # noqa: F401
from tests.tiny.evaluation import model as tiny_model


def test_all_does_not_draw_other_scenes_under_what_was_learnt(copied: Path, capsys) -> None:  # noqa: F811
    before = (copied / "scenes" / "final" / "manifest.json").read_bytes()
    assert main(["all", "--work", str(copied), *arguments(**{"scenes.count": 41})]) == ExitCode.USAGE
    assert "scenes is there with other settings, and more was learnt from it" in capsys.readouterr().err
    assert (copied / "scenes" / "final" / "manifest.json").read_bytes() == before


def test_a_folder_of_before_a_setting_was_there_goes_on(copied: Path) -> None:  # noqa: F811
    settings = ScratchSettings()
    known = {**settings_of(settings, "unet"), "caption_dropout_clear": 0.1}
    older = {name: value for name, value in known.items() if name not in ADDED}
    assert learning._differences({**older, "inputs": {}}, {**known, "inputs": {}}) == []
    assert learning._differences({**older, "inputs": {}}, {**known, "transformer_layers": 2, "inputs": {}}) != []
    assert phases.as_learnt(older) == phases.as_learnt(known)


def test_a_model_goes_on_with_other_scenes_and_says_what_its_parts_learnt_from(made: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    model, work = made / "model", ["--work", str(tmp_path / "work")]
    assert main(["scenes", "--set", "count=40", "--set", "held_out=32", "--set", "lattice_px=0", *work]) == 0
    assert main(["scenes", "--set", "lattice_px=4", *work]) == ExitCode.USAGE
    assert "scenes.lattice_px 4 is not known; choose 0 or 8" in capsys.readouterr().err
    assert main(["unpack", "--model", str(model), *work]) == ExitCode.USAGE
    assert "--set lattice_px=8 --set count=40" in (said := capsys.readouterr().err)
    assert "or let the model go on with these: --other-scenes" in said
    assert main(["unpack", "--model", str(model), "--other-scenes", *work]) == 0
    more = arguments(**{"scenes.lattice_px": 0, "unet.begin_from": model, "unet.steps": 1, "unet.seed": 4})
    assert main(["unet", "--restart", *work, *more]) == main(["assemble", *work, "--out", str(tmp_path / "more")]) == 0
    assert (
        "vae, clip learnt from other scenes (grammar full, lattice_px 8, count 40,"
        in (tmp_path / "more" / "README.md").read_text()
    )
    card = json.loads((tmp_path / "more" / "card.json").read_text())["phases"]
    assert card["scenes"]["settings"]["lattice_px"] == 0
    assert card["vae"]["scenes_before"]["lattice_px"] == card["clip"]["scenes_before"]["lattice_px"] == 8
    assert "scenes_before" not in card["unet"]
    again = ["--work", str(tmp_path / "again")]
    assert main(["scenes", "--set", "count=40", "--set", "held_out=32", "--set", "lattice_px=0", *again]) == 0
    assert main(["unpack", "--model", str(tmp_path / "more"), *again]) == 0  # its own scenes; its VAE's are still others
    assert Work(tmp_path / "again", print).result("vae").facts["scenes_before"]["lattice_px"] == 8


def test_a_phase_is_not_replaced_under_what_was_learnt_from_it(copied: Path, capsys) -> None:  # noqa: F811
    manifests = {phase: (copied / phase / "final" / "manifest.json").read_bytes() for phase in ("scenes", "tokenizer", "vae")}
    for checkpoint in (copied / "vae").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # as it is after `unpack`
    for phase in manifests:
        changed = {"scenes": "count=41", "tokenizer": "merges=30", "vae": "steps=5"}[phase]
        assert main([phase, "--work", str(copied), *arguments(), "--set", f"{phase}.{changed}"]) == ExitCode.USAGE
        assert f"{phase} is there with other settings" in capsys.readouterr().err
    assert manifests == {phase: (copied / phase / "final" / "manifest.json").read_bytes() for phase in manifests}
    assert main(["vae", "--work", str(copied), *arguments(**{"vae.steps": 5}), "--restart"]) == 0


def test_a_model_is_not_put_where_it_would_move_what_is_needed_aside(copied: Path, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(copied.parent)
    for out in (copied, copied.parent, Path(".")):
        assert main(["assemble", "--work", str(copied), "--out", str(out)]) == ExitCode.USAGE
        assert "would be moved aside; name a folder of the model's own" in capsys.readouterr().err
    assert (copied / "unet" / "final").is_dir()


def test_a_finished_unet_says_that_it_is_not_examined_again(copied: Path, capsys) -> None:  # noqa: F811
    assert main(["unet", "--work", str(copied), *arguments(**{"unet.examined": 9})]) == 0
    assert "and is not again: evaluate adherence --count N does" in capsys.readouterr().err


def test_tools_open_a_folder_that_was_fetched_in_fp16(tmp_path: Path, monkeypatch) -> None:
    """Of a hub model only the files of half precision may be there; and a decoder has one picture at a time."""
    folder = tiny_model(tmp_path / "model")
    for name in ("vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model"):
        (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
    side = read_shapes(folder).native_px
    decoder, sizes = latent_space.read_vae(folder), []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    sheet = latent_space.around(decoder, torch.zeros(3, side, side), 3, 0)
    assert sheet.width >= 3 * side
    assert sizes == [1] * 3 * len(latent_space.DISTANCES)
    assert latent_space.between_prompts(folder, ["a cat", "a dog"], 2, 0, Terminal()).width >= 2 * side


def test_a_unet_does_not_go_on_from_a_model_that_was_replaced(
    copied: Path,  # noqa: F811
    made: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    """Its card would tell of another beginning than its weights had."""
    model = tmp_path / "model"
    shutil.copytree(made / "model", model)
    more = arguments(**{"unet.begin_from": model, "unet.steps": 4, "unet.checkpoint_steps": 2, "unet.seed": 4})
    step = learning.Student.learn_a_step

    def stop_at_2(student: learning.Student) -> None:
        step(student)
        if student.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(learning.Student, "learn_a_step", stop_at_2)
    assert main(["unet", "--restart", "--work", str(copied), *more]) == ExitCode.INTERRUPTED
    monkeypatch.setattr(learning.Student, "learn_a_step", step)
    card = json.loads((model / "card.json").read_text())
    card["phases"]["unet"]["figures"]["samples"] += 16
    (model / "card.json").write_text(json.dumps(card))
    assert main(["unet", "--work", str(copied), *more]) == ExitCode.USAGE
    assert "was learnt with other settings (model_it_began_from " in capsys.readouterr().err
    shutil.copyfile(made / "model" / "card.json", model / "card.json")
    assert main(["unet", "--work", str(copied), *more]) == 0
    (model / "card.json").unlink()  # what is done needs it no longer
    assert main(["unet", "--work", str(copied), *more]) == 0


def test_restart_keeps_latents_and_reports_pass_over_other_files(copied: Path, capsys) -> None:  # noqa: F811
    latents = copied / "unet" / "latents-train-000000" / "manifest.json"
    written = latents.stat().st_mtime_ns
    (copied / "unet" / "samples").mkdir(exist_ok=True)
    assert main(["unet", "--restart", "--work", str(copied), *arguments()]) == 0
    assert latents.stat().st_mtime_ns == written
    assert not (copied / "unet" / "samples" / "step-best.png").exists()
    (copied / "unet" / "samples" / "step-best.png").write_bytes((copied / "unet" / "samples" / "step-000004.png").read_bytes())
    assert len(phase_report._samples(copied / "unet" / "samples")) == 1


def test_latents_are_kept_part_by_part(copied: Path, monkeypatch) -> None:  # noqa: F811
    """A kill costs one part; parts of more scenes than there are now go; the whole is what the VAE gives at once."""
    work = Work(copied, print)
    pixels = read_pictures(work.result("scenes"), "train").pixels
    autoencoder = vae.read_vae(work)
    monkeypatch.setattr(unet, "KEPT", 16)
    encode, calls = vae.encode, []

    def killed_in_the_second(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*given)

    monkeypatch.setattr(vae, "encode", killed_in_the_second)
    given = (work, "train", pixels, autoencoder, ScratchSettings(), Terminal())
    with pytest.raises(KeyboardInterrupt):
        unet._encoded(*given)
    latents = unet._encoded(*given)
    assert [len(pixels) for _, pixels in calls] == [16, 16, 16, 8]
    with torch.no_grad():
        whole = encode(autoencoder, pixels.float() / 127.5 - 1)
    assert float((latents.float() - whole).abs().max()) < 0.01
    assert len(list((copied / "unet").glob("latents-train-*"))) == 3
    unet._encoded(work, "train", pixels[:16], *given[3:])
    assert [folder.name for folder in (copied / "unet").glob("latents-train-*")] == ["latents-train-000000"]
    assert len(calls) == 4


def test_the_page_says_of_which_part_of_the_grammar_a_model_is(made: Path) -> None:  # noqa: F811
    card = json.loads((made / "model" / "card.json").read_text())
    assert "a part of this" not in page_of(card)
    for phase, count in (("vae", 40), ("clip", 40), ("tokenizer", 50)):
        card["phases"][phase]["scenes_before"] = {"count": count}
    assert "vae, clip learnt from other scenes (count 40);\n" in page_of(card)
    assert "tokenizer learnt from other scenes (count 50);\n" in page_of(card)
    card["phases"]["scenes"]["settings"]["grammar"] = "simple"
    assert "a part of this, the simple grammar: one thing on a plain background, without outline." in page_of(card)


def test_a_part_of_the_grammar_is_drawn_and_examined(copied: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    simple = ["--set", "grammar=simple", "--set", "count=20", "--set", "held_out=32"]
    assert main(["scenes", "--work", str(tmp_path / "simple"), *simple]) == 0
    work = Work(tmp_path / "simple", print)
    drawn = work.result("scenes")
    for split in ("train", "held-out"):
        assert {(scene.kind, scene.background.kind) for scene in read_pictures(drawn, split).scenes} == {("one", "plain")}
    monkeypatch.setattr(unet, "sample", lambda unet, vae, captions, *_, **named: torch.zeros(len(captions), 3, 128, 128))
    for phase in ("tokenizer", "clip"):
        (copied / phase).rename(work.of(phase))
    settings = ScratchSettings(unet=UnetSettings(examined=6))  # what was learnt decides, not what is typed now
    figures, _ = unet.examine(None, None, work, settings, torch.device("cpu"), Terminal())
    assert {"adherence, single object", "adherence, unseen combinations"} <= figures.keys()
    assert not {"adherence, two objects", "adherence, backgrounds", "adherence, landscapes"} & figures.keys()


def test_prompts_of_sdxl_are_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "xl", "sdxl")
    with pytest.raises(UserError, match=r"SD 1\.x and 2\.x"):
        latent_space.between_prompts(folder, ["a", "b"], 2, 0, Terminal())


def test_hard_scenes_are_drawn_so_many_times_as_often(copied: Path, monkeypatch) -> None:  # noqa: F811
    hard = re.compile(r"dotted|outline|inside|house|^(a picture of )?(two|three) ")
    drawn: list[int] = []

    def seen(student: object, material: unet.Material, which: torch.Tensor, *others: object) -> torch.Tensor:
        drawn.extend(which.tolist() if len(which) == 64 else ())  # held-out ones are judged 32 together
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(unet, "loss_of", seen)
    often = arguments(**{"unet.hard_scenes": 9, "unet.steps": 20, "unet.batch_size": 64, "unet.validation_steps": 20})
    monkeypatch.setattr(unet.Pupil, "shapes_loss", lambda pupil, shapes: torch.zeros((), requires_grad=True))
    assert main(["unet", "--restart", "--work", str(copied), *often]) == 0
    captions = read_pictures(Work(copied, print).result("scenes"), "train").captions
    count = sum(bool(hard.search(caption)) for caption in captions)
    share = sum(bool(hard.search(captions[index])) for index in drawn) / len(drawn)
    assert share == pytest.approx(9 * count / (9 * count + len(captions) - count), abs=0.05)
    assert len(drawn) == 20 * 64
