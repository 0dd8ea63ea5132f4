"""From what was typed to requests and jobs: what is checked without a model, and what identifies a job."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from src import images, named_files, orders
from src.arguments import build_config, parse_arguments
from src.errors import ExitCode, UserError
from src.named_files import NamedFiles, adapter_files
from tests.tiny import model_folders
from tests.tiny.named import picture, safetensors, sha256


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def read_jobs(*argv: str) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    typed = parse_arguments(argv)
    return orders.read_jobs(typed, build_config(typed), said.append), said


def refusal(*argv: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read_jobs(*argv)
    return caught.value


# --- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["x", "--lora", ""], ExitCode.USAGE, "--lora is empty"),
        (["x", "--lora", "a.ckpt"], ExitCode.REFUSED, "pickle"),
        (["x", "--lora", "nowhere.safetensors"], ExitCode.NOT_FOUND, "nowhere.safetensors: not found"),
        (["x", "--lora", "bad.safetensors:0.5"], ExitCode.REFUSED, "is not a .safetensors file"),
        (["x", "--lora", "a" * 300], ExitCode.REFUSED, "cannot be read"),
        (["x", "--lora", "a" * 300 + ":x"], ExitCode.REFUSED, "cannot be read"),
        (["x", "--lora", "adapter_config.json"], ExitCode.NOT_FOUND, "holds no .safetensors file"),
        (["x", "--lora", "empty"], ExitCode.NOT_FOUND, "holds no .safetensors file"),
        (["x", "--lora", "pickled"], ExitCode.REFUSED, "pickle"),
        (["x <lora:ghost>"], ExitCode.NOT_FOUND, "<lora:ghost> is not in models/lora"),
        (["x <lora:torn>"], ExitCode.REFUSED, "is not a .safetensors file"),
        (["a __ghost__"], ExitCode.NOT_FOUND, "no wildcard file ghost.txt"),
        (["x", "--strength", "0.4"], ExitCode.USAGE, "--init-image FILE"),
        (["x", "--mask", "m.png"], ExitCode.USAGE, "--init-image FILE"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(here: Path, argv: list[str], code: ExitCode, message: str) -> None:
    (here / "bad.safetensors").write_bytes(b"not tensors at all")
    (here / "adapter_config.json").write_text("{}")
    (here / "models" / "lora").mkdir(parents=True)
    (here / "models" / "lora" / "torn.safetensors").write_bytes(b"not tensors at all")
    (here / "empty").mkdir()
    (here / "pickled").mkdir()
    (here / "pickled" / "adapter_model.bin").write_bytes(b"")
    error = refusal(*argv)
    assert message in str(error)
    assert error.exit_code is code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--device", "gpu"], "device 'gpu' is not known"),
        (["x", "--device", "cpu", "--precision", "fp16"], "choose bf16 or fp32"),
        (["x", "--set", "model.precision=fp8"], "precision 'fp8' is not known"),
    ],
)
def test_impossible_machines_are_found_before_torch(argv: list[str], message: str) -> None:
    typed = parse_arguments([*argv, "--model", "embedded"])
    with pytest.raises(UserError, match=message) as caught:
        orders.check_surroundings(typed, build_config(typed))
    assert caught.value.exit_code is ExitCode.USAGE


def test_what_is_drawn_as_text_is_said() -> None:
    assert "[cat:dog:0.5]" in read_jobs("a [cat:dog:0.5]")[1][0]
    assert read_jobs("a [cat:dog:0.5]", "--no-prompt-weights")[1] == []
    assert read_jobs("a [cat]")[1] == []


def test_an_interval_fills_both_settings_wherever_it_is_given(here: Path) -> None:
    (here / "jobs.txt").write_text("a cat\n--prompt x --guidance-interval 0.1:0.6\n--prompt x --guidance-interval 0.1\n")
    (here / "own.yaml").write_text("generation:\n  guidance_start: 0.2\n")
    jobs, _ = read_jobs("--prompts", "jobs.txt", "--config", "own.yaml", "--set", "generation.guidance_end=0.9")
    intervals = [(job.request.guidance_start, job.request.guidance_end) for job in jobs if job.request]
    assert intervals == [(0.2, 0.9), (0.1, 0.6)]
    assert "write it as START:END" in str(jobs[2].error)


@pytest.mark.parametrize("text", ["0.2", "0.2-0.8", ":", "a:b", "0.2:"])
def test_an_interval_that_is_none_is_said(text: str) -> None:
    assert "write it as START:END, e.g. --guidance-interval 0.2:0.8" in str(refusal("x", "--guidance-interval", text))


def test_what_has_nothing_to_act_on_is_said() -> None:
    assert "draws without guidance" in read_jobs("a cat", "--guidance-interval", "0:0.6", "--cfg", "1")[1][0]
    assert "the first is always whole" in read_jobs("a cat", "--deep-cache", "2", "--steps", "1")[1][0]
    (line,) = read_jobs("a cat", "--negative", "blurry", "--cfg", "1")[1]
    assert line == "idle    the negative prompt does nothing: guidance 1 draws without guidance"
    assert read_jobs("a cat", "--guidance-interval", "0:0.6", "--deep-cache", "2")[1] == []


# --- job files ---------------------------------------------------------------------------------------------------------


def test_flags_in_lines(here: Path) -> None:
    (here / "jobs.txt").write_text("-W 64 --prompt x\na cat --seed 5\na cat, --ar 16:9\n-m other --prompt x\n")
    jobs, said = read_jobs("--prompts", "jobs.txt")
    assert (jobs[0].request.width, jobs[0].request.prompt) == (64, "x")
    assert (jobs[1].request.seed, jobs[1].request.prompt) == (None, "a cat --seed 5")
    assert jobs[2].request.prompt == "a cat, --ar 16:9"
    assert "cannot differ from job to job" in str(jobs[3].error)
    assert said == ["line 2: '--seed' inside a bare prompt is drawn as text; begin the line with --prompt"]


def test_an_empty_standard_input_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("# nothing\n"))
    assert str(refusal("--prompts", "-")).startswith("standard input: holds no job")


def ids(*argv: str) -> list[str]:
    return [job.id for job in read_jobs("--prompts", "jobs.txt", *argv)[0]]


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "other"],
        ["--revision", "x"],
        ["--vae", "x"],
        ["--architecture", "x"],
        ["--precision", "fp32"],
        ["--no-safety-checker"],
        ["--steps", "3"],
        ["--deep-cache", "2"],
        ["--token-merging", "0.5"],
        ["--guidance-interval", "0:0.8"],
        ["--guidance-interval", "0.2:1"],
        ["--lora", "a.safetensors"],
        ["--lora", "a.safetensors:0.5"],
        ["--init-image", "a.png"],
        ["--init-image", "a.png", "--mask", "a.png"],
    ],
)
def test_what_changes_the_picture_changes_the_jobs_name(here: Path, argv: list[str]) -> None:
    (here / "jobs.txt").write_text("a cat\n")
    safetensors(here / "a.safetensors"), picture("a.png")
    assert ids(*argv) != ids()
    assert ids(*argv) == ids(*argv, "--batch-size", "2", "--output", "elsewhere", "--offline")


def test_files_count_by_their_content(here: Path) -> None:
    (here / "jobs.txt").write_text("--prompt 'a cat <lora:ink:1>' --lora a.safetensors --init-image a.png --mask m.png\n")
    ink = here / "models" / "lora" / "ink.safetensors"
    safetensors(ink), safetensors(here / "a.safetensors"), picture("a.png"), picture("m.png")
    seen = [ids()]
    for change in (
        lambda: safetensors(ink, 1),
        lambda: safetensors(here / "a.safetensors", 1),
        lambda: picture("a.png", 1),
        lambda: picture("m.png", 1),
    ):
        change()
        seen.append(ids())
    assert len({item for (item,) in seen}) == 5
    (here / "a.png").rename(here / "b.png")
    (here / "jobs.txt").write_text((here / "jobs.txt").read_text().replace("a.png", "b.png"))
    assert ids() == seen[-1]


def test_local_weights_count_by_their_content_and_not_by_their_age(here: Path) -> None:
    """Trained on, a model keeps its name and size; a copy on another machine has another time of change."""
    (here / "jobs.txt").write_text("a cat\n")
    folder = model_folders.model(here / "mine", model_folders.SD1 | model_folders.CHECKER)
    file, vae = safetensors(here / "one.safetensors"), safetensors(here / "vae.safetensors")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "safety_checker/model"):
        safetensors(folder / f"{name}.safetensors")
    (folder / "big.safetensors").write_bytes(b"another program's")
    of_folder, of_file, of_vae = ["--model", "./mine"], ["--model", "./one.safetensors"], ["--vae", "./vae.safetensors"]
    ages = count(1)

    def changed(path: Path, *argv: str) -> bool:
        before = ids(*argv)
        os.utime(path, (1, next(ages)))
        assert ids(*argv) == before
        path.write_bytes(path.read_bytes()[:-1] + bytes([next(ages)]))
        return ids(*argv) != before

    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert changed(folder / f"{name}.safetensors", *of_folder), name
    assert changed(folder / "scheduler" / "scheduler_config.json", *of_folder)
    assert changed(folder / "tokenizer" / "vocab.json", *of_folder)
    assert not changed(folder / "safety_checker" / "model.safetensors", *of_folder)
    assert not changed(folder / "big.safetensors", *of_folder)
    assert changed(file, *of_file)
    assert changed(vae, *of_vae)
    of_vae = ["--vae", "./mine"]
    assert changed(folder / "vae" / "diffusion_pytorch_model.safetensors", *of_vae)
    assert not changed(folder / "unet" / "diffusion_pytorch_model.safetensors", *of_vae)


def test_wildcard_files_count_by_their_content(here: Path) -> None:
    """Those that a prompt can reach, whatever the seed: files that name files, and the negative prompt's."""
    (here / "wildcards").mkdir()
    texts = {
        "colour": "red\nblue\n",
        "animal": "__fur__ cat\ndog\n__gone__\n",
        "fur": "soft\n",
        "blur": "blurry\n",
        "other": "x\n",
    }
    for name, text in texts.items():
        (here / "wildcards" / f"{name}.txt").write_text(text)
    (here / "jobs.txt").write_text('--prompt "a {__colour__|red} __animal__" --negative "__blur__"\na cat\n')
    seen = [ids()]
    for name in texts:
        (here / "wildcards" / f"{name}.txt").write_text(texts[name] + "more\n")
        seen.append(ids())
    assert [before[0] != after[0] for before, after in pairwise(seen)] == [True, True, True, True, False]
    assert len({plain for _, plain in seen}) == 1


def test_jobs_that_name_neither_keep_the_ids_of_0_3_0(here: Path) -> None:
    """As the version before files of models and wildcards counted wrote them into journals."""
    (here / "jobs.txt").write_text("a {red|blue} cat\n")
    assert ids() == ["fc222e8f661d14e9"]
    assert ids("--model", "owner/name", "--vae", "owner/vae", "--revision", "x") == ["93aee82688e473b7"]


def test_adapters_that_wildcards_choose_count_as_the_pictures_seeds_choose_them(here: Path) -> None:
    """Where they choose none the job keeps its id, and so does a job without a seed."""
    ink, wash = (safetensors(here / "models" / "lora" / f"{name}.safetensors", n) for n, name in enumerate(("ink", "wash")))
    chosen = "a {<lora:ink>|<lora:wash>}"
    (here / "jobs.txt").write_text(
        f'--prompt "a {{red|blue}} cat <lora:ink:{{0.5|1}}>" --seed 7 --num 4\n{chosen}\n--prompt "{chosen}" --seed 7 --num 4\n'
    )
    seen = [ids()]
    assert seen[0][:2] == ["2111911825f6c6b5", "c35bc7c526ff4c0f"]  # as 0.3.0 has them
    for path in (ink, wash):
        safetensors(path, 2)
        seen.append(ids())
    assert [before[2] != after[2] for before, after in pairwise(seen)] == [True, True]
    ink.unlink()
    assert "<lora:ink> is not in" in str(read_jobs("--prompts", "jobs.txt")[0][2].error)


def test_each_file_is_read_once_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "jobs.txt").write_text("one\ntwo <lora:ink>\nthree <lora:ink>\n")
    safetensors(here / "models" / "lora" / "ink.safetensors"), picture("a.png"), picture("m.png")
    calls: list[str] = []

    def counted(name: str, real: Any) -> Any:
        return lambda path, *rest: calls.append(f"{name} {Path(path).name}") or real(path, *rest)

    monkeypatch.setattr(images, "read_image", counted("decode", images.read_image))
    monkeypatch.setattr(named_files.files, "sha256_of", counted("hash", named_files.files.sha256_of))
    monkeypatch.setattr(named_files, "read_header", counted("header", named_files.read_header))
    read_jobs("--prompts", "jobs.txt", "--init-image", "a.png", "--mask", "m.png")
    files_read = ["decode a.png", "decode m.png", "hash a.png", "hash ink.safetensors", "hash m.png", "header ink.safetensors"]
    assert sorted(calls) == files_read


def test_the_files_and_hash_of_an_adapter_are_those_of_its_reader(here: Path) -> None:
    from src.lora.reading import _find_sources  # torch

    safetensors(here / "file" / "a.safetensors")
    safetensors(here / "one" / "b.safetensors")
    safetensors(here / "diffusers" / "pytorch_lora_weights.safetensors"), safetensors(here / "diffusers" / "other.safetensors")
    for folder in ("peft", "parts/unet_lora", "parts/text_encoder_one_lora"):
        safetensors(here / folder / "adapter_model.safetensors")
        (here / folder / "adapter_config.json").write_text("{}")
    paths = ("file/a.safetensors", "one", "diffusers", "peft", "peft/adapter_model.safetensors", "parts")
    for path in map(Path, paths):
        theirs = {file for source in _find_sources(path) for file in (source.file, source.settings) if file}
        assert set(adapter_files(path)) == theirs, path
    hashes = sorted(sha256(file) for file in adapter_files(Path("parts")))
    named = NamedFiles(here, here / "hashes.json")
    assert named.adapter_sha256(Path("parts")) == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert named.adapter_sha256(Path("one")) == sha256("one/b.safetensors")


def test_quantised_pictures_are_other_jobs_and_plain_ones_keep_their_ids(here: Path) -> None:
    (here / "jobs.txt").write_text("a fox\n")
    ids = [read_jobs("--prompts", "jobs.txt", *extra)[0][0].id for extra in ([], ["--quantize", "int8"], ["--lowvram"])]
    assert ids[0] != ids[1]
    assert ids[0] == ids[2], "where weights lie does not change a picture"


@pytest.mark.parametrize(
    ("argv", "mode"),
    [
        (["--medvram"], "balanced"),
        (["--lowvram"], "low"),
        (["--memory", "minimal"], "minimal"),
        (["--memory", "low", "--lowvram"], "low"),
        ([], "auto"),
    ],
)
def test_a1111s_names_of_the_modes(argv: list[str], mode: str) -> None:
    assert build_config(parse_arguments(["x", *argv])).optimization.memory == mode


@pytest.mark.parametrize("argv", [["--medvram", "--lowvram"], ["--memory", "fast", "--lowvram"], ["--memory", "much"]])
def test_modes_that_contradict_each_other_are_refused(argv: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["x", *argv])
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_prefix_that_begins_no_file_name_is_found_before_a_model_is_loaded() -> None:
    for prefix in ("shoot/fox", "a\\b", "CON.x\0"):
        typed = parse_arguments(["x", "--prefix", prefix, "--model", "embedded"])
        with pytest.raises(UserError) as caught:
            orders.check_surroundings(typed, build_config(typed))
        assert caught.value.exit_code is ExitCode.REFUSED


def test_a_job_file_is_found_at_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    (here / "jobs.txt").write_text("a fox\n")
    assert [job.request.prompt for job in read_jobs("--prompts=~/jobs.txt")[0]] == ["a fox"]


def test_contradictory_switches_and_a_missing_package_are_found_before_a_model_is_loaded(here: Path, monkeypatch) -> None:
    for argv in (
        ["x", "--memory", "fast", "--model-cpu-offload"],
        ["x", "--quantize", "int8", "--lowvram"],
        ["x", "--xformers", "--attention-slicing"],
    ):
        typed = parse_arguments([*argv, "--model", "embedded"])
        with pytest.raises(UserError, match=r"contradict|exclude") as caught:
            orders.check_surroundings(typed, build_config(typed))
        assert caught.value.exit_code is ExitCode.USAGE
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    typed = parse_arguments(["x", "--quantize", "int8", "--model", "embedded"])
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        orders.check_surroundings(typed, build_config(typed))
