"""A tiny training: a few pictures with captions, a tiny model on disk, and the door called in this process."""

from __future__ import annotations

import random
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image, ImageDraw

from src import train_lora
from tests.tiny import pipelines

SIZE_PX = 64


def photos(folder: Path, count: int = 4, size_px: int = SIZE_PX, caption: str = "a photo of sks thing {}") -> Path:
    """Pictures of two-part figures at random places, each with a caption of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        source = random.Random(index)
        picture = Image.new("RGB", (size_px, size_px), source.choice(["white", "yellow", "pink"]))
        draw = ImageDraw.Draw(picture)
        x, y = source.randint(size_px // 4, size_px // 2), source.randint(size_px // 4, size_px // 2)
        draw.rectangle((x, y, x + size_px // 4, y + size_px // 4), fill="teal")
        draw.ellipse((x, y - size_px // 5, x + size_px // 4, y), fill="orange")
        picture.save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(caption.format(index))
    return folder


def model(folder: Path, kind: str = "sd1") -> Path:
    """A tiny model as an ordinary diffusers folder."""
    return pipelines.save(getattr(pipelines, kind)(), folder)


def run(data: Path, base: Path, output: Path, *arguments: str) -> int:
    """``python -m src.train_lora`` in this process, in fp32; returns the exit code."""
    common = ["--dataset_dir", str(data), "--model", str(base), "--output_dir", str(output), "--mixed_precision", "no"]
    cache = ["--set", f"paths.cache={output.parent / 'cache'}", "--resolution", str(SIZE_PX), "--device", "cpu",
             "--set", "train.sample_inference_steps=1"]  # fmt: skip
    return train_lora.main([*common, *cache, *arguments])


def resume(data: Path, output: Path, *arguments: str) -> int:
    """``python -m src.train_lora --resume`` in this process."""
    return train_lora.main(["--dataset_dir", str(data), "--output_dir", str(output), "--resume", *arguments])


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that learnt, and the optimizer, of a checkpoint."""
    files = sorted((checkpoint / "state").glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
