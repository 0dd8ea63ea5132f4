"""The command line: one table of flags, the parser made of it, and what was typed turned into settings.

A flag has no default: the dataclasses of config.py have it, and the help text reads it from there. ``--cfg-scale`` and
``--cfg_scale`` are the same flag.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from src.config import (
    DEVICES,
    PRECISIONS,
    PRESETS_FOLDER,
    AppConfig,
    full_name,
    load_config,
    model_of_preset,
    parse_assignment,
    preset_names,
    read_settings,
    set_value,
)
from src.errors import usage_error
from src.schedulers import PRESETS, apply_preset, find_sampler

USAGE = """python main.py "PROMPT" [options]
       python main.py --prompts FILE [options]
       python main.py --from-image PICTURE [options]"""

EPILOG = """examples:
  python main.py "a red circle left of a blue square on a white background" --model embedded --seed 42
  python main.py "a castle on a floating island" --steps 30 --cfg 7.5 --width 768 --height 512 --num 4
  python main.py "a photo of sks dog in a spacesuit" --lora models/lora/final:0.8
  python main.py "a watercolour of this place" --init-image photo.jpg --strength 0.5
  python main.py "test" --estimate-vram --width 768 --height 768

exit codes: 0 done, 1 failure, 2 wrong usage, 3 out of memory, 4 not found, 5 some jobs failed, 6 input refused,
            130 interrupted (finished pictures are kept)"""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its spellings, the setting that it fills (or None), its type (None: a switch), and its help."""

    names: tuple[str, ...]
    help: str
    setting: str | None = None
    kind: type | None = str
    metavar: str | None = None
    value: Any = True  # what a switch sets
    repeat: bool = False
    in_jobs: bool = False  # may stand in a line of a job file
    choices: Sequence[str] | None = None

    @property
    def dest(self) -> str:
        return self.setting or self.names[0].lstrip("-").replace("-", "_")

    @property
    def takes_value(self) -> bool:
        return self.kind is not None


def _switch(name: str, help: str, setting: str | None = None, value: bool = True, in_jobs: bool = False) -> Flag:
    return Flag((name,), help, setting, None, value=value, in_jobs=in_jobs)


_DEFAULT_MODEL = AppConfig().model.model_id

FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to draw": (
        Flag(("--prompt",), "the prompt, if not given first", metavar="TEXT", in_jobs=True),
        Flag(("--negative-prompt", "--negative"), "what to keep out of the picture", "generation.negative_prompt", metavar="TEXT", in_jobs=True),
        Flag(("--width", "-W"), "pixels, a multiple of 8", "generation.width", int, "PX", in_jobs=True),
        Flag(("--height", "-H"), "pixels, a multiple of 8", "generation.height", int, "PX", in_jobs=True),
        Flag(("--size",), "both at once, e.g. 768x512", metavar="WxH", in_jobs=True),
        Flag(("--seed",), "picture i is drawn with seed+i; absent or -1: random, and printed", "generation.seed", int, "N", in_jobs=True),
        Flag(("--num", "-n", "--count", "--num-images"), "how many pictures", "generation.num_images", int, "N", in_jobs=True),
        Flag(("--batch-size",), "how many at once; the pictures are the same", "generation.batch_size", int, "N", in_jobs=True),
        _switch("--no-prompt-weights", "take brackets in the prompt literally", "generation.prompt_weights", False, in_jobs=True),
        Flag(("--clip-skip",), "A1111's count: 1 last layer, 2 the one before", "generation.clip_skip", int, "N", in_jobs=True),
    ),
    "how to sample": (
        Flag(("--steps", "--num-inference-steps"), "denoising steps", "generation.num_inference_steps", int, "N", in_jobs=True),
        Flag(("--cfg", "--cfg-scale", "--guidance-scale"), "how strictly the prompt is followed", "generation.guidance_scale", float, "X", in_jobs=True),
        Flag(("--scheduler", "--sampler", "--sampler-name"), "see --list-schedulers", "generation.scheduler", metavar="NAME", in_jobs=True),
        Flag(("--preset",), "steps, guidance and spacing of a few-step model: " + ", ".join(PRESETS), metavar="NAME", in_jobs=True),
    ),
    "start from a picture": (
        Flag(("--init-image", "-i"), "draw over this picture", metavar="FILE", in_jobs=True),
        Flag(("--strength",), "how much is redrawn: near 0 keeps the picture, 1 ignores it", "generation.strength", float, "X", in_jobs=True),
        Flag(("--mask",), "repaint only where this picture is white", metavar="FILE", in_jobs=True),
        Flag(("--from-image",), "draw a picture again from the recipe it carries; other flags win", metavar="FILE"),
    ),
    "model": (
        Flag(("--model", "-m"), f"preset name, hub id, diffusers folder, .safetensors file, or embedded (default: {_DEFAULT_MODEL})", metavar="MODEL"),
        Flag(("--lora",), "adapter file or folder, with a weight; may be repeated", metavar="PATH[:W]", repeat=True, in_jobs=True),
        _switch("--allow-partial", "use an adapter of which only a part fits"),
        Flag(("--vae",), "another VAE: hub id, folder or .safetensors file", "model.vae", metavar="VAE"),
        Flag(("--architecture",), "folder or preset with the configs of an unusual single file", "model.architecture", metavar="FOLDER"),
        Flag(("--revision",), "branch, tag or commit of a hub model", "model.revision", metavar="REV"),
        _switch("--offline", "never touch the network", "model.offline"),
        _switch("--no-safety-checker", "draw without the safety checker that a model ships", "optimization.disable_safety_checker"),
    ),
    "machine": (
        Flag(("--device",), " | ".join(DEVICES), "model.device", metavar="NAME"),
        Flag(("--precision",), " | ".join(PRECISIONS), "model.precision", metavar="NAME", choices=PRECISIONS),
        Flag(("--max-vram",), "plan as if the card had this much, in GiB", "optimization.max_vram_gb", float, "GB"),
        _switch("--model-cpu-offload", "one component on the card at a time", "optimization.enable_model_cpu_offload"),
        _switch("--sequential-cpu-offload", "one layer on the card at a time: smallest, slowest", "optimization.enable_sequential_cpu_offload"),
        _switch("--attention-slicing", "for cards without an efficient kernel; slower elsewhere", "optimization.enable_attention_slicing"),
        _switch("--vae-slicing", "encode one picture at a time; decoding is one at a time in any case", "optimization.enable_vae_slicing"),
        _switch("--vae-tiling", "let the VAE work in tiles", "optimization.enable_vae_tiling"),
        _switch("--xformers", "xformers' attention kernels", "optimization.enable_xformers"),
        _switch("--torch-compile", "compile the U-Net; pays for many pictures", "optimization.enable_torch_compile"),
        _switch("--channels-last", "another memory layout of convolutions", "optimization.enable_channels_last"),
    ),
    "output": (
        Flag(("--output", "-o"), "folder for the pictures", "paths.outputs", metavar="DIR"),
        Flag(("--prefix",), "start of the file names", "paths.prefix", metavar="NAME"),
        _switch("--grid", "also a contact sheet of all pictures"),
        Flag(("--preview",), "write a small preview.png every N steps", kind=int, metavar="N"),
        _switch("--no-metadata", "do not store the recipe in the pictures"),
        _switch("--json", "one JSON line per picture on stdout"),
    ),
    "many jobs": (
        Flag(("--prompts",), "a job a line: a prompt, or flags such as --prompt \"a cat\" --seed 7; '-' reads stdin", metavar="FILE"),
        _switch("--redo", "draw jobs again that an earlier run finished"),
    ),
    "configuration": (
        Flag(("--config",), "preset or YAML file; may be repeated, the later wins", metavar="NAME|FILE", repeat=True),
        Flag(("--set",), "any setting, e.g. --set generation.steps=30", metavar="A.B=C", repeat=True),
    ),
    "information": (
        _switch("--estimate-vram", "say what the run would need and which plan it would take; loads nothing"),
        _switch("--list-schedulers", "print the samplers and presets"),
        _switch("--version", "print the version"),
        _switch("--verbose", "let the libraries' own messages through"),
        _switch("--debug", "show the traceback of an error"),
        Flag(("--help", "-h"), "print this", kind=None),
    ),
}  # fmt: skip

FLAG_OF = {name: flag for flags in FLAGS.values() for flag in flags for name in flag.names}
_FLAG_OF_DEST = {flag.dest: flag for flag in FLAG_OF.values()}
_LOOKS_LIKE_A_FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)


class _Parser(argparse.ArgumentParser):
    """argparse that raises our one-line error in place of its usage dump."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0]
            if flag.partition("=")[0] in FLAG_OF:
                raise usage_error(f"{flag} cannot differ from job to job; give it on the command line")
            close = difflib.get_close_matches(flag.partition("=")[0], FLAG_OF, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            quotes = " (a prompt of several words needs quotes)" if not flag.startswith("-") else ""
            raise usage_error(f"unknown argument '{flag}'{quotes}; {hint}")
        if found := re.match(r"argument ([^/:\s]+)[^:]*: (expected one|ignored explicit) argument", message):
            flag = FLAG_OF[found[1]]
            if found[2].startswith("ignored"):
                raise usage_error(f"{flag.names[0]} takes no value; write {flag.names[0]} alone")
            raise usage_error(f"{flag.names[0]}: its value is missing; write {flag.names[0]} {flag.metavar}")
        raise usage_error(f"{message}; see --help")


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """What was typed, and only that: ``{"generation.width": 768, "lora": [...], "prompt": ...}``."""
    return _parse(_build_parser(in_jobs=False), argv)


def parse_job(argv: Sequence[str]) -> dict[str, Any]:
    """The flags of one line of a job file. Raises UserError for one that cannot differ from job to job."""
    return _parse(_build_parser(in_jobs=True), argv)


def _parse(parser: _Parser, argv: Sequence[str]) -> dict[str, Any]:
    typed = vars(parser.parse_args(_normalise(argv)))
    if "words" in typed:
        words = typed.pop("words")
        if words is not None and "prompt" in typed:
            raise usage_error("the prompt is given twice: first and by --prompt; give it once")
        typed |= {"prompt": words} if words is not None else {}
    typed = {name: _convert(_FLAG_OF_DEST[name], value) for name, value in typed.items()}
    if "size" in typed:
        typed |= _parse_size(typed.pop("size"))
    return typed


def _normalise(argv: Sequence[str]) -> list[str]:
    """``--cfg_scale=7`` -> ``--cfg-scale=7``; a value that begins with "-" is tied to its flag: ``--negative=-blur``."""
    normal: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        before = FLAG_OF.get(normal[-1]) if normal else None
        is_flag = word == "--" or flag in FLAG_OF or _LOOKS_LIKE_A_FLAG.fullmatch(word) is not None
        if before is not None and before.takes_value and word.startswith("-") and not is_flag:
            normal[-1] += f"={word}"
        else:
            normal.append(flag.replace("_", "-") + equals + value if is_flag else word)
    return normal


def _convert(flag: Flag, value: Any) -> Any:
    """The text typed after a flag as the flag's type."""
    if flag.choices is not None and value not in flag.choices:
        *first, last = flag.choices
        raise usage_error(f"{flag.names[0]} {value}: choose {', '.join(first)} or {last}")
    if flag.kind not in (int, float):
        return value
    try:
        return flag.kind(value)
    except ValueError:
        wanted = "a whole number" if flag.kind is int else "a number"
        raise usage_error(f"{flag.names[0]} {value}: expected {wanted}") from None


def _parse_size(text: str) -> dict[str, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise usage_error(f"--size {text}: write it as WIDTHxHEIGHT, e.g. --size 768x512")
    return {"generation.width": int(width), "generation.height": int(height)}


def _build_parser(in_jobs: bool) -> _Parser:
    defaults = AppConfig().to_dict()
    parser = _Parser(
        prog="main.py", usage=USAGE, epilog=EPILOG, add_help=False, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=_HelpFormatter,
        description="Draw pictures from text with Stable Diffusion on a small graphics card or a plain CPU.",
    )  # fmt: skip
    parser.add_argument("words", nargs="?", metavar="PROMPT", default=None, help=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            if not in_jobs or flag.in_jobs:
                _add(group, flag, defaults)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def _add(group: argparse._ArgumentGroup, flag: Flag, defaults: dict[str, dict[str, Any]]) -> None:
    text = flag.help.replace("%", "%%")
    if flag.setting and flag.takes_value:
        section, _, key = flag.setting.partition(".")
        default = defaults[section][key]
        label = f", A1111's {find_sampler(default).label}" if key == "scheduler" else ""
        text += f" (default: {default}{label})" if default not in (None, "") else ""
    if not flag.takes_value:
        group.add_argument(*flag.names, dest=flag.dest, action="store_const", const=flag.value, help=text)
    else:
        action = "append" if flag.repeat else "store"
        group.add_argument(*flag.names, dest=flag.dest, metavar=flag.metavar, action=action, help=text)


def help_text() -> str:
    """What ``--help`` prints."""
    return _build_parser(in_jobs=False).format_help()


def build_config(typed: dict[str, Any], recipe_settings: dict[str, Any] | None = None) -> AppConfig:
    """Defaults < model preset < --config < recipe of --from-image < --preset < --set < flags.

    Of a preset named by ``--model`` the settings come first, so that a file can change them, and the model last: it is a flag.
    """
    model, presets = typed.get("model"), []
    if model in preset_names():
        presets = [PRESETS_FOLDER / f"{model}.yaml"]
        model = model_of_preset(model)
        if model is None:
            raise usage_error(
                f"--model {typed['model']}: that preset is a card size, not a model; use --config {typed['model']}"
            )
    config = load_config(*presets, *typed.get("config", []))
    for name, value in (recipe_settings or {}).items():
        set_value(config, f"generation.{name}", value)
    apply_typed(config, typed)
    if model is not None:
        config.model.model_id = model
    return config


def is_given(typed: dict[str, Any], setting: str) -> bool:
    """Whether a setting was chosen, by a flag, ``--set`` or a ``--config`` that holds it, and is not the default."""
    flag = "model" if setting == "model.model_id" else setting
    assigned = {full_name(parse_assignment(text)[0]) for text in typed.get("set", [])}
    return flag in typed or setting in assigned or any(setting in read_settings(item) for item in typed.get("config", []))


def apply_typed(config: AppConfig, typed: dict[str, Any]) -> None:
    """Put what was typed, on the command line or in a job line, over a configuration."""
    if "preset" in typed:
        apply_preset(config.generation, typed["preset"])
    for text in typed.get("set", []):
        set_value(config, *parse_assignment(text))
    for name, value in typed.items():
        if "." in name:
            set_value(config, name, value)
