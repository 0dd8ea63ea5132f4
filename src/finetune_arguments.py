"""The command line of finetune: its own flags beside those that it shares with train_lora, and what was typed as settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from src import train_arguments
from src.config import setting_names
from src.finetune_config import CAPTIONS, PARTS, FinetuneRun, check_finetune
from src.flags import CommandLine, Flag

USAGE = """python -m src.finetune --dataset-dir DIR [options]
       python -m src.finetune --dataset-dir DIR --resume
       accelerate launch --multi_gpu --num_processes 2 -m src.finetune --dataset-dir DIR [options]"""

EPILOG = """examples:
  python -m src.finetune --dataset-dir ./flickr30k --captions all --train cross-attention --max-steps 5000
  python -m src.finetune --dataset-dir ./data/train --model embedded --train all --crop 0.1 --colour 0.2 --flip
  python -m src.finetune --dataset-dir ./data/train --resume
  python -m src.finetune --model sd15 --train last-blocks --estimate-vram --max-vram 16

exit codes: 0 done, 1 failure, 2 wrong usage, 3 out of memory, 4 not found, 6 input refused, 7 the loss diverged,
            130 interrupted and 143 terminated (the training is saved; --resume goes on)"""

_OWN: dict[str, tuple[Flag, ...]] = {
    "data": (
        Flag(("--captions-file",), "table of captions, image,caption or image_name| comment_number| comment (default: found in the folder)", "train.captions_file", metavar="FILE"),
        Flag(("--captions",), "of several for a picture: random (one a visit) | all (a visit for each)", "train.captions", metavar="WHICH", choices=CAPTIONS),
        Flag(("--crop",), "cut up to this share of each side off, at random", "train.crop", float, "X"),
        Flag(("--colour", "--color"), "change brightness, contrast and saturation by up to this share", "train.colour", float, "X"),
        Flag(("--versions",), "random cuts and colours of each picture, kept in the cache (default: 4)", "train.versions", int, "N"),
    ),
    "what learns": (
        Flag(("--train",), " | ".join(PARTS) + ": the part of the U-Net", "train.part", metavar="PART", choices=PARTS),
    ),
    "judging": (
        Flag(("--validation-pictures",), "hold out at most so many", "train.validation_pictures", int, "N"),
    ),
}  # fmt: skip
# Said otherwise than for an adapter.
_WORDS = {
    "train.learning_rate": "of the U-Net (default: 1e-5; for prodigy 1)",
    "train.lr_warmup_steps": "steps until the full learning rate (default: a twentieth of them)",
    "train.weight_decay": "pulls the weights towards zero",
    "train.ema_decay": "save, judge and draw a moving average; none: the last step",
    "train.name": "of the training in its report",
    "train.seed": "of order, noise and versions",
    "train.keep": "newest checkpoints to keep, the best beside them",
    "train.sample_prompts": "prompt, or text file with one a line; may be repeated (default: the commonest caption)",
    "train.output_dir": "checkpoint-N/ and final/, a model folder, go there",
}
_NAMES_OF_SCORE = ("--no-score",)


def _groups() -> dict[str, tuple[Flag, ...]]:
    """train_lora's flags, as far as their settings exist here, and ours at the end of their groups."""
    known = set(setting_names(FinetuneRun()))
    groups = {}
    for title, flags in train_arguments.FLAGS.items():
        kept = [flag for flag in flags if (flag.setting is None or flag.setting in known) and flag.names != _NAMES_OF_SCORE]
        worded = [replace(flag, help=_WORDS.get(flag.setting or "", flag.help)) for flag in kept]
        worded = [replace(flag, kind=str) if flag.setting == "train.ema_decay" else flag for flag in worded]  # none is a value
        groups[title] = (*worded, *_OWN.get(title, ()))
    return groups


def _command_line() -> CommandLine:
    return CommandLine(
        _groups(), prog="finetune", usage=USAGE, epilog=EPILOG, defaults=FinetuneRun().to_dict(),
        description="Fine-tune a Stable Diffusion model's U-Net, or a part of it, on pictures with one or more captions each.",
    )  # fmt: skip


def help_text() -> str:
    """What ``--help`` prints."""
    return _command_line().help_text()


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """What was typed, and only that: ``{"train.part": "mid", "resume": True, ...}``. Raises UserError (usage)."""
    return _command_line().parse(argv)


apply_typed = partial(train_arguments.apply_typed, check=check_finetune)


def build_run(typed: dict[str, Any]) -> FinetuneRun:
    """Defaults < --config < --set < flags, checked. Raises UserError (usage, not found)."""
    run = FinetuneRun()
    apply_typed(run, typed)
    return run
