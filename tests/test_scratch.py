"""A model from nothing in miniature: every phase learns, what comes out loads anywhere, and a phase knows what it builds on."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from src.config import AppConfig
from src.config import read_settings as read_yaml_settings
from src.errors import ExitCode
from src.generator import TextToImageGenerator
from src.scenes.drawing import draw
from src.scratch import assemble, clip, latent_space, vae
from src.scratch.__main__ import main, read_settings
from src.scratch.card import page_of
from src.scratch.phases import Work
from src.scratch.pictures import read_pictures
from src.scratch.settings import PHASES, ScratchSettings, VaeSettings
from src.training.scores import Clip

TINY = {
    "scenes.count": 40, "scenes.held_out": 32, "tokenizer.merges": 60, "tokenizer.length": 77,
    "vae.channels": "16,16", "vae.steps": 4, "vae.batch_size": 2, "vae.crop_px": 32, "vae.warmup_steps": 0, "vae.validation_steps": 2, "vae.checkpoint_steps": 2,
    "clip.width": 16, "clip.layers": 1, "clip.heads": 2, "clip.patch_px": 32, "clip.projection": 8, "clip.steps": 4, "clip.batch_size": 4,
    "clip.warmup_steps": 0, "clip.validation_steps": 2, "clip.checkpoint_steps": 2, "unet.warmup_steps": 0,
    "unet.channels": "16,32", "unet.head_width": 8, "unet.steps": 4, "unet.batch_size": 2, "unet.validation_steps": 4,
    "unet.checkpoint_steps": 2, "unet.examined": 6, "machine.device": "cpu", "machine.precision": "fp32",
}  # fmt: skip


def arguments(**more: object) -> list[str]:
    return [word for name, value in (TINY | more).items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything was done once."""
    folder = tmp_path_factory.mktemp("scratch")
    assert main(["all", "--work", str(folder / "work"), "--out", str(folder / "model"), *arguments()]) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    shutil.copytree(made / "work", tmp_path / "work")
    return tmp_path / "work"


# -- what comes out


def test_plain_diffusers_draws_with_what_was_assembled(made: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(made / "model")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle on a white background", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 0
    scheduler = pipeline.scheduler.config
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert (scheduler.use_karras_sigmas, scheduler.beta_schedule, scheduler.prediction_type) == (
        True,
        "scaled_linear",
        "v_prediction",
    )


def test_the_generator_draws_with_it(made: Path) -> None:
    config = AppConfig()
    config.model.model_id, config.model.device = str(made / "model"), "cpu"
    (image,) = TextToImageGenerator(config).generate("a blue star", num_inference_steps=2, seed=1)
    assert image.size == (128, 128)


def test_its_clip_scores_pictures(made: Path) -> None:
    model = CLIPModel.from_pretrained(made / "model" / "clip")
    names = CLIPTokenizer.from_pretrained(made / "model" / "tokenizer")
    ids = clip.tokens_of(names, ["a red circle"])
    pixels = CLIPImageProcessor.from_pretrained(made / "model" / "clip")(
        Image.new("RGB", (128, 128), "white"), return_tensors="pt"
    )
    assert pixels["pixel_values"].shape == (1, 3, 128, 128)
    assert float(pixels["pixel_values"].min()) == 1.0  # white is 1, as the towers learnt it
    output = model(input_ids=ids, pixel_values=pixels["pixel_values"].to(model.dtype))
    assert output.logits_per_image.shape == (1, 1)
    text = clip.read_text_tower(Work(made / "work", print))
    expected = model.float().text_model(ids).last_hidden_state
    assert torch.allclose(text(ids).last_hidden_state, expected, atol=1e-3)


def test_the_card_tells_recipe_and_figures(made: Path) -> None:
    card = json.loads((made / "model" / "card.json").read_text())
    assert list(card["phases"]) == [phase for phase in PHASES if phase != "assemble"]
    assert card["phases"]["vae"]["settings"]["steps"] == 4
    assert card["phases"]["vae"]["figures"]["psnr_db"] > 0
    assert card["license"] == "MIT"
    assert card["phases"]["unet"]["figures"]["adherence, overall"] == 0  # four steps teach nothing
    page = (made / "model" / "README.md").read_text()
    assert page.startswith("---\nlicense: mit\n")
    assert all(f"| {phase} |" in page for phase in ("scenes", "vae", "clip", "unet"))
    assert "| overall | 0.00 |" in page
    assert "adherence, " not in page  # but in a table of their own
    assert "src.scratch all --set scenes.count=40" in page
    assert set(card["files"]) == {
        path.relative_to(made / "model").as_posix() for path in (made / "model").rglob("*") if path.is_file()
    }
    assert sum(path.stat().st_size for path in (made / "model").rglob("*")) < 40 << 20


def test_each_phase_leaves_curves_pictures_and_a_report(made: Path) -> None:
    for phase in ("scenes", "vae", "clip", "unet"):
        page = (made / "work" / phase / "report.html").read_text()
        assert ("loss" in page) == (phase != "scenes")
        assert page.count("data:image/") >= 1
        assert "https:" not in page
    for phase in ("vae", "clip", "unet"):
        records = [json.loads(line) for line in (made / "work" / phase / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["kind"] == "validation"][-1] == 4
    sheet = Image.open(made / "work" / "vae" / "samples" / "step-000004.png")
    assert sheet.size == (8 * 128, 2 * 128)
    assert "adherence, overall" in (made / "work" / "unet" / "report.html").read_text()
    assert Image.open(made / "model" / "samples.png").width > 6 * 256


def test_its_clip_is_whole_and_tells_captions_apart(made: Path) -> None:
    judge = Clip(made / "model" / "clip")
    features = judge.text_features(["a red circle on a white background", "a blue star on a black background"])
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    (made / "spoilt").mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(made / "model" / "clip" / name, made / "spoilt")
    with pytest.raises(ValueError, match="no tokenizer"):
        Clip(made / "spoilt")


def test_weights_are_of_the_moving_average(copied: Path) -> None:
    import safetensors.torch

    fast = arguments(**{"vae.warmup_steps": 0, "vae.learning_rate": 0.05, "vae.ema_decay": 0.5})
    assert main(["vae", "--restart", "--work", str(copied), *fast]) == 0
    folder = Work(copied, print).of("vae") / "checkpoint-4" / "state"
    average, live = (safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("average", "live"))
    published = vae.read_vae(Work(copied, print)).state_dict()
    assert all(torch.equal(published[name], tensor.half().float()) for name, tensor in average.items())
    assert any(float((published[name] - tensor).abs().max()) > 2e-3 for name, tensor in live.items())


def test_the_scaling_factor_brings_latents_to_deviation_1(made: Path) -> None:
    work = Work(made / "work", print)
    with torch.no_grad():
        latents = vae.encode(vae.read_vae(work), read_pictures(work.result("scenes"), "train").floats(slice(40)))
    scale = vae.read_vae(Work(made / "work", print)).config.scaling_factor
    assert float(latents.std()) * scale == pytest.approx(1, rel=0.02)


# -- phases and what they build on


def test_the_same_command_again_does_nothing_again(copied: Path, capsys) -> None:
    assert main(["all", "--work", str(copied), "--out", str(copied / "model"), *arguments()]) == 0
    said = capsys.readouterr().err
    assert said.count(" is done ") == 5
    assert "step" not in said


def test_a_phase_without_those_before_it_is_refused_by_name(tmp_path: Path, capsys) -> None:
    assert main(["unet", "--work", str(tmp_path), *arguments()]) == ExitCode.NOT_FOUND
    assert "has no scenes yet; run python -m src.scratch scenes" in capsys.readouterr().err


def test_a_phase_from_another_version_of_an_earlier_one_is_refused(copied: Path, capsys) -> None:
    assert main(["vae", "--work", str(copied), "--restart", *arguments(**{"vae.seed": 9})]) == 0
    capsys.readouterr()
    assert main(["assemble", "--work", str(copied), *arguments()]) == ExitCode.USAGE
    assert "unet: was made from another vae than is there now" in capsys.readouterr().err


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(copied: Path, capsys) -> None:
    assert main(["vae", "--work", str(copied), *arguments(**{"vae.learning_rate": 0.5})]) == ExitCode.USAGE
    assert "learning_rate 0.002 -> 0.5" in capsys.readouterr().err


def test_figures_can_be_noted_more_often_without_learning_again(copied: Path, capsys) -> None:
    assert main(["vae", "--work", str(copied), *arguments(**{"vae.validation_steps": 1})]) == 0
    assert "vae       is done" in capsys.readouterr().err


def test_a_restart_forgets_nothing_that_could_not_be_learnt_again(copied: Path, capsys) -> None:
    shutil.rmtree(copied / "clip")
    assert main(["unet", "--restart", "--work", str(copied), *arguments()]) == ExitCode.NOT_FOUND
    assert (copied / "unet" / "final").is_dir()


def test_the_lesson_and_the_recipe_do_not_share_a_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for words, folder in ((["vae", "--quick"], "outputs/scratch-quick"), (["vae"], "outputs/scratch")):
        assert main(words) == ExitCode.NOT_FOUND
        assert f"{folder}: has no scenes yet" in capsys.readouterr().err


def test_what_is_not_ours_is_moved_aside(copied: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["assemble", "--work", str(copied), "--out", str(out), *arguments()]) == 0
    assert (tmp_path / "mine-set-aside" / "thesis.txt").read_text() == "years of work"
    assert (out / "model_index.json").is_file()


def test_a_model_too_large_to_ship_is_assembled_elsewhere(copied: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(assemble, "MAX_SHIPPED_BYTES", 1000)
    monkeypatch.setattr(assemble, "EMBEDDED", tmp_path / "embedded")
    words = ["assemble", "--work", str(copied), *arguments()]
    assert main([*words, "--out", str(tmp_path / "embedded")]) == ExitCode.REFUSED
    assert "assemble it with another --out" in capsys.readouterr().err
    assert not (tmp_path / "embedded").exists()
    assert main(words) == 0  # what hours have learnt becomes a model of any size
    assert (copied / "model" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vea"], "'vea' is no phase"),
        (["vae", "--set", "steps=0"], "vae.steps 0 is outside"),
        (["vae", "--set", "stpes=3"], "did you mean 'vae.steps'?"),
        (["unet", "--set", "channels=100,200"], "each is a multiple of 16"),
        (["clip", "--set", "heads=5"], "no multiple of clip.heads"),
        (["vae", "--set", "crop_px=60"], "no multiple of 8"),
        (["unet", "--set", "steps=300"], "unet.warmup_steps 400 of 300 steps would never let the rate fall"),
        (["all", "--restart"], "--restart is of one phase"),
        (["all", "--seed", "7"], "--seed changes nothing for all; the training's is --set unet.seed=N"),
        (["around", "--picture", "a.png", "--quick"], "--quick changes nothing for around"),
        (["unet", "--out", "models/mine"], "--out changes nothing for unet"),
        (["assemble", "--restart"], "--restart changes nothing for assemble"),
        (["reconstruct", "--picture", "a.png", "--seed", "5"], "--seed changes nothing for reconstruct"),
        (["reconstruct", "--picture", "a.png", "--count", "5"], "--count changes nothing for reconstruct"),
        (["interpolate", "--picture", "a.png", "--seed", "5"], "--seed changes nothing for interpolate between pictures"),
        (["all", "--set", "machine.device=gpu"], "device 'gpu' is not known"),
        (["unet", "--set", "channels=0,16"], "each is a multiple of 16"),
        (["unet", "--set", "head_width=40"], "unet.head_width 40 does not divide"),
        (["unet", "--set", "channels=32,32,32,32,32,32"], "do not fit into latents of 16 x 16"),
        (["unet", "--set", "attention_levels=3"], "more than the 2 levels"),
        (["all", "--set", "machine.compile=maybe"], "choose auto, on, off"),
        (["scenes", "--set", "grammar=easy"], "scenes.grammar 'easy' is not known; choose full, v0, simple"),
        (["all", "--set", "machine.precision=fp8"], "choose auto, fp32, bf16"),
    ],
)
def test_what_cannot_work_is_one_line(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert main([*words, "--work", str(tmp_path)]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_settings_come_from_files_and_flags() -> None:
    quick = read_settings({"quick": True, "set": ["steps=7", "warmup_steps=1"]}, "unet")
    assert quick.unet.steps == 7
    assert quick.vae.steps < ScratchSettings().vae.steps
    assert read_settings({"set": ["unet.channels=32,64"]}, "all").unet.channels == (32, 64)
    for section in fields(ScratchSettings):  # the files show every setting of the recipe that ships, and may not drift from it
        names = {f"{section.name}.{item.name}" for item in fields(getattr(ScratchSettings(), section.name))}
        assert read_yaml_settings(f"scratch/{section.name}").keys() == names
        assert read_settings({"config": [f"scratch/{section.name}"]}, "all") == ScratchSettings()


# -- going on with a model that was assembled


def test_an_assembled_model_is_unpacked_and_its_unet_goes_on(made: Path, tmp_path: Path, capsys) -> None:
    model, work = made / "model", ["--work", str(tmp_path / "work")]
    assert main(["unpack", "--model", str(model), *work]) == ExitCode.NOT_FOUND  # of what it learnt from
    assert "run python -m src.scratch scenes" in capsys.readouterr().err
    assert main(["scenes", "--set", "count=41", "--set", "held_out=32", *work]) == 0
    assert main(["unpack", "--model", str(model), *work]) == ExitCode.USAGE
    assert "other scenes; run python -m src.scratch scenes --set grammar=full --set lattice_px=8" in capsys.readouterr().err
    shutil.copytree(made / "work" / "scenes", tmp_path / "work" / "scenes", dirs_exist_ok=True)
    assert main(["unpack", "--model", str(model), *work]) == 0
    for phase in ("tokenizer", "vae", "clip", "unet"):
        before, after = (Work(folder, print).result(phase) for folder in (made / "work", tmp_path / "work"))
        assert {name: after.read(name) for name in after.files} == {name: before.read(name) for name in before.files}
        assert all(after.facts[part] == before.facts[part] for part in ("settings", "figures"))
    capsys.readouterr()
    older = shutil.copytree(model, tmp_path / "older")
    (older / "card.json").write_text((older / "card.json").read_text().replace('"grammar": "full",', ""))  # a newer setting
    assert main(["unpack", "--model", str(older), *work]) == 0  # what is there stays
    more = arguments(
        **{"unet.begin_from": model, "unet.steps": 1, "unet.seed": 4, "unet.transformer_layers": 2, "unet.learning_rate": 1e-4}
    )
    assert main(["unet", *work, *more]) == main(["assemble", *work, "--out", str(tmp_path / "more")]) == 0
    old, new = (json.loads((folder / "card.json").read_text()) for folder in (model, tmp_path / "more"))
    noted = page_of({**new, "began_from": {**new["began_from"], "note": "The rate was another."}})
    assert noted.index(old["command"]) < noted.index("` (The rate was another);") < noted.index("its U-Net went on")
    assert new["phases"]["unet"]["figures"]["samples"] == old["phases"]["unet"]["figures"]["samples"] + 2
    assert new["began_from"] == {"command": old["command"], "unet": old["phases"]["unet"]}
    assert str(tmp_path) not in json.dumps(new)
    page = (tmp_path / "more" / "README.md").read_text()
    assert page.index(old["command"]) < page.index("its U-Net went on") < page.index("--set unet.begin_from=model")
    weights = [
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].float()
        for folder in (model, tmp_path / "more")
    ]
    assert 0 < float((weights[1] - weights[0]).abs().max()) < 1e-3  # one small step from where it was
    back = arguments(**{"unet.begin_from": tmp_path / "more", "unet.steps": 1})
    assert main(["unet", *work, "--restart", *back]) == ExitCode.USAGE
    assert "another build; go on with --set unet.transformer_layers=2" in capsys.readouterr().err


def test_what_cannot_be_unpacked_or_gone_on_from_is_said(made: Path, copied: Path, tmp_path: Path, capsys) -> None:
    def said(*words: object) -> str:
        assert main([*map(str, words), "--work", str(copied)]) != 0
        return capsys.readouterr().err

    assert "a model that python -m src.scratch assembled has one" in said("unpack", "--model", tmp_path)
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "model" / "vae" / "config.json").unlink()
    assert "vae/config.json: is not there, but its card names it" in said("unpack", "--model", tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text("[]")
    assert "does not say all that is needed" in said("unpack", "--model", tmp_path / "model")
    assert "--seed changes nothing for unpack" in said("unpack", "--seed", 1)
    wider = arguments(**{"unet.begin_from": made / "model", "unet.channels": "32,32"})
    assert "another build; go on with --set unet.channels=16,32" in said("unet", "--restart", *wider)
    assert "typo/card.json: is not there" in said("unet", "--restart", *arguments(**{"unet.begin_from": "typo"}))
    assert (copied / "unet" / "final").exists()  # it was refused before anything was forgotten
    (tmp_path / "other").mkdir()
    shutil.copytree(made / "model", tmp_path / "other" / "model")
    (tmp_path / "other" / "model" / "vae" / "config.json").write_text("{}")
    before = (copied / "vae" / "final" / "config.json").read_bytes()
    assert "vae: is there already, of another model" in said("unpack", "--model", tmp_path / "other" / "model")
    assert (copied / "vae" / "final" / "config.json").read_bytes() == before  # nothing that was learnt is replaced
    other = arguments(**{"unet.begin_from": tmp_path / "other" / "model"})
    assert "was learnt with another vae than" in said("unet", "--restart", *other)
    assert (copied / "unet" / "final").exists()  # nor was anything here
    shutil.rmtree(copied / "vae")
    goes_on = arguments(**{"unet.begin_from": made / "model"})
    assert f"has no vae, and the U-Net of {made / 'model'} goes on" in said("all", *goes_on)  # before one is learnt
    assert not (copied / "vae").exists()


# -- pictures and the latent space's tools


def test_crops_are_pieces_of_their_pictures(made: Path) -> None:
    pictures = read_pictures(Work(made / "work", print).result("scenes"), "train")
    assert np.array_equal(pictures.pixels[3].permute(1, 2, 0).numpy(), np.asarray(draw(pictures.scenes[3])))
    batch = vae.crops(pictures, VaeSettings(batch_size=6, crop_px=32), 5)
    assert torch.equal(batch, vae.crops(pictures, VaeSettings(batch_size=6, crop_px=32), 5))
    whole = pictures.floats(slice(None))
    found = 0
    for number, crop in enumerate(batch):
        crop = crop.flip(-1) if number % 2 else crop
        windows = whole.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 97, 97, 32, 32)
        corner = (windows[..., 0, 0] == crop[:, 0, 0][None, :, None, None]).all(1) & (
            windows[..., -1, -1] == crop[:, -1, -1][None, :, None, None]
        ).all(1)
        found += any(torch.equal(whole[n, :, y : y + 32, x : x + 32], crop) for n, y, x in corner.nonzero().tolist())
    assert found == 6


def test_slerp_keeps_lengths_and_halves_angles() -> None:
    one, other = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.allclose(latent_space.slerp(one, other, 0.5), torch.tensor([2.0, 2.0]) / 2**0.5)
    assert torch.allclose(latent_space.slerp(one, other, 0.25).norm(), torch.tensor(2.0))
    assert torch.allclose(latent_space.slerp(one, 2 * one, 0.5), 1.5 * one)


def test_tools_write_one_picture_each(made: Path, tmp_path: Path, capsys) -> None:
    draw(next(iter(read_pictures(Work(made / "work", print).result("scenes"), "train").scenes))).save(tmp_path / "a.png")
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "b.png")
    a, b, model = (
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        ["--model", str(made / "model"), "--out", str(tmp_path)],
    )
    count = ["--count", "3"]
    runs = {
        "interpolate": [["--picture", a, "--picture", b, *count], ["--prompt", "a red star", "--prompt", "a blue star", *count]],
        "reconstruct": [["--picture", a, "--picture", b]], "around": [["--picture", a, *count]],
    }  # fmt: skip
    for tool, choices in runs.items():
        for choice in choices:
            assert main([tool, *choice, *model]) == 0
            path = Path(capsys.readouterr().out.strip())
            assert min(Image.open(path).size) >= 128
    assert main(["interpolate", "--picture", a, *model]) == ExitCode.USAGE
    assert "takes two --prompt or two --picture" in capsys.readouterr().err
    assert main(["around", "--picture", a, "--picture", b, *model]) == ExitCode.USAGE  # and does not draw the first alone
    assert "around takes one --picture" in capsys.readouterr().err
    assert main(["around", "--picture", a, "--model", str(tmp_path)]) == ExitCode.NOT_FOUND
    assert main(["around", "--picture", str(tmp_path / "none.png"), *model]) == ExitCode.NOT_FOUND
