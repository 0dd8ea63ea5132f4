"""One drawing in a process of its own: seconds and peak memory, of ours and of the script that everybody writes first.

That script is ``StableDiffusionPipeline.from_pretrained(folder)`` and one call, in fp32 as it comes, or in bf16.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
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
    max_vram_gb: float | None = None  # a hard cap of the card's memory


@dataclass(frozen=True)
class Measured:
    """Seconds to load, of the first picture and of the next; the most memory that the process held, on a card the card's."""

    load_s: float
    first_s: float
    next_s: float
    peak_bytes: int
    predicted_bytes: int | None = None
    plan: str = ""


def measure(drawing: Drawing, python: Path | None = None) -> Measured:
    """Draw in a process. ``python`` is the interpreter of another environment, for OpenVINO. Raises UserError."""
    command = [sys.executable, "-m", "src.bench.sides"] if python is None else [str(python), str(OPENVINO_SIDE)]
    done = subprocess.run(
        [*command, json.dumps(asdict(drawing))], cwd=PROJECT_FOLDER, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"bench: {drawing.kind} {drawing.precision} at {drawing.size_px} px failed: {last}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def load_stock(drawing: Drawing) -> Callable[[], Sequence[Any]]:
    """The script's pipeline; each call draws a batch."""
    import diffusers

    from src.base_models import DTYPES

    options = {"dtype": DTYPES[drawing.precision]}
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
    from src.generator import TextToImageGenerator

    config = AppConfig()
    config.model.model_id, config.model.precision = drawing.model, drawing.precision
    config.model.device = "auto" if drawing.max_vram_gb else "cpu"
    config.optimization.max_vram_gb = drawing.max_vram_gb
    generator = TextToImageGenerator(config)
    generator.load_model()
    return lambda: generator.generate(
        PROMPT, seed=0, num_inference_steps=drawing.steps, guidance_scale=GUIDANCE_SCALE,
        width=drawing.size_px, height=drawing.size_px, num_images=drawing.batch_size, batch_size=drawing.batch_size,
    )  # fmt: skip


def main(text: str) -> None:
    """One drawing in this process; the last line of the output is JSON."""
    from src import lean_imports, quiet

    drawing = Drawing(**json.loads(text))
    quiet.silence_libraries()
    if drawing.max_vram_gb:
        _cap_card(drawing.max_vram_gb)
    started = time.perf_counter()
    if drawing.kind == "ours":
        with lean_imports.for_drawing(AppConfig().optimization):
            draw = load_ours(drawing)
    else:
        draw = load_stock(drawing)
    ends = [time.perf_counter()]
    for _ in range(drawing.pictures):
        pictures = draw()
        ends.append(time.perf_counter())
    facts = getattr(pictures[0], "info", {}).get("drawn")
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    measured = Measured(
        ends[0] - started, ends[1] - ends[0], ends[-1] - ends[-2], (facts and facts.peak_bytes) or peak_bytes,
        facts and facts.predicted_bytes, facts.memory_plan if facts else "",
    )  # fmt: skip
    print(json.dumps(asdict(measured)))


def _cap_card(limit_gb: float) -> None:
    """Let torch's allocator have no more than a card of this size would, less the context."""
    import torch

    from src.memory_prediction import CONTEXT_BYTES, GIB

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((limit_gb * GIB - CONTEXT_BYTES) / total_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
