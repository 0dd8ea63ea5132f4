"""What the verbs that draw share: ``main.py``'s flags, orders checked before a model is loaded, and one artist for all.

An order is ``main.py``'s: what was typed, with what differs from picture to picture put over it.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.arguments import FLAGS, build_config, is_given, settle
from src.config import AppConfig
from src.errors import usage_error
from src.flags import Flag, add_flag
from src.request import RANDOM_SEED, user_path
from src.terminal import Terminal

if TYPE_CHECKING:
    from PIL import Image

    from src.generator import Step
    from src.named_files import NamedFiles
    from src.request import PictureRequest

FIRST_SEED = 0  # where none is typed: figures of two runs are then of the same pictures
DRAWN_SEEDS = 2**31  # of --seed -1: below this, so that those of a prompt's other pictures fit into 32 bits, too
PICTURES_PER_PROMPT = 4
PICTURES = "pictures"  # the folder within a verb's own

_ELSEWHERE = ("output", "many jobs", "information")  # groups of main.py's flags that are not about one picture
_OF_THE_DOOR = {"output", "debug", "help"}
_NOT_HERE = ("--num", "--batch-size", "--from-image")  # a verb draws one picture at a time, from flags

Say = Callable[[str], None]

PROMPT = Flag(("--prompt",), "one prompt", metavar="TEXT")
PROMPTS = Flag(("--prompts",), "a file with a prompt a line", metavar="FILE")
SEED = Flag(("--seed",), f"of the first picture of each prompt (default: {FIRST_SEED})", "generation.seed", int, "N")
NUM = Flag(("--num", "-n"), f"pictures a prompt, seed by seed (default: {PICTURES_PER_PROMPT})", kind=int, metavar="N")


def add_flags(parser: argparse.ArgumentParser, own: Sequence[Flag]) -> None:
    """A verb's own flags, and those of ``main.py`` that decide how a picture looks and where it is drawn."""
    taken = {name for flag in own for name in flag.names} | set(_NOT_HERE)
    groups = {"this verb": own}
    for title, flags in FLAGS.items():
        if title not in _ELSEWHERE:
            groups[title] = [flag for flag in flags if not taken & set(flag.names)]
    defaults = AppConfig().to_dict()
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            add_flag(group, flag, defaults)


def read_typed(options: argparse.Namespace, say: Say) -> tuple[Path, dict[str, Any]]:
    """The verb's folder, and what was typed, and only that; a seed is always there, and for -1 it is drawn, once and said."""
    typed = {name: value for name, value in vars(options).items() if name not in _OF_THE_DOOR}
    folder = user_path(options.output)
    typed = {**settle(typed), "paths.outputs": str(folder / PICTURES)}
    seed = build_config(typed).generation.seed if is_given(typed, "generation.seed") else FIRST_SEED
    if seed in (None, RANDOM_SEED):  # else every order would draw its own, and no two were of the same noise
        seed = secrets.randbelow(DRAWN_SEEDS)
        say(f"seed    {seed}, drawn for --seed {RANDOM_SEED}")
    return folder, {**typed, "generation.seed": seed}


def read_prompts(typed: dict[str, Any]) -> list[str]:
    """The prompts of ``--prompt`` or ``--prompts``, at least one; both are taken out. Raises UserError."""
    prompt, file = typed.pop("prompt", None), typed.pop("prompts", None)
    if (prompt is None) == (file is None):
        raise usage_error('give the prompts: either --prompt "..." or --prompts FILE, with one a line')
    if file is None:
        return [prompt]
    import sys

    from src.jobs import read_job_lines, source_name

    lines = [line.text for line in read_job_lines(file, sys.stdin)]
    if flagged := next((line for line in lines if line.startswith("--")), None):
        raise usage_error(f"{source_name(file)}: '{flagged[:40]}' is a job's flags; here a line is a prompt alone")
    if not lines:
        raise usage_error(f"{source_name(file)}: holds no prompt; write one a line")
    return lines


def read_seeds(typed: dict[str, Any]) -> list[int]:
    """The seeds of each prompt's pictures; ``--num`` is taken out. Raises UserError (usage)."""
    count = typed.pop("num", PICTURES_PER_PROMPT)
    if not 1 <= count <= 1000:
        raise usage_error(f"--num {count} is out of range; draw 1 to 1,000 pictures a prompt")
    return [typed["generation.seed"] + index for index in range(count)]


@dataclass(frozen=True, slots=True)
class Order:
    """One picture to draw, and the configuration that it is drawn with."""

    config: AppConfig
    request: PictureRequest
    allow_partial: bool = False  # use adapters of which only a part fits
    tagged: tuple[str, ...] = ()  # adapters that the prompt itself names


class OrderDesk:
    """Turns what was typed into orders, checked as far as that goes without a model."""

    def __init__(self, say: Say) -> None:
        self._say, self._said = say, set[str]()
        self._named: NamedFiles | None = None  # each file is looked at once
        self._models: set[str] = set()

    def order(self, typed: Mapping[str, Any]) -> Order:
        """The order of these flags. Raises what ``main.py`` raises for them."""
        from src import named_files, orders  # read pictures; --help must not pay for that

        config = build_config(dict(typed))
        self._named = self._named or orders.named_files(config)
        request = orders.read_request(config, dict(typed), self._say_once, self._named)
        if repr(config.model) not in self._models:
            orders.check_surroundings({}, config)
            self._models.add(repr(config.model))
        one = replace(request, num_images=1, batch_size=1)
        return Order(config, one, "allow_partial" in typed, tuple(chain(*named_files.tagged_loras(one, config))))

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def refuse_tags(orders: Sequence[Order]) -> None:
    """Where adapters are what is compared, a prompt may name none: it would draw with it on every side. Raises UserError."""
    if tagged := [name for order in orders for name in order.tagged]:
        raise usage_error(f"prompt: <lora:{tagged[0]}> would be drawn on every side; leave it out where adapters are compared")


class Artist:
    """Draws orders one after the other; the model of the order before stays, if the next one wants the same."""

    def __init__(self, say: Say, orders: Sequence[Order]) -> None:
        """``orders`` are all that will be drawn, for the progress bar: the terminal's whose ``say`` this is, if it is one's."""
        from src.generator import TextToImageGenerator  # torch: seconds, paid only when all that was typed is right

        self.generator = TextToImageGenerator(say=say)
        terminal = getattr(say, "__self__", None)
        self._terminal = terminal if isinstance(terminal, Terminal) else None
        self._steps_done, self._drawn, self._count = 0, 0, len(orders)
        if self._terminal is not None:
            self._terminal.start_progress(sum(order.request.num_inference_steps for order in orders))

    def __enter__(self) -> Artist:
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model's memory: what comes next measures with models of its own."""
        if self._terminal is not None:
            self._terminal.end_progress()
        self.generator.unload()

    def draw(self, order: Order, on_step: Callable[[Step], None] = lambda step: None) -> Image.Image:
        """The picture, with its recipe. Raises UserError."""
        steps = order.request.num_inference_steps

        def report(step: Step) -> None:
            if self._terminal is not None:
                done = self._steps_done + step.fraction * steps
                self._terminal.progress(done, f"picture {self._drawn + 1} of {self._count}")
            on_step(step)

        self.generator.config, self.generator.allow_partial = order.config, order.allow_partial
        try:
            (picture,) = self.generator.draw(order.request, report)
        finally:
            self._steps_done += steps
            self._drawn += 1
        return picture

    def save(self, picture: Image.Image, name: str) -> Path:
        """Save a picture with its recipe; the name gets the time and a number, and nothing is written over."""
        (path,) = self.generator.save_images([picture], name)
        return path


def facts_of(picture: Image.Image) -> dict[str, Any]:
    """What one wants to know of a drawn picture beside its pixels, from its recipe."""
    drawn = picture.info["drawn"]
    return {
        "prompt": drawn.prompt, "prompt_weights": drawn.prompt_weights, "seed": drawn.seed,
        "width": drawn.width, "height": drawn.height, "steps": drawn.num_inference_steps,
        "guidance_scale": drawn.guidance_scale, "scheduler": drawn.scheduler,
        "model": drawn.model.name, "loras": [[item.name, item.weight] for item in drawn.loras],
        "precision": drawn.precision, "device": drawn.device, "time_s": drawn.time_s,
    }  # fmt: skip
