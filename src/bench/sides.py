"""One drawing in a process of its own: seconds and peak memory, of ours and of the script that everybody writes first.

That script is ``StableDiffusionPipeline.from_pretrained(folder)`` and one call, in fp32 as it comes, or in bf16.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.config import PROJECT_FOLDER, AppConfig
from src.errors import UserError

PROMPT = "a red circle on a white background"
GUIDANCE_SCALE = 7.5
OPENVINO_SIDE = Path(__file__).parent / "openvino_side.py"


@dataclass(frozen=True)
class Drawing:
    """What is drawn. ``kind``: stock, compiled (the same with a compiled U-Net), ours."""

    kind: str
    precision: str
    model: str
    size_px: int
    steps: int
    batch_size: int = 1
    pictures: int = 2  # one after the other; the first one is slower on all sides
    max_vram_gb: float | None = None  # of the card's memory: a run is held to it


@dataclass(frozen=True)
class Measured:
    """Seconds to load, of the first picture and of the next; the most memory that the process held, on a card the card's."""

    load_s: float
    first_s: float
    next_s: float
    peak_bytes: int
    predicted_bytes: int | None = None
    plan: str = ""
    loaded_bytes: int = 0  # what the process held before the first picture


def measure(drawing: Drawing, python: Path | None = None) -> Measured:
    """Draw in a process. ``python`` is the interpreter of another environment, for OpenVINO. Raises UserError."""
    arguments = [json.dumps(asdict(drawing))]
    if python is None:
        commands = [[sys.executable, "-m", "src.bench.sides", *arguments]]
    else:  # it exports the model first, which takes memory of its own
        commands = [[str(python.absolute()), str(OPENVINO_SIDE), *arguments, *more] for more in (["export"], [])]
    for command in commands:
        done = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"bench: {drawing.kind} {drawing.precision} at {drawing.size_px} px failed: {last}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def peak_memory_bytes() -> int:
    """The most main memory that this process held. Linux' ru_maxrss would begin with its parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # is not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load_stock(drawing: Drawing) -> Callable[[], Sequence[Any]]:
    """The script's pipeline; each call draws a batch."""
    import diffusers
    import torch

    options: dict[str, Any] = {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[drawing.precision]}
    index = json.loads((Path(drawing.model) / "model_index.json").read_bytes())
    if "safety_checker" in index:
        options |= {"safety_checker": None, "feature_extractor": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(drawing.model, **options)
    pipeline.set_progress_bar_config(disable=True)
    if drawing.kind == "compiled":
        pipeline.unet.compile()
    return lambda: pipeline(
        PROMPT, num_inference_steps=drawing.steps, guidance_scale=GUIDANCE_SCALE,
        width=drawing.size_px, height=drawing.size_px, num_images_per_prompt=drawing.batch_size,
    ).images  # fmt: skip


def load_ours(drawing: Drawing) -> Callable[[], Sequence[Any]]:
    """Our generator; each call draws a batch."""
    from src import lean_imports

    config = AppConfig()
    with lean_imports.for_drawing(config.optimization):
        from src.generator import TextToImageGenerator
    cache = tempfile.TemporaryDirectory()  # what earlier runs remembered must not choose the plan
    config.paths.cache = cache.name
    config.model.model_id, config.model.precision = drawing.model, drawing.precision
    config.model.device = "auto" if drawing.max_vram_gb else "cpu"
    config.optimization.max_vram_gb = drawing.max_vram_gb
    generator = TextToImageGenerator(config)
    generator.load_model()
    settings = {
        "seed": 0, "num_inference_steps": drawing.steps, "guidance_scale": GUIDANCE_SCALE, "width": drawing.size_px,
        "height": drawing.size_px, "num_images": drawing.batch_size, "batch_size": drawing.batch_size,
    }  # fmt: skip

    def draw(_: Any = cache) -> Sequence[Any]:
        return generator.generate(PROMPT, **settings)

    return draw


def main(text: str) -> None:
    """One drawing in this process; the last line of the output is JSON."""
    import psutil

    from src import quiet

    drawing = Drawing(**json.loads(text))
    quiet.silence_libraries()
    started = time.perf_counter()
    draw = (load_ours if drawing.kind == "ours" else load_stock)(drawing)
    ends, loaded_bytes = [time.perf_counter()], psutil.Process().memory_info().rss
    for _ in range(drawing.pictures):
        pictures = draw()
        ends.append(time.perf_counter())
    facts = getattr(pictures[0], "info", {}).get("drawn")
    measured = Measured(
        ends[0] - started, ends[1] - ends[0], ends[-1] - ends[-2], (facts and facts.peak_bytes) or peak_memory_bytes(),
        facts and facts.predicted_bytes, facts.memory_plan if facts else "", loaded_bytes,
    )  # fmt: skip
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main(sys.argv[1])
