"""The first phase: scenes are drawn once and kept, as PNG with their captions; the others read them as tensors."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.checkpoints import Checkpoint
from src.images import contact_sheet
from src.preparation import workers
from src.scenes.grammar import SIZE_PX, Scene
from src.scenes.shards import draw_shard
from src.scratch import phase_report
from src.scratch.phases import Work
from src.scratch.settings import ScratchSettings
from src.terminal import Terminal

SHOWN = 36  # in the report
SHARD = 1000  # scenes that are drawn and kept together
AGAIN = "close other programs, and run the same command again"  # where a process that draws them was killed


@dataclass(frozen=True)
class Pictures:
    """Scenes of one split. ``pixels`` (N, 3, 128, 128) uint8, channels last in memory."""

    scenes: list[Scene]
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]

    def images(self) -> list[Image.Image]:
        """All of them as pictures."""
        return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in self.pixels]

    def floats(self, indices: Tensor | slice) -> Tensor:
        """Some of them as (B, 3, 128, 128) float32 in [-1, 1], as VAEs want them."""
        return self.pixels[indices].float() / 127.5 - 1


def draw_scenes(work: Work, settings: ScratchSettings, terminal: Terminal) -> dict[str, float]:
    """Draw the scenes of training and those that judge, and publish them."""
    counts = {"train": settings.scenes.count, "held-out": settings.scenes.held_out}
    of = settings.scenes
    jobs = [
        (of.seed * 1_000_000 + start, split, min(SHARD, count - start), of.grammar, of.lattice_px)
        for split, count in counts.items()
        for start in range(0, count, SHARD)
    ]
    contents: dict[str, bytes] = {}
    captions: set[str] = set()
    terminal.start_progress(sum(counts.values()))
    done = 0
    try:
        drawn = workers.work(draw_shard, None, jobs, min(len(jobs), workers.process_count(None, sum(counts.values()))), AGAIN)
        for (seed, split, count, *_), (data, pngs) in zip(jobs, drawn):
            stem = f"{split}-{seed % 1_000_000:07d}"
            contents |= {f"{stem}.json": data, f"{stem}.png-s": pngs}
            captions.update(entry["scene"]["caption"] for entry in json.loads(data))
            done += count
            terminal.progress(done, f"scenes  {stem}")
    finally:
        terminal.end_progress()
    figures = {"distinct_captions": len(captions)}
    work.publish("scenes", settings, contents, figures, {})
    shown = read_pictures(work.result("scenes"), "held-out", SHOWN)
    large = [one.resize((2 * SIZE_PX, 2 * SIZE_PX), Image.Resampling.LANCZOS) for one in shown.images()]
    sheet = contact_sheet(large, shown.captions, columns=6)
    phase_report.write_scenes(work.of("scenes"), settings.scenes, counts | figures, sheet)
    return figures


def read_pictures(result: Checkpoint, split: str, limit: int | None = None) -> Pictures:
    """The published scenes of a split, or the first ``limit`` of them. Raises UserError (refused) for a damaged file."""
    found: list[Scene] = []
    files: list[bytes] = []  # small, until all are known: the pixels of all are several GB and are held once
    for name in sorted(name for name in result.files if name.startswith(split) and name.endswith(".json")):
        pngs, start = result.read(name.removesuffix("json") + "png-s"), 0
        for entry in json.loads(result.read(name)):
            if limit is not None and len(found) == limit:
                break
            found.append(Scene.from_dict(entry["scene"]))
            files.append(pngs[start : start + entry["bytes"]])
            start += entry["bytes"]
    pixels = torch.empty(len(files), SIZE_PX, SIZE_PX, 3, dtype=torch.uint8)
    for place, file in zip(pixels.numpy(), files):
        place[:] = np.asarray(Image.open(io.BytesIO(file)))
    return Pictures(found, pixels.permute(0, 3, 1, 2))
