"""DINO's features of pictures: a vision transformer that learnt from pictures alone, so that it sees a subject's own traits.

CLIP calls two dogs of one breed alike; DINO, which learnt to tell every picture from all others, does not (Ruiz et al.
2023, section 4.2, whose DINO is ViT-S/16).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor

from src.errors import UserError, not_found, refused
from src.model_files import read_json
from src.training.scores import first_on_disk

KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # model_type; no code of a model is ever run
# The first that is on the disk. ViT-S/16 is what published figures use.
KNOWN_DINOS = (
    "facebook/dino-vits16",
    "facebook/dino-vitb16",
    "facebook/dino-vits8",
    "facebook/dino-vitb8",
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "facebook/dinov2-large",
)
KNOWN = KNOWN_DINOS[0]


def find(cache: Path) -> Path | None:
    """The folder of a DINO: ``CACHE/dino``, then the known ones in the two hub caches; nothing is fetched."""
    return first_on_disk(cache / "dino", KNOWN_DINOS, cache, _is_dino)


def _is_dino(folder: Path) -> bool:
    try:
        check(folder)
    except UserError:
        return False
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def check(folder: Path) -> None:
    """Refuse what is no DINO by its configuration. Raises UserError: not found, refused."""
    if not folder.is_dir():
        raise not_found(f"--dino {folder}: no such folder; give one with {KNOWN} or another DINO, as transformers saves it")
    kind = read_json(folder / "config.json", f"so it is no model of transformers; take {KNOWN}").get("model_type")
    if kind not in KINDS:
        raise refused(f"--dino {folder}: holds a '{kind}', not one of {', '.join(KINDS)}; take {KNOWN}")


class Dino:
    """A vision transformer out of a folder in the layout of transformers, on the CPU, in fp32."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: not found, or refused for what is no DINO or cannot be loaded."""
        check(folder)
        self.name = folder.resolve().name
        options = {"local_files_only": True}
        try:
            with torch.random.fork_rng([]):
                self._model, info = transformers.AutoModel.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
                )
            self._processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
        except Exception as error:  # what loaders raise has no class in common
            cause = " ".join(str(error).split())[:120]
            raise refused(f"--dino {folder}: cannot be loaded ({cause}); copy or download it again") from None
        missing = [name for name in info["missing_keys"] if "pooler" not in name]  # DINO's own files have none
        if missing:
            raise refused(f"--dino {folder}: {len(missing)} tensors are missing; copy or download it again")
        self._model.eval()

    @torch.no_grad()
    def picture_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> unit vectors (N, D): the class token of the last layer."""
        found = []
        for picture in pictures:  # a picture's features do not depend on its neighbours
            pixels = self._processor(images=picture.convert("RGB"), return_tensors="pt").pixel_values
            found.append(self._model(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)
