"""Captions -> embeddings with gradients, for text encoders that learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src import conditioning


class LiveText:
    """The text encoders of a pipeline, called anew at each step. What they see is what the generator would let them see."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._zeros_if_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        both = (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
        self.encoders: list[nn.Module] = [encoder for encoder in both if encoder is not None]

    def __call__(self, captions: Sequence[str], chunks: int) -> tuple[Tensor, Tensor | None]:
        """Captions -> tokens (B, L, D) and, for SDXL, pooled (B, D2), each filled up to ``chunks`` windows."""
        embeddings = [self._embed(caption, chunks) for caption in captions]
        tokens = torch.stack([item.tokens for item in embeddings])
        if embeddings[0].pooled is None:
            return tokens, None
        return tokens, torch.stack([item.pooled for item in embeddings])

    def _embed(self, caption: str, chunks: int) -> conditioning.Embedding:
        embedding = conditioning.embed(self._pipeline, caption, chunks, weighted=False)
        if caption or embedding.pooled is None or not self._zeros_if_empty:
            return embedding
        # Times zero, and not zeros: with several processes each tensor that learns needs a gradient in every step.
        return conditioning.Embedding(embedding.tokens * 0, embedding.pooled * 0)
