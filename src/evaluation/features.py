"""What a network sees in pictures: the rows of the feature matrices. CLIP and Inception, both from the disk, both in fp32.

An extractor is called with a batch of RGB pictures and returns matrices by name: ``features`` (N, D), and for a classifier
``logits`` (N, C).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from src import devices
from src.config import ModelConfig, check_machine
from src.errors import UserError, refused
from src.images import read_image
from src.model_files import EMBEDDED
from src.terminal import Terminal
from src.training.scores import Clip, has_both_towers

Extractor = Callable[[Sequence[Image.Image]], dict[str, Tensor]]
BATCH = 32  # pictures read and seen at once


class ClipFeatures:
    """A CLIP's projected unit vectors, (N, D)."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load a transformers CLIPModel folder. Raises UserError (refused) for one that cannot be loaded."""
        if not has_both_towers(folder):
            raise refused(f"--clip {folder}: is no CLIPModel with both towers in .safetensors; name such a folder")
        try:
            self.clip = Clip(folder, device)
        except Exception as error:  # what loaders raise has no class in common
            cause = " ".join(str(error).split())[:120]
            raise refused(f"--clip {folder}: cannot be loaded ({cause}); name a complete CLIPModel folder") from None
        self.is_own = folder.resolve() == (EMBEDDED / "clip").resolve()
        self.name = "CLIP embedded" if self.is_own else f"CLIP {public_name(folder)}"

    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        return {"features": self.clip.picture_features(pictures)}

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (T, D) of texts; what does not fit into CLIP's window is cut off. (0, D) for none."""
        return self.clip.text_features(texts).double().numpy() if texts else np.zeros((0, self.clip.dimensions))


class InceptionFeatures:
    """The Inception v3 that FID is defined by: (N, 2048) before its last layer, and logits (N, 1008).

    The network is torch-fidelity's (its exact poolings, its resizing as TensorFlow 1 did it), so figures are those of the
    literature; the weights are a .safetensors file with its names. The logits are without the bias of the last layer, as
    all published inception scores have them.
    """

    name = "Inception v3"

    def __init__(self, path: Path, device: str) -> None:
        """``path`` has passed ``inputs.check_inception``. Raises UserError (refused) for another network's weights."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as error:  # RuntimeError, too: its torchvision may be made for another torch
            cause = " ".join(str(error).split())[:120]
            raise UserError(
                f"--inception: torch-fidelity cannot be imported ({cause}); install the torchvision of your torch"
            ) from None

        weights = io.BytesIO()  # the class reads files of torch alone; so it gets one, in memory, made of safe tensors
        torch.save(safetensors.torch.load_file(path), weights)
        weights.seek(0)
        with torch.random.fork_rng([]):
            try:
                network = FeatureExtractorInceptionV3(
                    "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
                )
            except RuntimeError as error:
                cause = " ".join(str(error).split())[:120]
                raise refused(f"--inception {path}: is not the Inception of FID ({cause}); see docs/evaluating.md") from None
        self._network = network.to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        levels = [torch.from_numpy(np.array(item.convert("RGB"))).permute(2, 0, 1) for item in pictures]
        alike = len({item.shape for item in levels}) == 1
        batches = [torch.stack(levels)] if alike else [item[None] for item in levels]
        features, logits = zip(*(self._network(item.to(self._device)) for item in batches))
        return {"features": torch.cat(features).cpu(), "logits": torch.cat(logits).cpu()}


def pick_device(name: str) -> str:
    """``auto`` -> the first of cuda, mps and cpu that torch finds. Raises UserError (usage) for one that is not there."""
    check_machine(ModelConfig(device=name))
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return devices.pick_device(name, card_count=cards, has_mps=torch.backends.mps.is_available())


def extract(extractor: Extractor, pictures: Sequence[Path], terminal: Terminal, description: str) -> dict[str, np.ndarray]:
    """Read all pictures and collect what the extractor sees, float64; a bar shows how far it is.

    Raises UserError: what reading a picture raises; refused for features that are not finite.
    """
    found: list[dict[str, Tensor]] = []
    terminal.start_progress(len(pictures))
    try:
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 means fp32, on a card as well
                found.append(extractor([read_image(path) for path in batch]))
            terminal.progress(start + len(batch), description)
    finally:
        terminal.end_progress()
    matrices = {name: torch.cat([item[name] for item in found]).double().numpy() for name in found[0]}
    if not all(np.isfinite(matrix).all() for matrix in matrices.values()):
        raise refused(f"{description}: the network gives numbers that are not finite; its weights are damaged")
    return matrices


def public_name(path: Path) -> str:
    """A folder's own name; for a snapshot of a hub's cache the model's."""
    for part in reversed(path.resolve().parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.resolve().name
