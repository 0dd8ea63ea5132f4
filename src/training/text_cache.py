"""Captions -> the text encoders' embeddings, computed once. After this the encoders are not needed any more.

Letters: L tokens (77 for each chunk of a caption), D width of an embedding, D2 of SDXL's pooled one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from src import conditioning
from src.dataset import Example
from src.errors import UserError, refused
from src.folders import check_space
from src.training.tensor_store import Tensors, TensorStore, key_of

if TYPE_CHECKING:
    from src.conditioning import Pipeline

VERSION = 1  # of how a caption is cut and encoded; raise it when that changes
ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class Text:
    """A caption as the U-Net reads it, on the CPU, in the encoders' precision."""

    tokens: torch.Tensor  # (L, D)
    pooled: torch.Tensor | None = None  # (D2,), SDXL


class TextCache:
    """The embeddings of captions, in memory and in ``folder``. Captions are taken literally, and never cut.

    ``encoder_id`` names the encoders' weights (their hash). The encoders are on ``device`` only while something is encoded.
    ``stores_in``: what the embeddings are rounded to (None: as they are), which is nothing lost where the U-Net does so.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        *,
        encoder_id: str,
        clip_skip: int = 1,
        stores_in: torch.dtype | None = None,
        device: torch.device | str,
        say: Callable[[str], None],
    ) -> None:
        self._pipeline, self._encoder_id, self._clip_skip = pipeline, encoder_id, clip_skip
        self._device = torch.device(device)
        self._encoders = [encoder for name in ENCODERS if (encoder := getattr(pipeline, name, None)) is not None]
        self._dtype = str(pipeline.text_encoder.dtype).removeprefix("torch.")
        self._stores_in = stores_in or pipeline.text_encoder.dtype
        self._folder, self._store = folder, TensorStore(folder, say)
        self._chunks: dict[str, int] = {}

    def chunks(self, caption: str) -> int:
        """How many windows of the encoders the caption fills: at least one."""
        if caption not in self._chunks:
            self._chunks[caption] = conditioning.count_chunks(self._pipeline, caption)
        return self._chunks[caption]

    def encode(self, captions: Iterable[str], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Encode what is not yet on disk, each caption once, and the empty one for dropped captions.

        ``on_progress`` is told how many of how many are done. Raises UserError: embeddings that are no numbers, a full disk.
        """
        wanted = list(dict.fromkeys(["", *captions]))
        missing = [caption for caption in wanted if self._read(caption) is None]
        done = len(wanted) - len(missing)
        report = on_progress or (lambda done, total: None)
        report(done, len(wanted))
        if not missing:
            return
        shapes = [conditioning.embedding_shape(self._pipeline, self.chunks(caption)) for caption in missing]
        check_space(self._folder, sum(math.prod(shape) for shape in shapes) * self._stores_in.itemsize)
        home = [encoder.device for encoder in self._encoders]
        for encoder in self._encoders:
            encoder.to(self._device)
        try:
            for caption in missing:
                self._store.write(self._key(caption), self._encode(caption))
                done += 1
                report(done, len(wanted))
        finally:
            for encoder, device in zip(self._encoders, home):
                encoder.to(device)

    def get(self, caption: str, chunks: int) -> Text:
        """A caption that was encoded, filled up with empty windows to ``chunks``; "" is a dropped caption.

        Where the model says so (SDXL's ``force_zeros_for_empty_prompt``) that is all zeros, as in sampling.
        Raises UserError (failure) if its file vanished or broke since, ValueError if it has more than ``chunks``.
        """
        if self.chunks(caption) > chunks:
            raise ValueError(f"{caption!r} fills {self.chunks(caption)} chunks, not {chunks}")
        tensors, empty = self._known(caption), self._known("")
        tokens = torch.cat([tensors["tokens"], *[empty["tokens"]] * (chunks - self.chunks(caption))])
        pooled = tensors.get("pooled")
        if not caption and pooled is not None and self._pipeline.config.get("force_zeros_for_empty_prompt"):
            return Text(torch.zeros_like(tokens), torch.zeros_like(pooled))
        return Text(tokens, pooled)

    def _known(self, caption: str) -> Tensors:
        tensors = self._read(caption)
        if tensors is None:
            raise UserError(f"the caption '{caption[:60]}' is gone from the cache; start again with --resume to encode it anew")
        return tensors

    def _encode(self, caption: str) -> Tensors:
        with torch.no_grad():
            embedding = conditioning.embed(self._pipeline, caption, self.chunks(caption), clip_skip=self._clip_skip)
        tensors = {"tokens": embedding.tokens.to("cpu", self._stores_in)}
        if embedding.pooled is not None:
            tensors["pooled"] = embedding.pooled.to("cpu", self._stores_in)
        if not _all_finite(tensors):
            raise refused(f"the text encoder gives values that are no numbers in {self._dtype}; use --mixed_precision no")
        return tensors

    def _read(self, caption: str) -> Tensors | None:
        shape = conditioning.embedding_shape(self._pipeline, self.chunks(caption))

        def is_right(tensors: Tensors) -> bool:
            return "tokens" in tensors and tensors["tokens"].shape == shape and _all_finite(tensors)

        return self._store.read(self._key(caption), is_right)

    def _key(self, caption: str) -> str:
        stored = str(self._stores_in).removeprefix("torch.")
        rounded = {} if stored == self._dtype else {"stored": stored}
        return key_of(
            **rounded,
            kind="text",
            version=VERSION,
            caption=caption,
            encoders=self._encoder_id,
            clip_skip=self._clip_skip,
            dtype=self._dtype,
        )


def _all_finite(tensors: Tensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def time_ids(example: Example, mirrored: bool = False) -> torch.Tensor:
    """What SDXL is told of a picture (Podell et al. 2023, section 2.2): (6,) float32.

    Its height and width as it was taken, top and left of its cut, and the height and width that are trained. Of a mirrored
    picture, left is where the cut begins in the mirrored original.
    """
    (original_width, original_height), (width, height) = example.original_px, example.size_px
    top, left = example.crop_top_left
    left = example.crop_right if mirrored else left
    return torch.tensor([original_height, original_width, top, left, height, width], dtype=torch.float32)
