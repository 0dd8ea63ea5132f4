"""The door of the evaluation: its table of verbs, its help and its errors."""

import argparse
import importlib

import pytest

from src import evaluate
from src.evaluate import VERBS
from src.version import VERSION


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_with_its_summary(arguments, capsys) -> None:
    assert evaluate.main(arguments) == 0
    shown = capsys.readouterr().out
    for verb, name in VERBS.items():
        assert f"  {verb} " in shown
        assert importlib.import_module(name).SUMMARY in shown


def test_version(capsys) -> None:
    assert evaluate.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{VERSION}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_keeps_the_contract(verb, capsys) -> None:
    module = importlib.import_module(VERBS[verb])
    assert "\n" not in module.SUMMARY
    parser = evaluate.build_parser(verb, module)
    assert parser.get_default("output") == f"outputs/evaluation/{verb}"
    assert callable(module.run)
    assert evaluate.main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert module.SUMMARY[:40] in shown
    assert "--output DIR" in shown
    assert "exit codes" in shown


def test_only_the_verb_that_is_asked_for_is_imported(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(evaluate, "VERBS", {"quality": "src.evaluation.quality", "ghost": "src.evaluation.ghost"})
    real = importlib.import_module
    monkeypatch.setattr(evaluate.importlib, "import_module", lambda name: asked.append(name) or real(name))
    assert evaluate.main(["quality", "--help"]) == 0
    assert asked == ["src.evaluation.quality"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qualty"], "'qualty' is no verb; did you mean quality?"),
        (["--real", "x"], "'--real' is no verb"),
        (["quality", "--reel=x", "--generated", "b"], "unknown argument '--reel'; did you mean --real?"),
        (["quality", "--real", "a", "--generated", "b", "c"], "unknown argument 'c'; see"),
        (["quality", "--real", "x"], "--generated must be given"),
        (["quality", "--real"], "--real: expected one argument"),
        (["quality", "--seed", "x", "--real", "a", "--generated", "b"], "--seed: invalid int value: 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line(arguments, said, capsys) -> None:
    assert evaluate.main(arguments) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert said in shown.err


def test_help_asks_for_nothing_else(capsys) -> None:
    assert evaluate.main(["quality", "--help", "--max_pictures=3"]) == 0
    assert "--real DIR" in capsys.readouterr().out


def test_underscores_are_dashes_in_flags_alone(monkeypatch) -> None:
    seen = []
    module = argparse.Namespace(
        SUMMARY="a verb", add_arguments=lambda parser: parser.add_argument("--max-pictures"), run=lambda options, say: seen.append(options) or 0
    )  # fmt: skip
    monkeypatch.setattr(evaluate.importlib, "import_module", lambda name: module)
    assert evaluate.main(["quality", "--max_pictures=a_b", "--output", "x_y"]) == 0
    assert (seen[0].max_pictures, seen[0].output) == ("a_b", "x_y")


def test_a_value_may_begin_with_a_dash(monkeypatch, capsys) -> None:
    seen = []
    module = importlib.import_module("src.evaluation.compare")
    monkeypatch.setattr(module, "run", lambda options, say: seen.append(options) or 0)
    assert evaluate.main(["compare", "none", "a", "--negative", "-blur", "--seed", "-1", "--no-prompt-weights"]) == 0
    assert (vars(seen[0])["generation.negative_prompt"], vars(seen[0])["generation.seed"], seen[0].b) == ("-blur", -1, "a")
    assert evaluate.main(["compare", "none", "a", "--negative", "--blur"]) == 2
    assert "unknown argument '--blur'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("quality", "nothing was written"),
        ("compare", "drawn so far stay, without a result"),
        ("adherence", "the same command goes on"),
    ],
)
def test_an_interruption_says_what_is_left(monkeypatch, capsys, verb: str, said: str) -> None:
    def interrupt(options: object, say: object) -> int:
        raise KeyboardInterrupt

    module = importlib.import_module(VERBS[verb])
    monkeypatch.setattr(module, "run", interrupt)
    more = {"quality": ["--real", "a", "--generated", "b"], "compare": ["a", "b"], "adherence": []}[verb]
    assert evaluate.main([verb, *more]) == 130
    assert said in capsys.readouterr().err


def test_every_exit_code_of_a_verb_is_in_the_help() -> None:
    assert "5 some pictures failed" in evaluate.EXIT_CODES  # grid's


def test_a_verb_may_say_a_flag_anew() -> None:
    module = argparse.Namespace(SUMMARY="a verb", add_arguments=lambda parser: parser.add_argument("--output", default="mine"))
    assert evaluate.build_parser("v", module).parse_args([]).output == "mine"
