"""The door of ``python main.py``: reads the command line, checks all that can be checked, and only then imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from src.arguments import build_config, help_text, parse_arguments
from src.doors import answer
from src.errors import ExitCode
from src.schedulers import list_schedulers
from src.terminal import Terminal
from src.version import VERSION


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, "interrupted; the pictures finished so far are kept", as_json="--json" in argv)


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    typed = parse_arguments(argv)
    if _print_information(typed):
        return ExitCode.OK
    from src import orders, recipe_orders  # read pictures, recipes and job files; --help must not pay for that

    recipe = recipe_orders.read_recipe(typed, terminal.say)
    config = build_config(typed, recipe.settings if recipe else None)
    if recipe is not None:
        typed = recipe_orders.follow_recipe(recipe, typed, config, terminal.say)
    if "estimate_vram" in typed:
        from src.estimate import estimate

        answer = estimate(config, orders.read_request(config, {"prompt": "-", **typed}, terminal.say))
        print(json.dumps(answer.as_json()) if terminal.as_json else answer.text())
        return ExitCode.OK
    jobs = orders.read_jobs(typed, config, terminal.say)
    wishes = orders.check_surroundings(typed, config)

    from src import quiet

    quiet.silence_libraries(verbose="verbose" in typed)
    from src.generator import TextToImageGenerator  # torch: seconds, paid only when all that was typed is right
    from src.session import Session

    generator = TextToImageGenerator(config, terminal.say)
    generator.allow_partial = "allow_partial" in typed
    session = Session(generator, terminal, wishes)
    if session.has_work(jobs):
        generator.load_model()
    if recipe is not None:
        model, quantize = generator.model, config.optimization.quantize
        drawn_with = (generator.weights_sha256(), model.precision, model.device_name)
        recipe_orders.compare_with_recipe(recipe, *drawn_with, terminal.say, quantize)
    return session.run(jobs)


def _print_information(typed: dict[str, Any]) -> bool:
    """Answer --help and its like; whether that was what was asked."""
    if "help" in typed:
        print(help_text())
    elif "version" in typed:
        print(VERSION)
    elif "list_schedulers" in typed:
        print(list_schedulers())
    else:
        return False
    return True
