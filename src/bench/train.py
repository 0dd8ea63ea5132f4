"""Steps per second of a training, ours beside diffusers' ``train_text_to_image_lora.py`` at equal settings, on this machine.

The two run in turn, each in a process of its own, so that a busy moment, warm caches and the allocator's settings favour
nobody. The script is no part of diffusers' package: name a copy of it with ``--script``. Without one its loop stands for
it: the same operations by the same libraries in the same order, with Pillow in place of torchvision.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from src import devices
from src.bench import random_models
from src.bench.report import Row
from src.config import PROJECT_FOLDER
from src.errors import UserError

ROUNDS = 3
PICTURES = 8
WARM_UP_STEPS = 2  # of each process, not counted
RANK = 4
CAPTION = "a red circle on a white background"
_PROGRESS = re.compile(r"(\d+)/\d+ \[")  # of tqdm


@dataclass(frozen=True)
class Setting:
    """What both sides train. ``precision``: no (float32) or bf16, as accelerate calls them."""

    model: str
    size_px: int
    batch_size: int
    precision: str
    steps: int

    @property
    def words(self) -> str:
        return f"{self.size_px} px, batch size {self.batch_size}, {'fp32' if self.precision == 'no' else self.precision}"


def run(folder: Path, *, full: bool, script: Path | None) -> Iterator[str | Row]:
    """Time all settings and give the lines of the report. ``full``: a model of SD v1.5's shapes (2 GB are written)."""
    from src.model_files import EMBEDDED

    reference = script.name if script else "the loop of train_text_to_image_lora.py"
    yield f"reference: {reference}; median of {ROUNDS} rounds in turn"
    has_bf16 = devices.cpu_has_bf16()
    if not has_bf16:
        yield "no rows in bf16, which this CPU does not multiply"
    sizes = [("embedded", str(EMBEDDED), 128, 8, 10), ("embedded", str(EMBEDDED), 128, 1, 24)]
    if full:
        sizes = [("SD v1.5's shapes, random weights", str(random_models.write(folder / "model", "sd15", "bf16")), 512, 1, 5)]
    for title, model, size_px, batch_size, steps in sizes:
        data = write_pictures(folder / f"data-{size_px}", size_px)
        for precision in ("no", "bf16") if has_bf16 else ("no",):
            setting = Setting(model, size_px, batch_size, precision, steps)
            theirs, ours = _time_in_turn(setting, data, folder, script)
            times = {"that loop s": theirs, "ours s": ours, "times the steps": theirs / ours}
            yield {"a step": f"{title}, {setting.words}", **times}


def _time_in_turn(setting: Setting, data: Path, folder: Path, script: Path | None) -> tuple[float, float]:
    """Median seconds a step: theirs, ours."""
    seconds: dict[str, list[float]] = {"reference": [], "ours": []}
    for number in range(ROUNDS):
        for side, times in seconds.items():
            if side == "reference" and script is not None:
                times += _time_script(setting, data, script, folder / "script")
            else:
                output = folder / f"{side}-{setting.size_px}-{setting.batch_size}-{setting.precision}-{number}"
                times += _time_process(side, setting, data, output)
    return statistics.median(seconds["reference"]), statistics.median(seconds["ours"])


def _time_process(side: str, setting: Setting, data: Path, output: Path) -> list[float]:
    arguments = [side, setting.model, setting.size_px, setting.batch_size, setting.precision, setting.steps, data, output]
    command = [sys.executable, "-m", "src.bench.train", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"bench train ({side}): {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _time_script(setting: Setting, data: Path, script: Path, output: Path) -> list[float]:
    """Run the script itself; its progress bar tells when each step is done."""
    options = {
        "pretrained_model_name_or_path": setting.model, "train_data_dir": data, "caption_column": "text",
        "resolution": setting.size_px, "train_batch_size": setting.batch_size, "max_train_steps": setting.steps,
        "rank": RANK, "mixed_precision": setting.precision, "output_dir": output, "seed": 0,
    }  # fmt: skip
    command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # as ours, also where there is a card
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        ends: dict[int, float] = {}
        text = ""
        while piece := process.stderr.read1(4096):  # type: ignore[attr-defined]
            text = (text + piece.decode("utf-8", "replace"))[-4096:]
            for step in _PROGRESS.findall(text[text.rfind("Steps:") :]):
                ends.setdefault(int(step), time.perf_counter())
    if process.returncode or len(ends) <= setting.steps // 2:
        raise UserError(f"{script}: ended with {process.returncode}: {text.strip().splitlines()[-1:]}; try it by hand")
    first, last = min(step for step in ends if step >= WARM_UP_STEPS), max(ends)
    return [(ends[last] - ends[first]) / (last - first)]


def write_pictures(folder: Path, size_px: int) -> Path:
    """Some pictures with captions, as ``datasets`` and our trainer read them."""
    from PIL import Image

    from src import files, images

    files.check_writable_folder(folder)
    rows = []
    for number in range(PICTURES):
        name = f"{number:04d}.png"
        picture = Image.effect_noise((16, 16), 60 + number).convert("RGB").resize((size_px, size_px))
        files.publish_bytes(folder / name, images.encode_png(picture, {}))
        rows.append(json.dumps({"file_name": name, "text": CAPTION}))
    files.publish_bytes(folder / "metadata.jsonl", "\n".join(rows).encode())
    return folder


# What runs in the processes.


def time_ours(setting: Setting, data: Path, output: Path) -> list[float]:
    """Seconds of each step of our trainer, warm-up left out."""
    from src.checkpoints import CheckpointFolder
    from src.terminal import Terminal
    from src.train_arguments import build_run
    from src.training.interruption import Interruption
    from src.training.loop import Progress, train
    from src.training.trainer import Trainer

    settings = {
        "dataset_dir": str(data), "output_dir": str(output), "resolution": setting.size_px, "batch_size": setting.batch_size,
        "max_steps": setting.steps, "mixed_precision": setting.precision, "rank": RANK, "snr_gamma": None, "buckets": False,
        "caption_dropout": 0.0, "validation_every": 0, "score": False, "gradient_checkpointing": False,
    }  # fmt: skip
    run = build_run({"model": setting.model} | {f"train.{name}": value for name, value in settings.items()})
    run.model.offline, run.model.device, run.paths.cache = True, "cpu", str(output / "cache")
    job, _, _ = Trainer(run, Terminal(as_json=True))._prepare(CheckpointFolder(output, say=lambda line: None))
    ends = [time.perf_counter()]
    job = replace(job, show=lambda *_: ends.append(time.perf_counter()), judge=lambda _: None, save=lambda _: None)

    train(job, Progress(), Interruption())
    return _durations(ends)


def time_reference(setting: Setting, data: Path) -> list[float]:
    """Seconds of each step of the script's loop, warm-up left out."""
    from src.bench.script_loop import ScriptLoop

    loop = ScriptLoop(setting.model, data, setting.size_px, setting.batch_size, RANK, setting.precision)
    ends = [time.perf_counter()]
    for _ in loop.steps(setting.steps):
        ends.append(time.perf_counter())
    return _durations(ends)


def _durations(ends: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ends)][WARM_UP_STEPS:]


def main(arguments: list[str]) -> None:
    """One side in this process; the last line of the output is JSON."""
    from src import quiet

    quiet.silence_libraries()
    side, model, size_px, batch_size, precision, steps, data, output = arguments
    setting = Setting(model, int(size_px), int(batch_size), precision, int(steps))
    times = time_ours(setting, Path(data), Path(output)) if side == "ours" else time_reference(setting, Path(data))
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1:])
