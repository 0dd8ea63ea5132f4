"""What the doors of the trainings do before torch is imported: find a checkpoint, compare settings, read the pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from src import files, model_source
from src.captions import find_caption_table
from src.checkpoints import Checkpoint, CheckpointFolder, read_manifest
from src.config import set_value, setting_names
from src.dataset import Dataset, read_dataset
from src.errors import UserError, not_found, refused, usage_error
from src.estimate import find_model
from src.processes import ONE_ALONE, is_one_of_many_wanted
from src.saved_datasets import unpacked
from src.train_config import DEFAULT_STEPS, TrainRun
from src.unet_parts import part_numbers

Run = TypeVar("Run", bound=TrainRun)

# What may differ after a resume without being named: it does not change what is learnt.
FREE_SETTINGS = {
    "train.max_steps", "train.num_epochs", "train.output_dir", "train.name", "train.keep",
    "train.checkpoint_steps", "train.validation_steps", "train.samples", "train.sample_prompts", "train.sample_inference_steps",
    "train.sample_guidance_scale", "train.sample_seed", "train.score", "train.tracker", "train.max_vram_gb",
    "train.dataset_dir", "train.gradient_checkpointing", "model.offline", "model.device",
    "paths.cache", "paths.lora", "paths.outputs", "paths.prefix",
}  # fmt: skip


def opened(
    store: CheckpointFolder,
    typed: Mapping[str, Any],
    run: Run,
    resumed: Callable[[Checkpoint], Run],
    result: str,
    say: Callable[[str], None],
) -> tuple[Run, Checkpoint | None, Dataset | None] | None:
    """The settings to train with, the checkpoint to go on from, and the pictures; None where all is done, which is said.

    ``resumed``: a checkpoint -> the settings to go on with. ``result``: what the training makes, in words.
    """
    if is_one_of_many_wanted():
        say(ONE_ALONE)
    checkpoint = find_checkpoint(store, typed, result)
    if checkpoint is not None:
        run = resumed(checkpoint)
        if line := done_line(run, checkpoint, store):
            say(line)
            return None
    return run, checkpoint, read_early(run, say)


def find_checkpoint(store: CheckpointFolder, typed: Mapping[str, Any], result: str) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new training, which never writes over another. ``result``: what that makes."""
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
            f"{store.root}: holds {result} ({' and '.join(left)}) that a new training would replace; --output_dir names "
            "another folder, or move it away"
        )
    return None


def resumed_run(
    checkpoint: Checkpoint,
    typed: Mapping[str, Any],
    kind: type[Run],
    apply_typed: Callable[[Run, Mapping[str, Any]], None],
    free: Collection[str],
    fixed: Collection[str],
) -> Run:
    """The settings of the checkpoint, and over them what was typed now. Raises UserError (usage) naming what differs.

    ``free`` settings may differ, ``fixed`` ones never: what the tensors of a checkpoint follow from.
    """
    before, now = stored_run(checkpoint, kind), stored_run(checkpoint, kind)
    apply_typed(now, typed)
    free = set(free)
    if before.train.lr_scheduler != "constant":  # the curve is stretched over all steps
        free -= {"train.max_steps", "train.num_epochs"}
    changed = [
        f"{name} {old} -> {new}"
        for name in setting_names(now)
        if name not in free and (old := value_of(before, name)) != (new := value_of(now, name))
    ]
    if refused_ones := [line for line in changed if line.split()[0] in fixed]:
        raise usage_error(
            f"--resume: cannot go on from {checkpoint.folder.name} with {', '.join(refused_ones)}; leave that out, or start "
            "anew with another --output_dir"
        )
    if changed and "force" not in typed:
        raise usage_error(
            f"--resume: other settings than those of {checkpoint.folder.name}: {', '.join(changed)}; "
            "leave them out, or --force goes on with them"
        )
    return now


def done_line(run: TrainRun, checkpoint: Checkpoint, store: CheckpointFolder) -> str | None:
    """What to say where all steps are done and ``final/`` is theirs; None: without that, it is still to be published."""
    steps = run.train.max_steps or (DEFAULT_STEPS if run.train.num_epochs is None else None)
    if steps is None or checkpoint.step < steps:
        return None
    stored = stored_run(checkpoint, type(run)).train
    if any(getattr(run.train, name, None) != getattr(stored, name, None) for name in ("name", "format")):
        return None  # the result is to be written anew
    try:
        if read_manifest(store.root / "final").step != checkpoint.step:
            return None
    except UserError:
        return None
    stretch = "" if run.train.lr_scheduler == "constant" else " --force, along a learning rate stretched to that,"
    return f"{store.root}: all {checkpoint.step} steps are done; --max_steps N{stretch} trains on to step N"


def stored_run(checkpoint: Checkpoint, kind: type[Run]) -> Run:
    """The settings that a checkpoint was trained with. Raises UserError (refused) for those of another version or training."""
    run = kind()
    try:
        for section, values in checkpoint.facts["run"].items():
            for key, value in values.items():
                set_value(run, f"{section}.{key}", value)
    except (KeyError, AttributeError, TypeError, UserError) as error:
        raise refused(f"{checkpoint.folder}: its settings are those of another version ({error}); start anew") from None
    if run.train.part is not None and run.train.mixed_precision in ("fp16", "bf16"):
        run.model.precision = run.train.mixed_precision  # first versions stored how the model is loaded, in fp32
    return run


def value_of(run: TrainRun, name: str) -> Any:
    """The setting ``section.key``."""
    section, _, key = name.partition(".")
    return getattr(getattr(run, section), key)


def read_early(run: TrainRun, say: Callable[[str], None]) -> Dataset | None:
    """Find the model and read the pictures' headers and captions before torch is imported, where the model's size is known.

    None for a hub model that has to be fetched first: then the trainer reads them.
    """
    source = model_source.resolve(
        run.model.model_id, run.paths.folder("cache"), run.model.offline, revision=run.model.revision,
        include_safety_checker=False,
    )  # fmt: skip
    folder = Path(run.train.dataset_dir).expanduser()
    if not folder.is_dir():
        raise not_found(f"{folder}: no such folder; make one with python -m src.prepare_dataset --src PHOTOS --dst {folder}")
    if source.path is None:
        return None
    shapes = find_model(run.app_config())[1]
    if run.train.part is not None and not part_numbers(shapes, run.train.part):
        raise usage_error(f"--train {run.train.part}: this U-Net has no such part; choose another")
    levels = len(shapes.unet["block_out_channels"]) - 1
    return read_pictures(run, run.train.resolution or shapes.native_px, shapes.latent_scale * 2**levels, say)


def read_pictures(run: TrainRun, resolution_px: int, step_px: int, say: Callable[[str], None]) -> Dataset:
    """The data set of a run. Raises UserError as `read_dataset` does."""
    train = run.train
    folder = Path(train.dataset_dir).expanduser()
    more: dict[str, Any] = {"masked": train.masked_loss}
    if train.part is not None:
        folder = unpacked(folder, run.paths.folder("cache"), say)
        table = Path(train.captions_file).expanduser() if train.captions_file else find_caption_table(folder)
        if table is not None:
            files.require_file(table)
        more |= {"captions_file": table, "most_held_out": train.validation_pictures}
    return read_dataset(
        folder, resolution_px, step_px=step_px, buckets=train.buckets, validation_every=train.validation_every, **more
    )
