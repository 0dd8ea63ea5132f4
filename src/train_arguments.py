"""The command line of train_lora: its table of flags, and what was typed turned into settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from src.config import (
    DEVICES,
    QUANTIZATIONS,
    full_name,
    model_of_preset,
    parse_assignment,
    preset_names,
    read_settings,
    set_from,
    set_value,
)
from src.errors import not_found, usage_error
from src.flags import CommandLine, Flag, switch
from src.prompts import clean_prompt, extract_loras
from src.train_config import (
    FORMATS,
    LR_SCHEDULERS,
    MIXED_PRECISIONS,
    OPTIMIZERS,
    PRIOR_TARGETS,
    TARGETS,
    TRACKERS,
    TrainRun,
    check,
    other_adapter,
)

USAGE = """python -m src.train_lora --dataset_dir DIR [options]
       python -m src.train_lora --dataset_dir DIR --resume
       accelerate launch --multi_gpu --num_processes 2 -m src.train_lora --dataset_dir DIR [options]"""

EPILOG = """examples:
  python -m src.train_lora --dataset_dir ./data/train --max_steps 1000 --rank 4 --lr 1e-4
  python -m src.train_lora --config configs/train/sdxl-8gb.yaml --set train.rank=16
  python -m src.train_lora --dataset_dir ./data/train --resume
  python -m src.train_lora --dataset_dir ./data/train --model sdxl --estimate-vram --max-vram 8

exit codes: 0 done, 1 failure, 2 wrong usage, 3 out of memory, 4 not found, 6 input refused, 7 the loss diverged,
            130 interrupted and 143 terminated (the adapter is saved; --resume goes on)"""

_DEFAULT_MODEL = TrainRun().model.model_id

FLAGS: dict[str, tuple[Flag, ...]] = {
    "data": (
        Flag(("--dataset-dir", "--dataset"), "folder of pictures with captions", "train.dataset_dir", metavar="DIR"),
        Flag(("--resolution", "--size"), "pixels, a multiple of 8 (default: the model's own size)", "train.resolution", int, "PX"),
        switch("--no-buckets", "crop all pictures to a square", "train.buckets", False),
        switch("--flip", "mirror half of the pictures", "train.flip"),
        Flag(("--caption-dropout",), "share of examples trained without caption", "train.caption_dropout", float, "X"),
        switch("--masked-loss", "weigh the loss by NAME-masklabel.png beside NAME.png", "train.masked_loss"),
        Flag(("--class-prompt",), "prior preservation: what the subject is, e.g. \"a photo of a dog\"", "train.class_prompt", metavar="TEXT"),
        Flag(("--class-dir",), "pictures of the class; missing ones are drawn", "train.class_dir", metavar="DIR"),
        Flag(("--num-class-images",), "how many of them", "train.num_class_images", int, "N"),
        Flag(("--prior-target",), "what they teach: model (what it predicted before) | noise (as other pictures)", "train.prior_target", metavar="WHAT", choices=PRIOR_TARGETS),
    ),
    "model": (
        Flag(("--model", "-m"), f"preset name, hub id, diffusers folder, .safetensors file, or embedded (default: {_DEFAULT_MODEL})", metavar="MODEL"),
        Flag(("--vae",), "another VAE: hub id, folder or .safetensors file", "model.vae", metavar="VAE"),
        Flag(("--revision",), "branch, tag or commit of a hub model", "model.revision", metavar="REV"),
        switch("--offline", "never touch the network", "model.offline"),
    ),
    "what learns": (
        Flag(("--targets",), " | ".join(TARGETS), "train.targets", metavar="SET", choices=TARGETS),
        Flag(("--rank",), "numbers per row and column of a layer", "train.rank", int, "N"),
        Flag(("--alpha",), "strength is alpha / rank (default: the rank)", "train.alpha", float, "X"),
        Flag(("--dropout",), "of the adapter's input", "train.dropout", float, "X"),
        switch("--rslora", "strength is alpha / sqrt(rank)", "train.use_rslora"),
        switch("--dora", "learn lengths and directions apart", "train.use_dora"),
        switch("--train-text-encoder", "let the text encoders learn, too", "train.train_text_encoder"),
    ),
    "loss": (
        Flag(("--snr-gamma",), "min-SNR weighting; none: all timesteps alike", "train.snr_gamma", metavar="X"),
        Flag(("--noise-offset",), "for very dark and very bright pictures", "train.noise_offset", float, "X"),
        switch("--zero-terminal-snr", "the last timestep is pure noise; v-prediction alone", "train.zero_terminal_snr"),
    ),
    "loop": (
        Flag(("--max-steps", "--max-train-steps", "--steps"), "optimizer steps (default: 1000)", "train.max_steps", int, "N"),
        Flag(("--num-epochs", "--epochs"), "in place of --max_steps: passes over the pictures", "train.num_epochs", int, "N"),
        Flag(("--batch-size", "--train-batch-size"), "pictures at once, per process", "train.batch_size", int, "N"),
        Flag(("--gradient-accumulation", "--gradient-accumulation-steps"), "micro-steps per step", "train.gradient_accumulation_steps", int, "N"),
        Flag(("--lr", "--learning-rate"), "of the U-Net (default: 1e-4; for prodigy 1)", "train.learning_rate", float, "X"),
        Flag(("--text-encoder-lr",), "of the text encoders", "train.text_encoder_learning_rate", float, "X"),
        Flag(("--text-encoder-2-lr",), "of SDXL's second (default: that of the first)", "train.text_encoder_2_learning_rate", float, "X"),
        Flag(("--optimizer",), " | ".join(OPTIMIZERS), "train.optimizer", metavar="NAME", choices=OPTIMIZERS),
        Flag(("--weight-decay",), "pulls the adapter towards zero", "train.weight_decay", float, "X"),
        Flag(("--lr-scheduler",), " | ".join(LR_SCHEDULERS), "train.lr_scheduler", metavar="NAME", choices=LR_SCHEDULERS),
        Flag(("--lr-warmup-steps",), "steps until the full learning rate", "train.lr_warmup_steps", int, "N"),
        Flag(("--max-grad-norm",), "longer gradients are shortened to this", "train.max_grad_norm", float, "X"),
        Flag(("--ema-decay",), "save a moving average, e.g. 0.999", "train.ema_decay", float, "X"),
        Flag(("--seed",), "of order, noise and first weights", "train.seed", int, "N"),
    ),
    "machine": (
        Flag(("--device",), " | ".join(DEVICES), "model.device", metavar="NAME"),
        Flag(("--mixed-precision",), " | ".join(MIXED_PRECISIONS), "train.mixed_precision", metavar="NAME", choices=MIXED_PRECISIONS),
        switch("--gradient-checkpointing", "less memory, a third slower (default: where the plan needs it)", "train.gradient_checkpointing"),
        switch("--no-gradient-checkpointing", "never", "train.gradient_checkpointing", False),
        Flag(("--quantize",), " | ".join(QUANTIZATIONS) + ": the frozen U-Net in fewer bits", "train.quantize", metavar="NAME", choices=QUANTIZATIONS),
        Flag(("--max-vram",), "plan as if the card had this much, in GiB", "train.max_vram_gb", float, "GB"),
    ),
    "checkpoints": (
        Flag(("--output-dir", "--output", "-o"), "checkpoint-N/ and final/ go there", "train.output_dir", metavar="DIR"),
        Flag(("--name",), "of the adapter in its headers", "train.name", metavar="NAME"),
        Flag(("--checkpoint-steps", "--checkpointing-steps"), "steps between checkpoints", "train.checkpoint_steps", int, "N"),
        Flag(("--keep",), "newest checkpoints to keep, the best beside them (default: all)", "train.keep", int, "N"),
        Flag(("--format",), " | ".join(FORMATS) + ": kohya adds a file for A1111 and ComfyUI", "train.format", metavar="NAME", choices=FORMATS),
        switch("--resume", "go on from the newest valid checkpoint"),
        switch("--force", "resume although settings have changed"),
        switch("--strict-resume", "refuse when the newest checkpoint is damaged, in place of taking the one before"),
    ),
    "judging": (
        Flag(("--validation-every",), "hold out every n-th picture; 0: none (default: 10)", "train.validation_every", int, "N"),
        Flag(("--validation-steps",), "steps between validations (default: --checkpoint_steps)", "train.validation_steps", int, "N"),
        switch("--no-samples", "draw no pictures while training", "train.samples", False),
        Flag(("--sample-prompts", "--sample-prompt"), "prompt, or text file with one a line; may be repeated (default: one with the trigger)", "train.sample_prompts", metavar="TEXT|FILE", repeat=True),
        Flag(("--sample-seed",), "of the sample pictures", "train.sample_seed", int, "N"),
        switch("--no-score", "do not judge checkpoints by CLIP features", "train.score", False),
        Flag(("--tracker",), " | ".join(TRACKERS), "train.tracker", metavar="NAME", choices=TRACKERS),
    ),
    "configuration": (
        Flag(("--config",), "YAML file or train/NAME; may be repeated, the later wins", metavar="FILE", repeat=True),
        Flag(("--set",), "any setting, e.g. --set train.rank=16", metavar="A.B=C", repeat=True),
    ),
    "information": (
        switch("--estimate-vram", "say what the training would need; loads nothing"),
        switch("--json", "with --estimate-vram: as JSON"),
        switch("--verbose", "let the libraries' own messages through"),
        switch("--debug", "show the traceback of an error"),
        Flag(("--help", "-h"), "print this", kind=None),
    ),
}  # fmt: skip


def _command_line() -> CommandLine:
    return CommandLine(
        FLAGS, prog="train_lora", usage=USAGE, epilog=EPILOG, defaults=TrainRun().to_dict(),
        description="Teach a Stable Diffusion model a new subject or style: train a LoRA on a few pictures.",
    )  # fmt: skip


def help_text() -> str:
    """What ``--help`` prints."""
    return _command_line().help_text()


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """What was typed, and only that: ``{"train.rank": 8, "resume": True, ...}``. Raises UserError (usage)."""
    return _command_line().parse(argv)


def build_run(typed: dict[str, Any]) -> TrainRun:
    """Defaults < --config < --set < flags, checked. A preset named by ``--model`` stands for its model.

    Raises UserError (usage, not found).
    """
    run = TrainRun()
    apply_typed(run, typed)
    return run


def apply_typed(run: TrainRun, typed: dict[str, Any], check: Callable[[Any], None] = check) -> None:
    """Put what was typed over the settings of a run, and check them. Raises UserError (usage, not found)."""
    stored_prompts = run.train.sample_prompts
    for file in typed.get("config", []):
        _make_way(run.train, read_settings(file))
        set_from(run, file)
    assignments = [parse_assignment(text) for text in typed.get("set", [])]
    flags = [(name, value) for name, value in typed.items() if "." in name]
    for level in (assignments, flags):
        _make_way(run.train, [name for name, _ in level])
        for name, value in level:
            set_value(run, name, value)
    if typed.get("train.class_prompt") == "":
        run.train.class_prompt = ""  # which is an error, while an empty setting in a file means none
    if "model" in typed:
        run.model.model_id = _model_id(typed["model"])
    if run.train.sample_prompts is not stored_prompts:  # those of a checkpoint were read once: one may end in .txt by itself
        run.train.sample_prompts = read_prompts(run.train.sample_prompts)
    for prompt in run.train.sample_prompts:
        if tags := extract_loras(clean_prompt(prompt))[1]:
            raise other_adapter(tags[0].name)
    check(run)


def _make_way(train: Any, names: Iterable[str]) -> None:
    """Steps that are named take the place of epochs of the level before, and epochs of steps; both at once contradict."""
    lengths = {full_name(name) for name in names} & {"train.max_steps", "train.num_epochs"}
    if lengths == {"train.max_steps"}:
        train.num_epochs = None
    if lengths == {"train.num_epochs"}:
        train.max_steps = None


def _model_id(name: str) -> str:
    if name not in preset_names():
        return name
    model = model_of_preset(name)
    if model is None:
        raise usage_error(f"--model {name}: that preset is a card size, not a model; use --max-vram")
    return model


def read_prompts(values: Sequence[str]) -> tuple[str, ...]:
    """Prompts as they are, and the lines of text files that are named among them. Raises UserError (usage, not found)."""
    prompts: list[str] = []
    for value in values:
        if not value.lower().endswith(".txt"):
            prompts.append(value)
            continue
        try:
            prompts += Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise usage_error(f"{value}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
        except OSError as error:
            raise not_found(f"{value}: cannot be read ({error.strerror}); check the path of --sample_prompts") from None
    return tuple(prompt.strip() for prompt in prompts if prompt.strip())
