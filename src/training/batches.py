"""What one micro-step computes with: examples, their noise and timesteps, as tensors; and the one call of the U-Net.

Everything random comes from the key of a draw (`dataset.Order`), so a batch is a pure function of (seed, index): no state
has to be saved to go on after an interruption, and two processes see the halves of what one would.

Letters: B examples, h and w latent size, L tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from src import augmentation, diffusion
from src.dataset import Dataset, Draw, Example, Order, load_mask, subkey
from src.train_config import LoopConfig
from src.training.latent_cache import LatentCache
from src.training.live_text import LiveText
from src.training.text_cache import TextCache, time_ids


@dataclass(slots=True)
class TextInput:
    """What the U-Net reads beside the latents."""

    tokens: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, D2), SDXL
    time_ids: Tensor | None = None  # (B, 6), SDXL


@dataclass(slots=True)
class Batch:
    """One micro-step's examples. ``captions`` stand for ``tokens`` when the text encoders learn."""

    latents: Tensor  # (B, 4, h, w), of about unit variance
    noise: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    weights: Tensor  # (B,): 1, or the weight of the prior's pictures
    mask: Tensor | None  # (B, 1, h, w) in [0, 1]
    tokens: Tensor | None  # (B, L, D)
    pooled: Tensor | None
    time_ids: Tensor | None
    captions: tuple[str, ...]
    chunks: int  # windows of the text encoder that the longest caption fills
    preserved: tuple[int, ...] = ()  # rows whose target is what the model predicted before it learnt

    def to(self, device: torch.device) -> Batch:
        waits = device.type != "cuda"  # on a Mac the source, which nobody holds, may be gone before it is copied
        moved = {
            item.name: value.to(device, non_blocking=not waits)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def rows(self, chosen: Sequence[int]) -> Batch:
        """Some of the examples."""
        index = torch.tensor(chosen, device=self.latents.device)
        tensors = {item.name: value[index] for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)}
        preserved = tuple(place for place, row in enumerate(chosen) if row in self.preserved)
        return replace(self, captions=tuple(self.captions[row] for row in chosen), preserved=preserved, **tensors)

    def parts(self, count: int) -> list[tuple[Batch, float]]:
        """The batch in ``count`` parts, each with its share of the examples: a mean is that of the parts' means by share."""
        if count == 1:
            return [(self, 1.0)]
        size = len(self.latents)
        cuts = [range(size * part // count, size * (part + 1) // count) for part in range(count)]
        return [(self.rows(rows), len(rows) / size) for rows in cuts if rows]


def predict(unet: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextInput) -> Tensor:
    """The U-Net's output (B, 4, h, w) for noisy latents (B, 4, h, w) at timesteps (B,)."""
    added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": text.time_ids}
    return unet(noisy, timesteps, text.tokens, added_cond_kwargs=added, return_dict=False)[0]


def versions_of(example: Example, train: LoopConfig) -> tuple[Example, ...]:
    """The picture in all versions that it is learnt in, the first as it is. SDXL is told where the cut begins."""
    if train.versions == 1:
        return (example,)
    options = {"crop": train.crop, "colour": train.colour, "seed": train.seed}
    found = augmentation.versions(example.sha256, train.versions, **options)
    return (example, *(_in_version(example, version) for version in found[1:]))


def _in_version(example: Example, version: augmentation.Version) -> Example:
    """The version is cut out of the whole file, and enlarged; the cut to the bucket then takes its margin as before."""
    (top, left), (margin_top, margin_left), (width, height) = example.crop_top_left, example.margin_top_left, example.size_px

    def cut(before: float, margin: float, share: float, side: int) -> int:
        earlier = before - margin  # what prepare_dataset had cut off
        return round((earlier + (1 - version.kept) * share * (side + 2 * margin)) / version.kept + margin)

    return replace(
        example,
        version=version,
        crop_top_left=(cut(top, margin_top, version.top, height), cut(left, margin_left, version.left, width)),
        crop_right=cut(example.crop_right, margin_left, 1 - version.left, width),
    )


class Trainee(nn.Module):
    """All models that hold something that learns, as one module: what accelerate wraps for several processes."""

    def __init__(self, unet: nn.Module, live_text: LiveText | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.live_text = live_text
        if live_text is not None:  # registered, so that the gradients of all processes meet
            self.encoders = nn.ModuleList(live_text.encoders)

    def forward(self, noisy: Tensor, batch: Batch) -> Tensor:
        """Noisy latents (B, 4, h, w) -> prediction (B, 4, h, w)."""
        tokens, pooled = batch.tokens, batch.pooled
        if self.live_text is not None:
            tokens, pooled = self.live_text(batch.captions, batch.chunks)
        return predict(self.unet, noisy, batch.timesteps, TextInput(tokens, pooled, batch.time_ids))


class Feeder:
    """Makes the batches of a run out of the caches."""

    def __init__(
        self,
        dataset: Dataset,
        priors: Sequence[Example],
        latents: LatentCache,
        texts: TextCache,
        train: LoopConfig,
        *,
        timestep_count: int,
        processes: int = 1,
        live_text: bool = False,
        is_sdxl: bool = False,
    ) -> None:
        """``priors``: pictures of the class for prior preservation. ``live_text``: the text encoders learn."""
        self.examples = [*dataset.train, *priors]
        self._latents, self._texts, self._train = latents, texts, train
        self._timestep_count, self._live_text, self._is_sdxl = timestep_count, live_text, is_sdxl
        self._chunks = [max(map(texts.chunks, example.captions)) for example in self.examples]
        self._batch_size = train.batch_size
        self._preserves = bool(priors) and train.prior_target == "model"
        self._subjects = len(dataset.train)
        self._masks: dict[tuple[int, bool], Tensor] = {}
        self._versions = [versions_of(example, train) for example in self.examples]
        self.order = Order(
            [(example.size_px, chunks) for example, chunks in zip(self.examples, self._chunks)],
            [example.repeats for example in self.examples],
            [len(example.captions) for example in self.examples],
            batch_size=train.batch_size * processes,
            seed=train.seed,
            caption_dropout=train.caption_dropout,
            flip=train.flip,
            priors=[False] * len(dataset.train) + [True] * len(priors),
            all_captions=train.captions == "all",
        )

    def batch(self, index: int, process: int = 0) -> Batch:
        """The share of one process in the ``index``-th micro-batch of the run."""
        draws = self.order.batch(index)[process * self._batch_size : (process + 1) * self._batch_size]
        examples = [self._drawn(draw) for draw in draws]
        seen = [time_ids(example, draw.flip) for example, draw in zip(examples, draws)] if self._is_sdxl else []
        chunks = max(self._chunks[draw.example] for draw in draws)
        captions = tuple("" if draw.caption < 0 else example.captions[draw.caption] for draw, example in zip(draws, examples))
        texts = [] if self._live_text else [self._texts.get(caption, chunks) for caption in captions]
        latents = [self._sample_latents(draw) for draw in draws]
        offset = self._train.noise_offset
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack([diffusion.draw_noise(draw.key, tuple(latents[0].shape), offset) for draw in draws]),
            timesteps=torch.tensor([diffusion.draw_timestep(draw.key, self._timestep_count) for draw in draws]),
            weights=torch.tensor([example.weight for example in examples]),
            mask=self._mask(draws) if self._train.masked_loss else None,
            tokens=torch.stack([text.tokens for text in texts]) if texts else None,
            pooled=torch.stack([text.pooled for text in texts]) if texts and texts[0].pooled is not None else None,
            time_ids=torch.stack(seen) if seen else None,
            captions=captions,
            chunks=chunks,
            preserved=self._preserved(draws),
        )  # fmt: skip

    def _preserved(self, draws: Sequence[Draw]) -> tuple[int, ...]:
        """Pictures of the class, and any without caption: the subject must not become what stands for nothing."""
        if not self._preserves:
            return ()
        return tuple(row for row, draw in enumerate(draws) if draw.example >= self._subjects or draw.caption < 0)

    def _sample_latents(self, draw: Draw) -> Tensor:
        """A sample of the VAE's posterior (4, h, w): another one each time, as if the picture were encoded anew."""
        held = self._latents.get(self._drawn(draw), draw.flip)
        return diffusion.draw_latents(draw.key, held.mean, held.std)

    def _drawn(self, draw: Draw) -> Example:
        """The picture, in the version of this visit."""
        versions = self._versions[draw.example]
        return versions[subkey(draw.key, "version") % len(versions)]

    def _mask(self, draws: Sequence[Draw]) -> Tensor:
        """(B, 1, h, w): 1 where the mask is white, ``unmasked_weight`` where it is black, 1 where there is none."""
        return torch.stack([self._mask_of(draw.example, draw.flip) for draw in draws])

    def _mask_of(self, index: int, flip: bool) -> Tensor:
        if (index, flip) not in self._masks:
            example = self.examples[index]
            height, width = self._latents.get(example, False).mean.shape[-2:]
            picture = load_mask(example, flip)
            if picture is None:
                mask = torch.ones(1, height, width)
            else:
                levels = torch.tensor(list(picture.convert("L").tobytes()), dtype=torch.float32)
                white = levels.reshape(1, picture.height, picture.width) / 255
                white = nn.functional.adaptive_avg_pool2d(white, (height, width))
                mask = self._train.unmasked_weight + (1 - self._train.unmasked_weight) * white
            self._masks[index, flip] = mask
        return self._masks[index, flip]
