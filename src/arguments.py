"""The command line of main.py: its table of flags, and what was typed turned into settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src.config import (
    DEVICES,
    MEMORY_MODES,
    PRECISIONS,
    PRESETS_FOLDER,
    QUANTIZATIONS,
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
from src.flags import CommandLine, Flag, switch
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
        switch("--no-prompt-weights", "take brackets in the prompt literally", "generation.prompt_weights", False, in_jobs=True),
        Flag(("--clip-skip",), "A1111's count: 1 last layer, 2 the one before", "generation.clip_skip", int, "N", in_jobs=True),
    ),
    "how to sample": (
        Flag(("--steps", "--num-inference-steps"), "denoising steps", "generation.num_inference_steps", int, "N", in_jobs=True),
        Flag(("--cfg", "--cfg-scale", "--guidance-scale"), "how strictly the prompt is followed", "generation.guidance_scale", float, "X", in_jobs=True),
        Flag(("--scheduler", "--sampler", "--sampler-name"), "see --list-schedulers", "generation.scheduler", metavar="NAME", in_jobs=True),
        Flag(("--preset",), "steps, guidance and spacing of a few-step model: " + ", ".join(PRESETS), metavar="NAME", in_jobs=True),
    ),
    "faster, for a price (docs/drawing.md)": (
        Flag(("--deep-cache",), "one step in N is whole, the others run the U-Net's outermost layers; try 2", "generation.deep_cache", int, "N", in_jobs=True),
        Flag(("--token-merging",), "share of tokens that self-attention takes together, up to 0.75; try 0.5", "generation.token_merging", float, "R", in_jobs=True),
        Flag(("--guidance-interval",), "guide in this part of the noise schedule alone, 0 being noise; try 0:0.6", metavar="A:B", in_jobs=True),
    ),
    "start from a picture": (
        Flag(("--init-image", "-i"), "draw over this picture", metavar="FILE", in_jobs=True),
        Flag(("--strength",), "how much is redrawn: near 0 keeps the picture, 1 hardly anything of it", "generation.strength", float, "X", in_jobs=True),
        Flag(("--mask",), "repaint only where this picture is white", metavar="FILE", in_jobs=True),
        Flag(("--from-image",), "draw a picture again from the recipe it carries; other flags win", metavar="FILE"),
    ),
    "model": (
        Flag(("--model", "-m"), f"preset name, hub id, diffusers folder, .safetensors file, or embedded (default: {_DEFAULT_MODEL})", metavar="MODEL"),
        Flag(("--lora",), "adapter file or folder, with a weight; may be repeated", metavar="PATH[:W]", repeat=True, in_jobs=True),
        switch("--allow-partial", "use an adapter of which only a part fits"),
        Flag(("--vae",), "another VAE: hub id, folder or .safetensors file", "model.vae", metavar="VAE"),
        Flag(("--architecture",), "folder or preset with the configs of an unusual single file", "model.architecture", metavar="FOLDER"),
        Flag(("--revision",), "branch, tag or commit of a hub model", "model.revision", metavar="REV"),
        switch("--offline", "never touch the network", "model.offline"),
        switch("--no-safety-checker", "draw without the safety checker that a model ships", "optimization.disable_safety_checker"),
    ),
    "machine": (
        Flag(("--device",), " | ".join(DEVICES), "model.device", metavar="NAME"),
        Flag(("--precision",), " | ".join(PRECISIONS), "model.precision", metavar="NAME", choices=PRECISIONS),
        Flag(("--memory",), "what lies on the card: fast all, balanced a component, low a block, minimal a layer; auto the fastest that fits", "optimization.memory", metavar="MODE", choices=MEMORY_MODES),
        switch("--medvram", "A1111's name for --memory balanced"),
        switch("--lowvram", "A1111's name for --memory low"),
        Flag(("--quantize",), " | ".join(QUANTIZATIONS) + ": the U-Net's matrices in fewer bits (bitsandbytes); the pictures change", "optimization.quantize", metavar="NAME", choices=QUANTIZATIONS),
        Flag(("--max-vram",), "plan for this much of the card, in GiB, and keep to it", "optimization.max_vram_gb", float, "GB"),
        switch("--model-cpu-offload", "one component on the card at a time", "optimization.enable_model_cpu_offload"),
        switch("--sequential-cpu-offload", "one layer on the card at a time: smallest, slowest", "optimization.enable_sequential_cpu_offload"),
        switch("--attention-slicing", "for cards without an efficient kernel; slower elsewhere", "optimization.enable_attention_slicing"),
        switch("--vae-slicing", "without effect: pictures are encoded and decoded one at a time in any case", "optimization.enable_vae_slicing"),
        switch("--vae-tiling", "let the VAE work in tiles", "optimization.enable_vae_tiling"),
        switch("--xformers", "xformers' attention kernels", "optimization.enable_xformers"),
        switch("--torch-compile", "compile the U-Net; pays for many pictures", "optimization.enable_torch_compile"),
        switch("--channels-last", "another memory layout of convolutions", "optimization.enable_channels_last"),
    ),
    "output": (
        Flag(("--output", "-o"), "folder for the pictures", "paths.outputs", metavar="DIR"),
        Flag(("--prefix",), "start of the file names", "paths.prefix", metavar="NAME"),
        switch("--grid", "also a contact sheet of all pictures"),
        Flag(("--preview",), "write a small preview.png every N steps", kind=int, metavar="N"),
        switch("--no-metadata", "do not store the recipe in the pictures"),
        switch("--json", "one JSON line per picture on stdout"),
    ),
    "many jobs": (
        Flag(("--prompts",), "a job a line: a prompt, or flags such as --prompt \"a cat\" --seed 7; '-' reads stdin", metavar="FILE"),
        switch("--redo", "draw jobs again that an earlier run finished; after an interruption go on without it"),
    ),
    "configuration": (
        Flag(("--config",), "preset or YAML file; may be repeated, the later wins", metavar="NAME|FILE", repeat=True),
        Flag(("--set",), "any setting, e.g. --set generation.steps=30", metavar="A.B=C", repeat=True),
    ),
    "information": (
        switch("--estimate-vram", "say what the run would need and which plan it would take; loads nothing"),
        switch("--list-schedulers", "print the samplers and presets"),
        switch("--version", "print the version"),
        switch("--verbose", "let the libraries' own messages through"),
        switch("--debug", "show the traceback of an error"),
        Flag(("--help", "-h"), "print this", kind=None),
    ),
}  # fmt: skip

_MODE_FLAGS = {"medvram": "balanced", "lowvram": "low"}
FLAG_OF = {name: flag for flags in FLAGS.values() for flag in flags for name in flag.names}
JOB_FLAGS = {title: [flag for flag in flags if flag.in_jobs] for title, flags in FLAGS.items()}


def _command_line(in_jobs: bool) -> CommandLine:
    return CommandLine(
        JOB_FLAGS if in_jobs else FLAGS,
        prog="main.py", usage=USAGE, epilog=EPILOG, words="PROMPT",
        description="Draw pictures from text with Stable Diffusion on a small graphics card or a plain CPU.",
        defaults=AppConfig().to_dict(), elsewhere=FLAG_OF if in_jobs else {}, default_note=_sampler_label,
    )  # fmt: skip


def _sampler_label(flag: Flag) -> str:
    if flag.setting != "generation.scheduler":
        return ""
    return f", A1111's {find_sampler(AppConfig().generation.scheduler).label}"


def help_text() -> str:
    """What ``--help`` prints."""
    return _command_line(in_jobs=False).help_text()


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """What was typed, and only that: ``{"generation.width": 768, "lora": [...], "prompt": ...}``."""
    return _parse(_command_line(in_jobs=False), argv)


def parse_job(argv: Sequence[str]) -> dict[str, Any]:
    """The flags of one line of a job file. Raises UserError for one that cannot differ from job to job."""
    return _parse(_command_line(in_jobs=True), argv)


def _parse(command_line: CommandLine, argv: Sequence[str]) -> dict[str, Any]:
    typed = command_line.parse(argv)
    if "words" in typed and "prompt" in typed:
        raise usage_error("the prompt is given twice: first and by --prompt; give it once")
    if "words" in typed:
        typed["prompt"] = typed.pop("words")
    return settle(typed)


def settle(typed: dict[str, Any]) -> dict[str, Any]:
    """Flags that mean several settings, as those settings; ``typed`` is changed. Raises UserError (usage)."""
    _settle_mode(typed)
    if "size" in typed:
        for name in ("width", "height"):
            if f"generation.{name}" in typed:
                raise usage_error(f"--size {typed['size']} and --{name} say the same; give one of them")
        typed |= _parse_size(typed.pop("size"))
    if "guidance_interval" in typed:
        typed |= parse_interval(typed.pop("guidance_interval"))
    return typed


def _settle_mode(typed: dict[str, Any]) -> None:
    """A1111's flags as the modes that they mean. Raises UserError (usage) for two that differ."""
    found = {f"--{flag}": mode for flag, mode in _MODE_FLAGS.items() if typed.pop(flag, False)}
    if "optimization.memory" in typed:
        found["--memory"] = typed["optimization.memory"]
    if len(set(found.values())) > 1:
        raise usage_error(f"{' and '.join(found)} contradict each other; give one of them")
    if found:
        typed["optimization.memory"] = next(iter(found.values()))


def _parse_size(text: str) -> dict[str, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise usage_error(f"--size {text}: write it as WIDTHxHEIGHT, e.g. --size 768x512")
    return {"generation.width": int(width), "generation.height": int(height)}


def parse_interval(text: str) -> dict[str, float]:
    """``0.2:0.8`` as settings. Raises UserError (usage)."""
    start, colon, end = text.partition(":")
    try:
        if colon:
            return {"generation.guidance_start": float(start), "generation.guidance_end": float(end)}
    except ValueError:
        pass
    raise usage_error(f"--guidance-interval {text}: write it as START:END, e.g. --guidance-interval 0.2:0.8")


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
