"""The command line end to end, in this process: what lands on stdout, stderr and disk, and the exit codes."""

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, PngImagePlugin

from src import cli, images
from src.errors import ExitCode
from src.request import LoraChoice
from tests.tiny import pipelines

FAST = ["--model", "embedded", "--steps", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: outputs/, models/cache and wildcards/ are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in (folder / "outputs").glob("gen_*.png") if "grid" not in path.name and "preview" not in path.name
    )


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as picture:
        return numpy.asarray(picture.convert("RGB")).astype(int)


def test_a_picture_is_drawn_saved_and_named(here, capsys) -> None:
    code, out, err = run(capsys, "a red circle on a white background", "--seed", "42", *FAST)
    assert code == 0
    (path,) = pictures(here)
    assert re.fullmatch(r"gen_\d{8}_\d{6}_000\.png", path.name)
    assert out.startswith(f"outputs/{path.name}  seed 42  128x128  2 steps")
    assert [line.split()[0] for line in err.splitlines()] == ["plan", "model"]
    with Image.open(path) as picture:
        assert (picture.size, picture.mode) == ((128, 128), "RGB")


def test_nothing_else_reaches_the_terminal(here) -> None:
    """A fresh process: no warning, bar or chatter of a library, whatever it says while it is imported."""
    import subprocess
    import sys

    command = [sys.executable, str(Path(cli.__file__).parent.parent / "main.py"), "a red circle", "--seed", "1", *FAST]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) == 1
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["plan", "model"]


def test_a_random_seed_is_printed_and_draws_the_picture_again(here, capsys) -> None:
    _, out, _ = run(capsys, "a star", *FAST)
    seed = re.search(r"seed (\d+)", out)[1]
    run(capsys, "a star", "--seed", seed, *FAST)
    first, second = pictures(here)
    assert numpy.array_equal(pixels(first), pixels(second))


def test_json_is_one_line_a_picture_and_nothing_else(here, capsys) -> None:
    code, out, _ = run(capsys, "a star", "--seed", "7", "--num", "2", "--batch-size", "2", "--json", *FAST)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["seed"] for line in lines] == [7, 8]
    assert all(Path(line["file"]).is_file() and line["prompt"] == "a star" and line["width"] == 128 for line in lines)


def test_from_image_draws_the_same_picture_and_flags_win(here, capsys) -> None:
    run(capsys, "a (red:1.2) circle", "--seed", "5", "--cfg", "3", "--sampler", "Euler a", "--negative-prompt", "blue", *FAST)
    (original,) = pictures(here)
    code, out, _ = run(capsys, "--from-image", str(original))
    assert (code, "2 steps" in out) == (0, True)
    again = pictures(here)[1]
    assert numpy.array_equal(pixels(original), pixels(again))
    code, out, _ = run(capsys, "--from-image", str(original), "--seed", "6", "--json")
    assert json.loads(out)["seed"] == 6
    assert json.loads(out)["negative_prompt"] == "blue"


def test_from_image_reads_a1111(here, capsys) -> None:
    chunks = PngImagePlugin.PngInfo()
    text = "a star\nNegative prompt: red\nSteps: 2, Sampler: Euler a, CFG scale: 4, Seed: 9, Size: 128x64, Model: deliberate_v2"
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(here / "theirs.png", pnginfo=chunks)
    code, _, err = run(capsys, "--from-image", "theirs.png")
    assert code == ExitCode.NOT_FOUND
    assert "deliberate_v2" in err
    assert "--model" in err
    code, out, _ = run(capsys, "--from-image", "theirs.png", "--model", "embedded", "--json")
    line = json.loads(out)
    assert (code, line["seed"], line["width"], line["height"], line["steps"]) == (0, 9, 128, 64, 2)
    assert (line["guidance_scale"], line["scheduler"]) == (4.0, "euler_a")


def test_no_metadata_and_a_picture_without_a_recipe(here, capsys) -> None:
    run(capsys, "a star", "--no-metadata", *FAST)
    (path,) = pictures(here)
    with Image.open(path) as picture:
        assert not {"parameters", "recipe"} & set(picture.info)
    code, _, err = run(capsys, "--from-image", str(path))
    assert code == ExitCode.REFUSED
    assert "no recipe" in err


def test_a_recipe_from_a_stranger_fetches_nothing(here, capsys) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a star\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 9, Size: 64x64, Model: evil/model")
    Image.new("RGB", (8, 8)).save(here / "theirs.png", pnginfo=chunks)
    code, _, err = run(capsys, "--from-image", "theirs.png")
    assert code == ExitCode.NOT_FOUND
    assert "not here" in err


def test_jobs_survive_a_bad_one_and_are_not_drawn_twice(here, capsys) -> None:
    (here / "jobs.txt").write_text(
        "# two good jobs, four bad ones\n"
        "a red circle\n"
        '--prompt "a blue star" --seed 7 --width 64 --height 64\n'
        "--prompt x --stps 3\n"
        "--prompt x --width 100\n"
        "--prompt x --model other\n"
        '--prompt "unclosed\n',
        encoding="utf-8",
    )
    code, out, err = run(capsys, "--prompts", "jobs.txt", "--json", *FAST)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == ExitCode.PARTLY_FAILED
    assert [line["line"] for line in lines] == [2, 3, 4, 5, 6, 7]
    assert [line.get("exit_code") for line in lines] == [None, None, 2, 2, 2, 2]
    assert lines[1]["width"] == 64
    assert "did you mean --steps?" in lines[2]["error"]
    assert "cannot differ from job to job" in lines[4]["error"]
    assert "4 of 6 jobs failed" in err
    drawn = {path: path.read_bytes() for path in pictures(here)}
    assert len(drawn) == 2

    code, out, _ = run(capsys, "--prompts", "jobs.txt", "--json", *FAST)
    again = [json.loads(line) for line in out.splitlines()]
    assert [line.get("skipped") for line in again] == [True, True, None, None, None, None]
    assert {path: path.read_bytes() for path in pictures(here)} == drawn

    run(capsys, "--prompts", "jobs.txt", "--redo", *FAST)
    assert len(pictures(here)) == 4


def test_a_redo_that_was_killed_goes_on_without_the_flag(here, capsys, monkeypatch) -> None:
    """Of three jobs one is redone: what is left of the redo is drawn, and not taken from the first run."""
    (here / "jobs.txt").write_text("a star\na circle\na square\n")
    fast = ["--prompts", "jobs.txt", "--json", "--model", "embedded", "--steps", "1"]
    run(capsys, *fast)
    old = {path.name for path in pictures(here)}
    from src.generator import TextToImageGenerator

    with monkeypatch.context() as patch:
        real, calls = TextToImageGenerator._denoise, []
        patch.setattr(
            TextToImageGenerator,
            "_denoise",
            lambda *a: real(*a) if not calls.append(1) and len(calls) < 2 else raise_interrupt(),
        )
        assert run(capsys, *fast, "--redo")[0] == ExitCode.INTERRUPTED
    (redone,) = {path.name for path in pictures(here)} - old
    lines = [json.loads(line) for line in run(capsys, *fast)[1].splitlines()]
    assert [(line.get("skipped"), Path(line["file"]).name == redone) for line in lines] == [
        (True, True),
        (None, False),
        (None, False),
    ]
    assert len(pictures(here)) == 6
    again = [json.loads(line) for line in run(capsys, *fast)[1].splitlines()]
    assert [(line["skipped"], Path(line["file"]).name in old) for line in again] == [(True, False)] * 3


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_a_half_finished_job_goes_on_with_its_seed(here, capsys) -> None:
    """Three of four pictures are there; one of them is lost: a re-run draws just that one, and the same."""
    (here / "jobs.txt").write_text("--prompt star --num 4\n")
    run(capsys, "--prompts", "jobs.txt", *FAST)
    before = {path.name: pixels(path) for path in pictures(here)}
    lost = pictures(here)[2]
    lost.unlink()
    code, out, _ = run(capsys, "--prompts", "jobs.txt", *FAST)
    assert (code, len(out.splitlines())) == (0, 1)
    (new,) = {path.name for path in pictures(here)} - (set(before) - {lost.name})
    assert numpy.array_equal(pixels(here / "outputs" / new), before[lost.name])


def test_equal_lines_are_separate_jobs_and_stdin_is_read(here, capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("a star\na star\n"))
    code, _, _ = run(capsys, "--prompts", "-", *FAST)
    first, second = pictures(here)
    assert code == 0
    assert not numpy.array_equal(pixels(first), pixels(second))


def test_ctrl_c_keeps_what_is_finished(here, capsys, monkeypatch) -> None:
    from src.generator import TextToImageGenerator

    real, calls = TextToImageGenerator._denoise, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(TextToImageGenerator, "_denoise", interrupted)
    code, out, err = run(capsys, "a star", "--num", "5", *FAST)
    assert code == ExitCode.INTERRUPTED
    assert "kept" in err
    assert len(pictures(here)) == len(out.splitlines()) == 2


def test_grid_and_preview(here, capsys) -> None:
    code, _, err = run(capsys, "a star", "--num", "3", "--grid", "--preview", "1", "--seed", "1", *FAST)
    assert code == 0
    (sheet,) = (here / "outputs").glob("*grid*.png")
    assert str(sheet.name) in err
    with Image.open(sheet) as picture:
        assert picture.width > 256
        assert picture.height > 256
    (preview,) = (here / "outputs").glob("gen_*_preview.png")
    assert preview.name in err


def test_a_grid_holds_what_an_earlier_run_finished(here, capsys) -> None:
    (here / "jobs.txt").write_text("--prompt star --num 3 --seed 5\n--prompt circle --seed 9\n")
    run(capsys, "--prompts", "jobs.txt", *FAST)
    first, lost, *rest = pictures(here)
    lost.unlink()
    run(capsys, "--prompts", "jobs.txt", "--grid", *FAST)
    (new,) = set(pictures(here)) - {first, *rest}
    (sheet,) = (here / "outputs").glob("*grid*.png")
    drawn = [images.read_image(path) for path in (first, new, *rest)]
    expected = images.contact_sheet(drawn, [f"seed {seed}" for seed in (5, 6, 7, 9)])
    assert numpy.array_equal(pixels(sheet), numpy.asarray(expected))


def test_init_image_and_mask(here, capsys) -> None:
    Image.new("RGB", (128, 128), (37, 99, 235)).save(here / "blue.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    mask.save(here / "mask.png")
    code, _, _ = run(
        capsys,
        "a red star",
        "--init-image",
        "blue.png",
        "--mask",
        "mask.png",
        "--strength",
        "1",
        "--steps",
        "4",
        "--model",
        "embedded",
    )
    assert code == 0
    drawn = pixels(pictures(here)[0])
    assert (drawn[:, :64] == (37, 99, 235)).all()
    assert abs(drawn[:, 64:] - (37, 99, 235)).mean() > 10
    code, _, err = run(capsys, "--from-image", str(pictures(here)[0]))
    assert code == ExitCode.USAGE
    assert "--init-image" in err


@pytest.fixture
def lora(here) -> Path:
    """An adapter for the embedded model, in kohya's format."""
    from src.config import AppConfig
    from src.generator import TextToImageGenerator

    config = AppConfig()
    config.model.model_id = "embedded"
    unet = TextToImageGenerator(config).model.pipeline.unet
    tensors, source = {}, torch.Generator().manual_seed(0)
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_v"):
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = torch.randn(2, module.in_features, generator=source)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(module.out_features, 2, generator=source)
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    from safetensors.torch import save_file

    (here / "models" / "lora").mkdir(parents=True)
    save_file(tensors, here / "models" / "lora" / "wild.safetensors")
    return here / "models" / "lora" / "wild.safetensors"


def test_loras_by_flag_and_by_tag_draw_the_same_and_come_back_from_the_recipe(here, capsys, lora) -> None:
    plain = ["a red circle", "--seed", "3", *FAST]
    run(capsys, *plain)
    code, _, err = run(capsys, *plain, "--lora", f"{lora}:0.5")
    assert code == 0
    assert re.search(r"lora +LoRA wild: .*kohya, rank 2, alpha 2, (\d+)/\1 layers \(unet \1\), weight 0.5", err)
    run(capsys, "a red circle<lora:wild:0.5>", "--seed", "3", *FAST)
    base, flagged, tagged = pictures(here)
    assert abs(pixels(base) - pixels(flagged)).max() > 20
    assert numpy.array_equal(pixels(flagged), pixels(tagged))
    for path in (flagged, tagged):
        code, _, _ = run(capsys, "--from-image", str(path))
        assert code == 0
        assert numpy.array_equal(pixels(pictures(here)[-1]), pixels(flagged))


def test_an_adapter_of_another_family_is_one_line(here, capsys) -> None:
    tensors = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 1280),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(5120, 4),
    }
    from safetensors.torch import save_file

    save_file(tensors, here / "xl.safetensors")
    code, out, err = run(capsys, "a star", "--lora", "xl.safetensors", *FAST)
    assert (code, out) == (ExitCode.REFUSED, "")
    assert "is for SDXL, the model is SD1" in err
    assert pictures(here) == []


def test_a_full_disk_is_one_line_and_loses_nothing(here, capsys, monkeypatch) -> None:
    import errno
    import os

    from src import images

    real, calls = images.publish_numbered, []

    def full_after_one(*arguments, **named):
        calls.append(1)
        if len(calls) > 1:
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
                return real(*arguments, **named)
        return real(*arguments, **named)

    monkeypatch.setattr(images, "publish_numbered", full_after_one)
    code, out, err = run(capsys, "a star", "--num", "3", *FAST)
    assert code == ExitCode.FAILURE
    assert "No space left" in err
    assert len(err.splitlines()) == 3
    assert len(pictures(here)) == len(out.splitlines()) == 1
    assert [path.name for path in (here / "outputs").iterdir()] == [pictures(here)[0].name]


def test_control_characters_do_not_reach_the_terminal(here, capsys) -> None:
    code, out, err = run(capsys, "a star\x1b[2J\x07", "--scheduler", "eul\x1b[2Jr", *FAST)
    assert code == ExitCode.USAGE
    assert "\x1b" not in out + err


def test_an_unexpected_error_is_one_line_without_debug(here, capsys, monkeypatch) -> None:
    monkeypatch.setattr("src.orders.read_jobs", lambda *_: 1 / 0)
    code, _, err = run(capsys, "a star")
    assert code == ExitCode.FAILURE
    assert "ZeroDivisionError" in err
    assert len(err.splitlines()) == 1
    with pytest.raises(ZeroDivisionError):
        run(capsys, "a star", "--debug")


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a.safetensors", "a.safetensors", 1.0), ("a:0.5", "a", 0.5), (r"C:\x\a", r"C:\x\a", 1.0), ("a:b:-1", "a:b", -1.0)],
)
def test_lora_flags_are_path_and_weight(text: str, path: str, weight: float) -> None:
    assert LoraChoice.parse(text) == LoraChoice(Path(path), weight)


def test_models_by_folder_and_their_mistakes(here, capsys) -> None:
    folder = pipelines.save(pipelines.sd1(), here / "tiny")
    code, _, err = run(capsys, "a star", "--model", "./tiny", "--steps", "1", "--size", "64x64", "--revision", "main")
    assert code == 0
    assert "idle    the revision does nothing: ./tiny lies on this disk, and only the hub has revisions" in err
    assert "model   tiny (SD1)" in err
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "gone")
    code, _, err = run(capsys, "a star", "--model", "./tiny", "--steps", "1")
    assert code == ExitCode.NOT_FOUND
    assert "unet" in err
