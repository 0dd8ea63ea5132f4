"""Instant doors: what can be answered without torch is answered with torch, diffusers and their like made unimportable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKED = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "safetensors", "huggingface_hub")


@pytest.fixture
def run_door(tmp_path: Path):
    """Run main.py in a process in which the heavy packages cannot be imported; no stopwatch, so no flake."""
    lines = ["import sys", *[f"sys.modules[{name!r}] = None" for name in BLOCKED]]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(*arguments: str, door: str = "main.py", **more: str) -> subprocess.CompletedProcess[str]:
        module = ["-m", door] if door.startswith("src.") else [str(ROOT / door)]
        command = [sys.executable, *module, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment | more, timeout=60)

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "exit codes"),
        (["-h"], "--negative-prompt"),
        (["--version"], "0.4"),
        (["--list-schedulers"], "DPM++ 2M"),
        (["test", "--estimate-vram", "--width", "768", "--height", "768"], "peak"),
        (["test", "--estimate-vram", "--model", "sdxl", "--max-vram", "6"], "offload"),
        (["test", "--estimate-vram", "--model", "embedded"], "128x128"),
    ],
)
def test_answers_without_torch(run_door, arguments: list[str], expected: str) -> None:
    result = run_door(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert expected in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 2, "prompt is empty"),
        (["a cat", "--widht", "512"], 2, "did you mean --width?"),
        (["a", "cat"], 2, "quotes"),
        (["a cat", "--width", "500"], 2, "nearest: 496 or 504"),
        (["a cat", "--width", "-64"], 2, "outside 64 to 8192"),
        (["a cat", "--height", "0"], 2, "outside 64 to 8192"),
        (["a cat", "--steps", "0"], 2, "steps 0"),
        (["a cat", "--cfg", "nan"], 2, "guidance"),
        (["a cat", "--seed", "5000000000"], 2, "seed"),
        (["a cat", "--scheduler", "eulr"], 2, "did you mean 'euler'?"),
        (["a cat", "--preset", "lmc"], 2, "lcm"),
        (["a cat", "--set", "generation.stps=3"], 2, "did you mean"),
        (["a cat", "--config", "sdlx"], 4, "did you mean 'sdxl'?"),
        (["a cat", "--lora", "nowhere/x.safetensors"], 4, "nowhere"),
        (["a cat <lora:ghost:1>"], 4, "ghost"),
        (["a cat", "--init-image", "nowhere.png"], 4, "nowhere.png"),
        (["a cat", "--mask", "m.png"], 2, "--init-image"),
        (["a cat", "--model", "./typo"], 4, "typo"),
        (["a cat", "--model", "model.ckpt"], 6, "pickle"),
        (["a cat", "--model", "someone/not-cached", "--offline"], 4, "--offline"),
        (["--prompts", "nowhere.txt"], 4, "nowhere.txt"),
        (["--from-image", "nowhere.png"], 4, "nowhere.png"),
        (["a cat", "--model", "embedded", "--output", "sitecustomize.py"], 2, "sitecustomize.py"),
        (["a cat", "--width", "abc"], 2, "--width abc: expected a whole number"),
        (["a cat", "--precision", "fp8"], 2, "choose auto, fp16, bf16 or fp32"),
        (["a cat", "--model", "4gb"], 2, "use --config 4gb"),
        (["a cat", "--lora", ""], 2, "--lora is empty"),
        (["a cat", "--lora", "sitecustomize.py"], 6, "not a .safetensors file"),
        (["a __ghost__"], 4, "ghost.txt"),
        (["a cat", "--strength", "0.4"], 2, "--init-image"),
        (["a cat", "--model", "embedded", "--device", "gpu"], 2, "cuda:N"),
        (["a cat", "--model", "embedded", "--device", "cpu", "--precision", "fp16"], 2, "bf16 or fp32"),
        (["--from-image", "x.png", "--prompts", "jobs.txt"], 2, "--prompts many"),
        (["--estimate-vram", "--prompts", "nowhere.txt"], 2, "the size of the largest job"),
        (["a cat", "--width", "1024", "--size", "512x512"], 2, "--size 512x512 and --width say the same"),
        (["a cat", "--sampler", "LCM", "--steps", "60", "--model", "embedded"], 2, "LCM takes 50 at most"),
    ],
)
def test_mistakes_cost_no_import(run_door, arguments: list[str], code: int, expected: str) -> None:
    result = run_door(*arguments)
    assert result.returncode == code, result.stderr
    assert expected in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, "an error is one line"


@pytest.mark.parametrize(
    ("door", "arguments", "code", "expected"),
    [
        ("src.train_lora", ["--help"], 0, "--dataset-dir"),
        ("src.train_lora", ["--rank", "0"], 2, "rank 0 is outside"),
        ("src.train_lora", ["--dataset_dir", "nowhere", "--model", "embedded"], 4, "nowhere: no such folder"),
        ("src.train_lora", ["--model", "./typo"], 4, "typo"),
        ("src.train_lora", ["--model", "sdxl", "--rank", "8", "--estimate-vram", "--max-vram", "8"], 0, "8"),
        ("src.finetune", ["--help"], 0, "--train PART"),
        ("src.finetune", ["--train", "unet"], 2, "choose all, cross-attention"),
        ("src.finetune", ["--dataset_dir", "nowhere", "--model", "embedded"], 4, "nowhere: no such folder"),
        (
            "src.finetune",
            ["--model", "sd15", "--train", "mid", "--estimate-vram", "--max-vram", "8"],
            0,
            "mid, 97,038,080 numbers",
        ),
        ("src.prepare_dataset", ["--help"], 0, "--trigger"),
        ("src.prepare_dataset", ["--sizee", "3"], 2, "did you mean --size"),
        ("src.lora", ["--help"], 0, "resize"),
        ("src.lora", ["inform", "x.safetensors"], 2, "is no command"),
        ("src.evaluate", ["--help"], 0, "quality"),
        ("src.evaluate", ["quality", "--help"], 0, "--inception"),
        ("src.evaluate", ["quality", "--reel", "x"], 2, "did you mean --real?"),
        ("src.evaluate", ["quality", "--real", "nowhere", "--generated", "x"], 4, "nowhere: no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_other_doors_are_instant_too(run_door, door: str, arguments: list[str], code: int, expected: str) -> None:
    result = run_door(*arguments, door=door)
    assert result.returncode == code, result.stderr
    assert expected in (result.stderr if code else result.stdout)
    assert len(result.stderr.strip().splitlines()) == (1 if code else 0)


@pytest.mark.parametrize("arguments", [["--help"], ["test", "--estimate-vram"]])
def test_of_several_processes_the_first_answers_and_none_needs_torch(run_door, arguments: list[str]) -> None:
    alone, *several = [run_door(*arguments, RANK=index, WORLD_SIZE=count) for index, count in ("01", "02", "12")]
    assert [result.returncode for result in (alone, *several)] == [0, 0, 0]
    assert [bool(result.stdout) for result in several] == [True, False]
    mistake = run_door("test", "--stps", "3", RANK="1", WORLD_SIZE="2")
    assert (mistake.returncode, mistake.stderr.count("\n")) == (2, 1)
    assert mistake.stderr.startswith("process 1: error: unknown argument")


def test_an_estimate_for_a_program_is_json(run_door) -> None:
    result = run_door("test", "--estimate-vram", "--model", "embedded", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["width"] == 128


def test_debug_shows_where_an_error_of_the_user_was_found(run_door) -> None:
    result = run_door("a cat", "--widht", "512", "--debug")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "in parse_arguments" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown argument '--widht'")


@pytest.mark.parametrize("module", ["src.arguments", "src.orders", "src.generator"])
def test_ctrl_c_while_importing_is_one_line(run_door, tmp_path: Path, module: str) -> None:
    interrupting = f"""
import sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
"""
    with (tmp_path / "sitecustomize.py").open("a") as file:
        file.write(interrupting)
    result = run_door("a cat", "--model", "embedded")
    assert result.returncode == 130
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("interrupted")


def test_a_python_without_the_packages_says_how_to_get_them(run_door) -> None:
    answer = run_door("a red circle", "--model", "embedded")
    assert answer.returncode == 1
    assert "is not installed in this Python; activate the environment" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_memory_that_runs_out_outside_of_every_plan_has_its_exit_code(capsys) -> None:
    from src.doors import guard
    from src.terminal import Terminal

    def load() -> int:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried 4 GB")

    assert guard([], Terminal(), load, "interrupted") == 3
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("out of memory; close other programs, or use a smaller model, or --precision bf16 on a CPU")
    )
