"""A tiny fine-tuning: the door called in this process, and its result as plain tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from src import finetune
from tests.tiny import training

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def model(folder: Path, kind: str = "sd1") -> Path:
    """A tiny model, saved in fp16 as the large ones are: what is not learnt comes back bit for bit."""
    from tests.tiny import pipelines

    return pipelines.save(getattr(pipelines, kind)().to(torch.float16), folder)


def run(data: Path, base: Path, output: Path, *arguments: str) -> int:
    """``python -m src.finetune`` in this process, in fp32; returns the exit code."""
    common = ["--dataset_dir", str(data), "--model", str(base), "--output_dir", str(output), "--device", "cpu"]
    cache = ["--set", f"paths.cache={output.parent / 'cache'}", "--resolution", str(training.SIZE_PX),
             "--set", "train.sample_inference_steps=1"]  # fmt: skip
    precision = [] if "--mixed_precision" in arguments else ["--mixed_precision", "no"]
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, but this one is many runs
    try:
        return finetune.main([*common, *cache, *precision, *arguments])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def resume(data: Path, output: Path, *arguments: str) -> int:
    """``python -m src.finetune --resume`` in this process."""
    return finetune.main(["--dataset_dir", str(data), "--output_dir", str(output), "--resume", *arguments])


def unet(folder: Path) -> dict[str, torch.Tensor]:
    """The U-Net's tensors of a model folder, as they lie there."""
    return safetensors.torch.load_file(folder / UNET)


def flickr(folder: Path, count: int = 4, style: str = "pipe") -> Path:
    """Pictures in a folder of their own, and a table with three captions for each."""
    training.photos(folder / "images", count)
    for text in (folder / "images").glob("*.txt"):
        text.unlink()
    names = sorted(path.name for path in (folder / "images").glob("*.png"))
    rows = [(name, number, f"caption {number}, of {name[:4]}") for name in names for number in range(3)]
    if style == "pipe":
        lines = ["image_name| comment_number| comment", *(f"{name}| {number}| {text} ." for name, number, text in rows)]
        (folder / "results.csv").write_text("\n".join(lines))
    else:
        (folder / "captions.txt").write_text("\n".join(["image,caption", *(f'{name},"{text}"' for name, _, text in rows)]))
    return folder


def copy(folder: Path, target: Path) -> Path:
    """The same folder once more."""
    return Path(shutil.copytree(folder, target))
