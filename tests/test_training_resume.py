"""A training that was cut goes on bit for bit as if it had not been: at every step, in both families, with every optimizer."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from src import train_lora
from src.checkpoints import CheckpointFolder
from src.config import setting_names
from src.errors import ExitCode, UserError
from src.train_config import TrainConfig, TrainRun
from src.training import loop
from src.training.loop import Job, Progress
from src.training.saving import ADAPTER, NUMBERS, OPTIMIZER, Saver
from tests.tiny.faults import POSIX, assert_one_line, die_at, memory_folder
from tests.tiny.forked_training import ForkedTraining

TORTURE = bool(os.environ.get("TORTURE"))


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@dataclass
class Held:
    """A checkpoint in memory."""

    step: int
    contents: dict[str, bytes]
    folder: Path = Path("held")

    def read(self, name: str) -> bytes:
        return self.contents[name]


def states_of(job: Job, saver: Saver, progress: Progress, until: int) -> dict[int, dict[str, bytes]]:
    """Train until a step and return what a checkpoint of each step would hold, the clock left out."""
    states, stop = {}, SimpleNamespace(requested=None)

    def keep(progress: Progress) -> None:
        progress.seconds.clear()
        states[progress.step] = saver._state(progress)
        stop.requested = progress.step >= until

    job.judge, job.save, job.train.checkpoint_steps = lambda progress: None, keep, 1
    loop.train(job, progress, stop)
    return states


@pytest.mark.parametrize(
    ("family", "accumulation", "steps"), [("sd1", 1, 40), ("sd1", 4, 40), ("sdxl", 1, 40), ("sdxl", 4, 40 if TORTURE else 12)]
)
def test_cut_at_every_step(folder, family, accumulation, steps):
    """In any order: so what a checkpoint forgets would come from another step, and show. Five pictures: mid-epoch, too."""
    tiny = ForkedTraining(folder, family, pictures=5)
    job, saver, _ = tiny.prepare(
        "--max_steps", str(steps), "--gradient_accumulation", str(accumulation), "--set", "train.lr_scheduler=cosine",
        "--set", "train.caption_dropout=0.3", "--set", "train.flip=true", "--set", "train.dropout=0.1",
    )  # fmt: skip
    expected = states_of(job, saver, Progress(), steps)
    assert len({state[ADAPTER] for state in expected.values()}) == steps  # each step learns something
    cuts = list(range(1, steps))
    random.Random(0).shuffle(cuts)
    for cut in cuts:
        until = steps if TORTURE or cut == cuts[-1] else cut + 1
        progress = saver.restore(Held(cut, expected[cut]))
        assert progress.step == cut
        found = states_of(job, saver, progress, until)
        assert found == {step: expected[step] for step in range(cut + 1, until + 1)}, f"cut after step {cut}"


SETTINGS = {
    "prodigy": ("sd1", ["--optimizer", "prodigy", "--lr", "1", "--batch_size", "2", "--set", "train.lr_warmup_steps=2"]),
    "adafactor, average": ("sd1", ["--optimizer", "adafactor", "--set", "train.ema_decay=0.9", "--set", "train.dropout=0.2"]),
    "text encoders, DoRA": ("sdxl", ["--train_text_encoder", "--set", "train.use_dora=true", "--set", "train.targets=kohya"]),
    "8-bit AdamW": ("sd1", ["--optimizer", "adamw8bit", "--set", "train.noise_offset=0.1"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_optimizer_and_setting_goes_on(folder, case):
    family, arguments = SETTINGS[case]
    if "adamw8bit" in arguments:
        pytest.importorskip("bitsandbytes")
    tiny = ForkedTraining(folder, family)
    job, saver, _ = tiny.prepare("--max_steps", "6", *arguments)
    expected = states_of(job, saver, Progress(), 6)
    assert len({state[ADAPTER] for state in expected.values()}) >= 5  # a warm-up starts with a step of length zero
    job, saver, _ = tiny.prepare("--max_steps", "6", *arguments)  # as a new process would
    found = states_of(job, saver, saver.restore(Held(3, expected[3])), 6)
    assert found == {step: expected[step] for step in (4, 5, 6)}


@POSIX
@pytest.mark.parametrize("family", ["sd1", "sdxl"] if TORTURE else ["sd1"])
def test_a_new_process_goes_on_through_the_door(folder, family):
    """Nothing at hand: the settings, model, caches and state are read again. Killed in the middle of a save, then resumed."""
    tiny = ForkedTraining(folder, family)
    settings = ["--max_steps", "5", "--checkpoint_steps", "2"]
    assert tiny.run(*settings) == ExitCode.OK, tiny.log()
    expected = tiny.result(5)
    tiny.clear()

    def before() -> None:
        real = CheckpointFolder.save

        def save(self, step, *args):
            if step == 4:
                die_at(15)
            return real(self, step, *args)

        CheckpointFolder.save = save

    assert tiny.run(*settings, before=before) < 0
    assert [item.step for item in tiny.store().valid()] == [2]
    assert tiny.run("--resume") == ExitCode.OK, tiny.log()
    assert tiny.result(5) == expected


# --- what is asked of a resume


KNOWN = {
    "model.device": "cpu", "model.precision": "fp32", "train.targets": "kohya", "train.optimizer": "prodigy",
    "train.lr_scheduler": "cosine", "train.mixed_precision": "no", "train.quantize": "int8", "train.format": "kohya",
    "train.tracker": "tensorboard", "train.prior_target": "noise", "train.ema_decay": 0.5, "train.gradient_checkpointing": True, "train.learning_rate": 0.5,
    "train.text_encoder_learning_rate": 0.5, "train.text_encoder_2_learning_rate": 0.5,
}  # fmt: skip


def other_value(name: str, value: object) -> object:
    """A value of the same kind that is not this one."""
    if name in KNOWN:
        return KNOWN[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 0.5
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return ("other",)
    return f"{value}-other" if isinstance(value, str) else 64


def test_each_changed_setting_is_named(tmp_path):
    run = TrainRun()
    checkpoint = CheckpointFolder(tmp_path, print).save(3, {}, {"run": run.to_dict()})
    tried = 0
    for name in setting_names(run):
        section, _, key = name.partition(".")
        value = other_value(name, getattr(getattr(run, section), key))
        if name in train_lora.FREE_SETTINGS:
            assert train_lora._get(train_lora._resumed_run(checkpoint, {name: value}), name) in (value, str(value))
            continue
        with pytest.raises(UserError) as caught:
            train_lora._resumed_run(checkpoint, {name: value})
        is_fixed = name in train_lora.FIXED_SETTINGS  # another adapter or optimizer: no force helps
        assert_one_line(caught.value, name, "--output_dir" if is_fixed else "--force")
        assert caught.value.exit_code == ExitCode.USAGE
        if is_fixed:
            with pytest.raises(UserError):
                train_lora._resumed_run(checkpoint, {name: value, "force": True})
            tried += 1
            continue
        assert train_lora._get(train_lora._resumed_run(checkpoint, {name: value, "force": True}), name) in (value, str(value))
        tried += 1
    assert tried > len(fields(TrainConfig)) / 2


class Payload:
    def __reduce__(self):
        return os.mkdir, ("canary",)


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "pickle": lambda data: pickle.dumps(Payload()),
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "nested": lambda data: b"[" * 100_000,
    "other names": lambda data: data.replace(b"unet", b"unit").replace(b'"0.', b'"x.').replace(b"progress", b"process"),
    "other shapes": lambda data: data.replace(b"[4,32]", b"[32,4]").replace(b'"step": 1', b'"step": "1"'),
}


def test_a_checkpoint_of_a_stranger_is_refused_in_one_line(folder, monkeypatch):
    """Its manifest is right, so what it holds has to be looked at."""
    tiny = ForkedTraining(folder)
    job, saver, _ = tiny.prepare("--max_steps", "6")
    state = states_of(job, saver, Progress(), 1)[1]
    monkeypatch.chdir(folder)
    for name in (ADAPTER, OPTIMIZER, NUMBERS):
        for kind, change in HOSTILE.items():
            shutil.rmtree(tiny.output, ignore_errors=True)
            checkpoint = tiny.store().save(1, {**state, name: change(state[name])}, {})
            with pytest.raises(UserError, match=re.escape(str(checkpoint.folder))) as caught:
                saver.restore(checkpoint), pytest.fail(f"{kind} was taken for {name}")
            assert_one_line(caught.value)
            assert caught.value.exit_code == ExitCode.REFUSED
    assert not (folder / "canary").exists()
    saver.restore(tiny.store().save(1, state, {}))
