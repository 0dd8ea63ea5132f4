"""The door of ``python main.py``: reads the command line, checks all that can be checked, and only then imports torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from src.arguments import build_config, help_text, parse_arguments
from src.config import AppConfig
from src.doors import answer, guard
from src.errors import ExitCode, UserError, usage_error
from src.processes import ONE_ALONE, Processes, is_one_of_many_wanted
from src.schedulers import list_schedulers
from src.terminal import Terminal
from src.version import VERSION

if TYPE_CHECKING:
    from src.recipe import ParsedRecipe
    from src.session import Job, Wishes


ON_INTERRUPT = "interrupted; the pictures finished so far are kept"


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, ON_INTERRUPT, as_json="--json" in argv)


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    typed, together = parse_arguments(argv), terminal.processes
    if _print_information(typed, together):
        return ExitCode.OK
    from src import orders, recipe_orders  # read pictures, recipes and job files; --help must not pay for that

    recipe = recipe_orders.read_recipe(typed, terminal.say)
    config = build_config(typed, recipe.settings if recipe else None)
    if recipe is not None:
        typed = recipe_orders.follow_recipe(recipe, typed, config, terminal.say)
    if "estimate_vram" in typed:
        if "prompts" in typed:
            raise usage_error("--estimate-vram is for one request; leave out --prompts, and give the size of the largest job")
        from src.estimate import estimate

        answer = estimate(config, orders.read_request(config, {"prompt": "-", **typed}, terminal.say))
        if together.is_first:
            print(json.dumps(answer.as_json()) if terminal.as_json else answer.text())
        return ExitCode.OK
    orders.check_sharing(typed, together)
    jobs, before = orders.share(orders.read_jobs(typed, config, terminal.say), together)
    wishes = replace(orders.check_surroundings(typed, config, together), first_number=before)
    if "redo" in typed and wishes.journal is not None:
        wishes.journal.forget({job.id: job.pictures for job in jobs if job.request is not None})
    if is_one_of_many_wanted():
        terminal.say(ONE_ALONE)
    together.end_with_launcher()
    code = guard(argv, terminal, lambda: _draw(typed, config, recipe, jobs, wishes, terminal), ON_INTERRUPT)
    if code != ExitCode.INTERRUPTED:
        together.meet()
    return code


def _draw(
    typed: dict[str, Any], config: AppConfig, recipe: ParsedRecipe | None, jobs: list[Job], wishes: Wishes, terminal: Terminal
) -> int:
    """Load the model, if anything is left to draw, and draw the jobs."""
    from src import lean_imports, quiet, recipe_orders

    quiet.silence_libraries(verbose="verbose" in typed)
    _start_reading(config)
    with lean_imports.for_drawing(config.optimization):
        from src.generator import TextToImageGenerator  # torch: seconds, paid only when all that was typed is right
    from src.session import Session

    terminal.processes.set_threads()
    generator = TextToImageGenerator(config, terminal.say)
    generator.allow_partial = "allow_partial" in typed
    session = Session(generator, terminal, wishes)
    if (request := session.first_request(jobs)) is not None:
        generator.load_model(request)
    if recipe is not None and jobs:
        model, quantize = generator.model, config.optimization.quantize
        drawn_with = (generator.weights_sha256(), model.precision, model.device_name)
        recipe_orders.compare_with_recipe(recipe, *drawn_with, terminal.say, quantize)
    terminal.each_speaks = True
    return session.run(jobs)


def _start_reading(config: AppConfig) -> None:
    """Have the disk at work while the libraries are imported. What is wrong with the model is said when it is loaded."""
    from src import estimate, model_source

    wanted, checker = config.model, not config.optimization.disable_safety_checker
    with contextlib.suppress(UserError, OSError):
        source = model_source.resolve(
            wanted.model_id,
            config.paths.folder("cache"),
            wanted.offline,
            revision=wanted.revision,
            include_safety_checker=checker,
        )
        in_half = estimate.find_place(config).precision != "fp32"
        model_source.start_reading(source, in_half, include_safety_checker=checker)


def _print_information(typed: dict[str, Any], together: Processes) -> bool:
    """Answer --help and its like; whether that was what was asked."""
    answers = {"help": help_text, "version": lambda: VERSION, "list_schedulers": list_schedulers}
    wanted = next((answer for name, answer in answers.items() if name in typed), None)
    if wanted is not None and together.is_first:
        print(wanted())
    return wanted is not None
