"""The command line: one table of flags, the parser made of it, and what was typed turned into settings.

A flag has no default: the dataclasses of config.py have it, and the help text reads it from there. ``--cfg-scale`` and
``--cfg_scale`` are the same flag.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from src.config import DEVICES, PRECISIONS, AppConfig, load_config, parse_assignment, preset_names, set_value
from src.errors import usage_error
from src.schedulers import PRESETS, apply_preset

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
        Flag(("--strength",), "0 keeps the picture, 1 ignores it", "generation.strength", float, "X", in_jobs=True),
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
        _switch("--vae-slicing", "let the VAE take one picture at a time", "optimization.enable_vae_slicing"),
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


class _Parser(argparse.ArgumentParser):
    """argparse that raises our one-line error in place of its usage dump."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0]
            known = [name for group in FLAGS.values() for item in group for name in item.names]
            if flag.partition("=")[0] in known:
                raise usage_error(f"{flag} cannot differ from job to job; give it on the command line")
            close = difflib.get_close_matches(flag.partition("=")[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            quotes = " (a prompt of several words needs quotes)" if not flag.startswith("-") else ""
            raise usage_error(f"unknown argument '{flag}'{quotes}; {hint}")
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
    if "size" in typed:
        typed |= _parse_size(typed.pop("size"))
    return typed


def _normalise(argv: Sequence[str]) -> list[str]:
    """``--cfg_scale=7`` -> ``--cfg-scale=7``; values are left alone."""
    normal = []
    for word in argv:
        flag, equals, value = word.partition("=")
        known = flag.startswith("--") and " " not in flag
        normal.append(flag.replace("_", "-") + equals + value if known else word)
    return normal


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
    if flag.setting and flag.kind is not None:
        section, _, key = flag.setting.partition(".")
        default = defaults[section][key]
        text += f" (default: {default})" if default not in (None, "") else ""
    if flag.kind is None:
        group.add_argument(*flag.names, dest=flag.dest, action="store_const", const=flag.value, help=text)
    else:
        action = "append" if flag.repeat else "store"
        group.add_argument(
            *flag.names, dest=flag.dest, type=flag.kind, metavar=flag.metavar, action=action, choices=flag.choices, help=text
        )


def help_text() -> str:
    """What ``--help`` prints."""
    return _build_parser(in_jobs=False).format_help()


def build_config(typed: dict[str, Any], recipe_settings: dict[str, Any] | None = None) -> AppConfig:
    """Defaults < model preset < --config < recipe of --from-image < --preset < --set < flags."""
    model = typed.get("model")
    is_preset = model in preset_names()
    config = load_config(*([model] if is_preset else []), *typed.get("config", []))
    if model is not None and not is_preset:
        config.model.model_id = model
    for name, value in (recipe_settings or {}).items():
        set_value(config, f"generation.{name}", value)
    apply_typed(config, typed)
    return config


def apply_typed(config: AppConfig, typed: dict[str, Any]) -> None:
    """Put what was typed, on the command line or in a job line, over a configuration."""
    if "preset" in typed:
        apply_preset(config.generation, typed["preset"])
    for text in typed.get("set", []):
        set_value(config, *parse_assignment(text))
    for name, value in typed.items():
        if "." in name:
            set_value(config, name, None if name == "generation.seed" and value == -1 else value)
