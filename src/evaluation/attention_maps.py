"""Where a U-Net looks for each token of the prompt while it draws: its cross-attention, recorded.

At every call of the U-Net each cross-attention weighs the tokens for each place of the picture: softmax(q k^T / sqrt(d)),
which sums to 1 over the tokens. What is kept is the mean over heads, and over layers of all resolutions (DAAM, Tang et al.
2023, arXiv 2210.04885, sums them). Under guidance it is the prompt's half of the batch. Letters: S tokens, h and w places.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from src import conditioning
from src.errors import UserError, usage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    from src.conditioning import Pipeline

SMALL_WORDS = frozenset(["a", "an", "the", "of", "and", "or", "with", "in", "on", "at", "to", "by", "for", "from", "is"])
_WORD_END = "</w>"  # of a word's last token
_MARK = ".attn2."  # diffusers' name for the attention to the text


class Recording:
    """The maps of the run that was drawn last."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._scheduler = pipeline, pipeline.scheduler
        self.maps: list[Tensor] = []  # one a call of the U-Net: (S, h, w) float32 on the CPU, each place sums to 1 over S
        self.timesteps: list[float] = []
        self._timestep, self._latent_px = 0.0, (0, 0)
        self._sums: dict[tuple[int, int], tuple[Tensor, int]] = {}  # of the call that is running: by resolution

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """A call of the U-Net begins: args are latents (B, C, h, w), timestep, ..."""
        if self._pipeline.scheduler is not self._scheduler:  # each run has its own, also the same once more in less memory
            # Timesteps would not tell: second-order samplers ask twice at one, "DPM2 a" even goes up by parts of one.
            self._scheduler, self.maps, self.timesteps = self._pipeline.scheduler, [], []
        self._timestep = float(args[1])
        self._latent_px, self._sums = tuple(args[0].shape[-2:]), {}

    def add(self, weights: Tensor) -> None:
        """One layer's weights, (H, L, S)."""
        size = grid_of(weights.shape[1], self._latent_px)
        mean = weights.mean(dim=0).t().unflatten(1, size)  # (S, h, w)
        before, count = self._sums.get(size, (0, 0))
        self._sums[size] = before + mean, count + 1

    def end(self, *_: Any) -> None:
        """The call is done: the mean over its layers, at the largest resolution among them."""
        self.timesteps.append(self._timestep)
        if not self._sums:
            return
        size = max(self._sums)
        count = sum(count for _, count in self._sums.values())
        # Bilinear: each value is a mean of its neighbours, so that what sums to 1 still does.
        parts = [nn.functional.interpolate(total[None], size, mode="bilinear")[0] for total, _ in self._sums.values()]
        self.maps.append((torch.stack(parts).sum(dim=0) / count).cpu())


class RecordingAttention:
    """In place of a cross-attention's processor: looks at the weights, and lets that processor do its work as ever."""

    def __init__(self, inner: Callable[..., Tensor], recording: Recording) -> None:
        self._inner, self._recording = inner, recording

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Hidden states (B, L, C) and text (B, S, D) -> (B, L, C)."""
        # The whole batch, of which the last is the prompt's: on a CPU weights are packed for the shape that comes.
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        query, key = (part[-1].float().unflatten(-1, (attn.heads, -1)).transpose(0, 1) for part in (query, key))  # (H, L|S, d)
        self._recording.add((query * query.shape[-1] ** -0.5 @ key.transpose(1, 2)).softmax(dim=-1))
        return self._inner(attn, hidden_states, encoder_hidden_states, attention_mask, **arguments)


@contextlib.contextmanager
def recorded(pipeline: Pipeline) -> Iterator[Recording]:
    """Record the cross-attention of a pipeline that draws one picture at a time, each with a scheduler of its own.

    The U-Net's processors are put back afterwards. Raises UserError: usage for a compiled U-Net, which would not look at them;
    failure where it drew and nothing was recorded.
    """
    unet: UNet2DConditionModel = pipeline.unet
    if any(module._compiled_call_impl is not None for module in unet.modules()):
        raise usage_error("attention maps and --torch-compile do not go together; leave --torch-compile out")
    recording, before = Recording(pipeline), unet.attn_processors
    watching = {
        name: RecordingAttention(processor, recording) if _MARK in name else processor for name, processor in before.items()
    }
    unet.set_attn_processor(watching)
    handles = [unet.register_forward_pre_hook(recording.begin), unet.register_forward_hook(recording.end)]
    try:
        yield recording
        if len(recording.maps) != len(recording.timesteps):
            raise UserError("the memory plan exchanged the attention while it was recorded; choose one with --memory")
    finally:
        for handle in handles:
            handle.remove()
        unet.set_attn_processor(dict(before))  # a copy: diffusers empties it


def grid_of(places: int, latent_px: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of a U-Net's level with so many places: the latents' size, halved and rounded up level by level."""
    height, width = latent_px
    while height * width > places:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != places:
        raise ValueError(f"{places} places are no level of latents of {latent_px}")
    return height, width


@dataclass(frozen=True, slots=True)
class Word:
    """A word or phrase of the prompt, and where its tokens lie among those that the U-Net reads."""

    text: str
    places: tuple[int, ...]


def words_of(pipeline: Pipeline, prompt: str, weighted: bool) -> list[Word]:
    """The prompt's words without the smallest ones and punctuation, each once, with the places of all its occurrences."""
    found: dict[str, list[int]] = {}
    tokens: list[str] = []
    places: list[int] = []
    for token, place in conditioning.token_places(pipeline, prompt, weighted=weighted):
        tokens.append(token)
        places.append(place)
        if token.endswith(_WORD_END):
            text = pipeline.tokenizer.convert_tokens_to_string(tokens).strip().removesuffix(_WORD_END)
            if any(sign.isalnum() for sign in text) and text not in SMALL_WORDS:
                found.setdefault(text, []).extend(places)
            tokens, places = [], []
    return [Word(text, tuple(at)) for text, at in found.items()]


def find_words(pipeline: Pipeline, prompt: str, weighted: bool, wanted: Sequence[str]) -> list[Word]:
    """Each wanted word or phrase, with the places of all its occurrences in the prompt. Raises UserError (usage)."""
    tokens, places = zip(*conditioning.token_places(pipeline, prompt, weighted=weighted) or [("", 0)])
    found = []
    for text in wanted:
        own = conditioning.tokenize(pipeline, text)
        starts = [start for start in range(len(tokens)) if own and list(tokens[start : start + len(own)]) == own]
        if not starts:
            known = ", ".join(word.text for word in words_of(pipeline, prompt, weighted))
            raise usage_error(f"--words {text[:60]}: is not in the prompt as it is read; its words are: {known[:300]}")
        at = dict.fromkeys(places[start + index] for start in starts for index in range(len(own)))
        found.append(Word(text, tuple(at)))
    return found


def word_maps(maps: Tensor, words: Sequence[Word]) -> Tensor:
    """Maps (..., S, h, w) -> (..., W, h, w): for each word the mean over its tokens."""
    return torch.stack([maps[..., list(word.places), :, :].mean(dim=-3) for word in words], dim=-3)
