"""A verb of ``python -m src.evaluate`` called in this process, on a tiny model of the disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import pipelines


class Run:
    """What a verb answered: its exit code, what it said, and what it wrote."""

    def __init__(self, verb: ModuleType, folder: Path, arguments: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(conflict_handler="resolve", allow_abbrev=False)
        parser.add_argument("--output")
        verb.add_arguments(parser)
        self.folder, self.said = folder, list[str]()
        common = ["--output", str(folder), "--device", "cpu", "--precision", "fp32", "--size", "64x64"]
        common += ["--set", f"paths.cache={folder.parent / 'cache'}"]
        self.code = verb.run(parser.parse_args([*arguments, *common]), self.said.append)

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    @property
    def page(self) -> str:
        """The report, proven to need nothing but itself."""
        text = (self.folder / "report.html").read_text(encoding="utf-8")
        assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", ""), "it is read offline"
        return text

    @property
    def pictures(self) -> list[Path]:
        return sorted((self.folder / "pictures").glob("*.png"))


def model(folder: Path, kind: str = "sd1", seed: int = 0) -> Path:
    return pipelines.save(getattr(pipelines, kind)(seed), folder)


def adapter(path: Path, seed: int = 0, strength: float = 0.5) -> Path:
    """A LoRA of kohya's form for one layer of the tiny SD1."""
    source = torch.Generator().manual_seed(seed)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    save_file(
        {
            f"{name}.lora_down.weight": torch.randn(4, 64, generator=source),
            f"{name}.lora_up.weight": strength * torch.randn(64, 4, generator=source),
            f"{name}.alpha": torch.tensor(4.0),
        },
        path,
    )
    return path
