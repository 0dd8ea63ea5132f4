"""Many scenes at once, for processes that need no more than this: the pictures as PNG, one after the other."""

from __future__ import annotations

import io
import json
from itertools import islice

from src.scenes.drawing import draw
from src.scenes.grammar import scenes


def draw_shard(state: None, seed: int, split: str, count: int, grammar: str, lattice_px: int) -> tuple[bytes, bytes]:
    """JSON of the scenes, each with the size of its PNG, and the PNGs. ``state`` is there for `workers.work`."""
    entries, pngs = [], []
    for scene in islice(scenes(seed, split, grammar=grammar, lattice_px=lattice_px), count):
        file = io.BytesIO()
        draw(scene).save(file, "PNG", compress_level=1)
        pngs.append(file.getvalue())
        entries.append({"scene": scene.as_dict(), "bytes": len(pngs[-1])})
    return json.dumps(entries, separators=(",", ":")).encode(), b"".join(pngs)
