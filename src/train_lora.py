"""The door of ``python -m src.train_lora``: reads what was typed, checks what can be checked, and only then imports torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import model_source
from src.checkpoints import Checkpoint, CheckpointFolder, read_manifest
from src.config import set_value, setting_names
from src.dataset import Dataset, read_dataset
from src.doors import answer
from src.errors import ExitCode, UserError, not_found, refused, usage_error
from src.estimate import find_model
from src.terminal import Terminal
from src.train_arguments import apply_typed, build_run, help_text, parse_arguments
from src.train_config import DEFAULT_STEPS, TrainRun

# What may differ after a resume without being named: it does not change what is learnt.
FREE_SETTINGS = {
    "train.max_steps", "train.num_epochs", "train.output_dir", "train.name", "train.format", "train.keep",
    "train.checkpoint_steps", "train.validation_steps", "train.samples", "train.sample_prompts", "train.sample_inference_steps",
    "train.sample_guidance_scale", "train.sample_seed", "train.score", "train.tracker", "train.max_vram_gb",
    "train.dataset_dir", "train.class_dir", "train.gradient_checkpointing", "model.offline", "model.device",
    "paths.cache", "paths.lora", "paths.outputs", "paths.prefix",
}  # fmt: skip


# What the tensors of a checkpoint follow from: another value is another adapter or another optimizer.
FIXED_SETTINGS = {"train.rank", "train.targets", "train.use_dora", "train.train_text_encoder", "train.optimizer"}


def main(argv: Sequence[str]) -> int:
    """Run the training and return the exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, "interrupted; if a checkpoint has been saved, --resume goes on from it", as_json="--json" in argv)


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    typed = parse_arguments(argv)
    if "help" in typed:
        print(help_text())
        return ExitCode.OK
    run = build_run(typed)
    if "estimate_vram" in typed:
        from src.training_memory import estimate

        result = estimate(run)
        print(json.dumps(result.as_json()) if terminal.as_json else result.text())
        return ExitCode.OK
    say = terminal.say
    store = CheckpointFolder(Path(run.train.output_dir).expanduser(), say)
    with store.lock() if terminal.processes.is_first else contextlib.nullcontext():
        checkpoint = _find_checkpoint(store, typed)
        if checkpoint is not None:
            run = _resumed_run(checkpoint, typed)
            if _is_finished(run, checkpoint, store):
                constant = run.train.lr_scheduler == "constant"
                stretch = "" if constant else " --force, along a learning rate stretched to that,"
                say(f"{store.root}: all {checkpoint.step} steps are done; --max_steps N{stretch} trains on to step N")
                return ExitCode.OK
        dataset = _read_early(run)

        from src import quiet

        quiet.silence_libraries(verbose="verbose" in typed)
        from src.training.trainer import Trainer  # torch: seconds, paid only when all that was typed is right

        return Trainer(run, terminal, dataset).train(store, checkpoint, force="force" in typed)


def _find_checkpoint(store: CheckpointFolder, typed: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new training, which never writes over another."""
    newest = store.newest(strict="strict_resume" in typed)
    if "resume" in typed or "strict_resume" in typed:
        if newest is None:
            raise not_found(f"{store.root}: holds no whole checkpoint to resume from; start without --resume")
        return newest
    if newest is not None:
        raise usage_error(
            f"{store.root}: holds a training already ({newest.folder.name}); --resume goes on with it, "
            "--output_dir names another folder"
        )
    if left := [name for name in ("final", "best") if os.path.lexists(store.root / name)]:
        raise usage_error(
            f"{store.root}: holds an adapter ({' and '.join(left)}) that a new training would replace; --output_dir names "
            "another folder, or move it away"
        )
    return None


def _resumed_run(checkpoint: Checkpoint, typed: dict[str, Any]) -> TrainRun:
    """The settings of the checkpoint, and over them what was typed now. Raises UserError (usage) naming what differs."""
    before, now = _stored_run(checkpoint), _stored_run(checkpoint)
    named = {*typed, *(text.partition("=")[0].strip() for text in typed.get("set", ()))}
    if "train.max_steps" in named:
        now.train.num_epochs = None
    if "train.num_epochs" in named:
        now.train.max_steps = None
    apply_typed(now, typed)
    free = set(FREE_SETTINGS)
    if before.train.lr_scheduler != "constant":  # the curve is stretched over all steps
        free -= {"train.max_steps", "train.num_epochs"}
    changed = [
        f"{name} {old} -> {new}"
        for name in setting_names(now)
        if name not in free and (old := _get(before, name)) != (new := _get(now, name))
    ]
    fixed = [line for line in changed if line.split()[0] in FIXED_SETTINGS]
    if fixed:
        raise usage_error(
            f"--resume: cannot go on from {checkpoint.folder.name} with {', '.join(fixed)}; leave that out, or start anew with "
            "another --output_dir"
        )
    if changed and "force" not in typed:
        raise usage_error(
            f"--resume: other settings than those of {checkpoint.folder.name}: {', '.join(changed)}; "
            "leave them out, or --force goes on with them"
        )
    return now


def _is_finished(run: TrainRun, checkpoint: Checkpoint, store: CheckpointFolder) -> bool:
    """Whether all steps are done and ``final/`` is theirs; without that, it is still to be published."""
    steps = run.train.max_steps or (DEFAULT_STEPS if run.train.num_epochs is None else None)
    if steps is None or checkpoint.step < steps:
        return False
    try:
        return read_manifest(store.root / "final").step == checkpoint.step
    except UserError:
        return False


def _stored_run(checkpoint: Checkpoint) -> TrainRun:
    run = TrainRun()
    try:
        for section, values in checkpoint.facts["run"].items():
            for key, value in values.items():
                set_value(run, f"{section}.{key}", value)
    except (KeyError, AttributeError, TypeError, UserError) as error:
        raise refused(f"{checkpoint.folder}: its settings are those of another version ({error}); start anew") from None
    return run


def _get(run: TrainRun, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(run, section), key)


def _read_early(run: TrainRun) -> Dataset | None:
    """Find the model and read the pictures' headers and captions before torch is imported, where the model's size is known.

    None for a hub model that has to be fetched first: then the trainer reads them.
    """
    config = run.app_config()
    cache = run.paths.folder("cache")
    source = model_source.resolve(
        run.model.model_id, cache, run.model.offline, revision=run.model.revision, include_safety_checker=False
    )
    folder = Path(run.train.dataset_dir).expanduser()
    if not folder.is_dir():
        raise not_found(f"{folder}: no such folder; make one with python -m src.prepare_dataset --src PHOTOS --dst {folder}")
    if source.path is None:
        return None
    shapes = find_model(config)[1]
    levels = len(shapes.unet["block_out_channels"]) - 1
    return read_dataset(
        folder, run.train.resolution or shapes.native_px, step_px=shapes.latent_scale * 2**levels,
        buckets=run.train.buckets, validation_every=run.train.validation_every, masked=run.train.masked_loss,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
