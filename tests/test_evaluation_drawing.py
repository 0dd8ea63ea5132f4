"""What the drawing verbs share: instant flags, main.py's orders, prompts and seeds."""

import argparse
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from src.arguments import build_config, parse_arguments
from src.errors import UserError
from src.evaluation import arms, drawing
from src.orders import read_request

ROOT = Path(__file__).parent.parent
VERBS = ("attention", "grid", "compare", "subject")
BLOCKED = ("torch", "diffusers", "transformers", "numpy", "matplotlib", "safetensors", "jinja2", "huggingface_hub")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> None:
    """An order proves that its folder can be written in."""
    monkeypatch.chdir(tmp_path)


def parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(conflict_handler="resolve", allow_abbrev=False)
    parser.add_argument("--output", default="out")
    importlib.import_module(f"src.evaluation.{verb}").add_arguments(parser)
    return parser


def test_flags_are_there_without_torch() -> None:
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    body = (
        f"import sys, argparse, importlib; {blocks}\n"
        f"for verb in {VERBS}:\n"
        "    module = importlib.import_module(f'src.evaluation.{verb}')\n"
        "    parser = argparse.ArgumentParser()\n"
        "    module.add_arguments(parser)\n"
        "    print(verb, bool(module.SUMMARY), '--guidance-scale' in parser.format_help())\n"
    )
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"{verb} True True" for verb in VERBS], done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_of_a_picture_is_a_flag_once(verb: str) -> None:
    names = [name for action in parser_of(verb)._actions for name in action.option_strings]
    assert len(names) == len(set(names))
    assert {"--model", "--lora", "--steps", "--cfg", "--scheduler", "--strength", "--device", "--set", "--seed"} <= set(names)
    assert not {"--num-images", "--from-image", "--grid", "--prefix"} & set(names)


def test_the_readmes_commands_parse() -> None:
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "src.evaluate " in line]
    found = [words for line in lines if (words := shlex.split(line)[3:]) and words[0] in VERBS]
    assert {words[0] for words in found} == set(VERBS)
    for verb, *words in found:
        drawing.read_typed(parser_of(verb).parse_args(words), print)


def test_an_order_is_main_pys() -> None:
    flags = ["--steps", "7", "--cfg", "3", "--size", "128x64", "--model", "embedded", "--negative", "blur", "--clip-skip", "2"]
    _, typed = drawing.read_typed(parser_of("attention").parse_args(["a cat", *flags]), print)
    found = drawing.OrderDesk(print).order(typed).request
    asked = parse_arguments(["a cat", *flags, "--seed", "0"])
    assert found == read_request(build_config(asked), asked, print)


def test_a_random_seed_is_drawn_once_for_all_orders_and_said() -> None:
    said: list[str] = []
    flags = ["--prompt", "a cat", "--model", "embedded", "--seed", "-1"]
    _, typed = drawing.read_typed(parser_of("compare").parse_args(["embedded", "none", *flags]), said.append)
    (seed,) = (int(word.strip(",")) for line in said for word in line.split()[1:2])
    assert 0 <= seed < 2**31
    sides = arms.order_arms({"one": typed, "other": typed}, ["a cat"], drawing.read_seeds({**typed, "num": 2}), said.append)
    assert [[order.request.seed for order in own] for own in sides.values()] == [[seed, seed + 1]] * 2
    assert len(said) == 1
    drawn = {drawing.read_typed(parser_of("grid").parse_args(flags), print)[1]["generation.seed"] for _ in range(5)}
    assert len(drawn) == 5
    for words, wanted in ((["--set", "generation.seed=7"], 7), ([], 0)):  # one that is set is not passed over for the default
        assert drawing.read_typed(parser_of("grid").parse_args(words), print)[1]["generation.seed"] == wanted


def test_an_unusual_flag_is_refused_as_main_py_refuses_it() -> None:
    with pytest.raises(UserError, match="expected a whole number"):
        parser_of("grid").parse_args(["--steps", "many"])
    _, typed = drawing.read_typed(parser_of("grid").parse_args(["--prompt", "a", "--width", "100"]), print)
    with pytest.raises(UserError, match="not a multiple of 8"):
        drawing.OrderDesk(print).order(typed)


def test_what_is_said_of_all_orders_is_said_once() -> None:
    said = []
    desk = drawing.OrderDesk(said.append)
    for seed in range(3):
        desk.order({"prompt": "a [cat|dog]", "model": "embedded", "generation.seed": seed, "paths.outputs": "out"})
    assert len(said) == 1


def test_prompts_and_seeds(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na cat\n\na dog, wet\n")
    typed = {"prompts": str(file), "generation.seed": 5, "num": 3}
    assert (drawing.read_prompts(typed), drawing.read_seeds(typed)) == (["a cat", "a dog, wet"], [5, 6, 7])
    assert typed == {"generation.seed": 5}
    assert drawing.read_prompts({"prompt": "a cat"}) == ["a cat"]
    file.write_text('--prompt "a cat" --seed 3\n')
    for wrong, message in (
        ({}, "give the prompts"),
        ({"prompt": "a", "prompts": str(file)}, "give the prompts"),
        ({"prompts": str(file)}, "a job's flags"),
    ):
        with pytest.raises(UserError, match=message):
            drawing.read_prompts(wrong)
    file.write_text("# none\n")
    with pytest.raises(UserError, match="holds no prompt"):
        drawing.read_prompts({"prompts": str(file)})
