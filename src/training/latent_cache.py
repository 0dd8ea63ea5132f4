"""Pictures -> the VAE's latents, computed once: mean and deviation, so that each visit can draw its own sample.

After this the VAE is not needed any more. Letters: h and w latent size (an eighth of the pixels).
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from src import denoising
from src.dataset import Example, load_picture
from src.errors import UserError, refused
from src.files import sha256_of
from src.folders import check_space
from src.training.tensor_store import Tensors, TensorStore, key_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

VERSION = 1  # of how a picture is decoded, scaled, cut and encoded; raise it when that changes
MAX_READERS = 8  # threads that decode pictures
Job = tuple[Example, bool]  # a picture, and whether it is mirrored


@dataclass(frozen=True, slots=True)
class Latents:
    """The normal distribution of a picture's latents, float32 on the CPU, in the U-Net's scale."""

    mean: torch.Tensor  # (4, h, w)
    std: torch.Tensor  # (4, h, w), not negative


class LatentCache:
    """The latents of pictures, in memory and in ``folder``.

    ``vae_id`` names the VAE's weights (their hash). The VAE is on ``device`` only while something is encoded.
    """

    def __init__(
        self, vae: AutoencoderKL, folder: Path, *, vae_id: str, device: torch.device | str, say: Callable[[str], None]
    ) -> None:
        self._vae, self._vae_id, self._device, self._say = vae, vae_id, torch.device(device), say
        self._dtype = vae.dtype
        self._folder, self._store = folder, TensorStore(folder, say)
        self._asked: list[Job] = []

    def encode(
        self,
        examples: Sequence[Example],
        flip: bool,
        on_progress: Callable[[int, int], None],
        unmirrored: Sequence[Example] = (),
    ) -> None:
        """Encode what is not yet on disk: each picture, and with ``flip`` its mirror image too, of ``unmirrored`` never.

        Where the VAE overflows in half precision, everything that was asked for is encoded in fp32: a data set is never
        of two precisions. ``on_progress`` is told how many of how many are done.

        Raises UserError: a picture that is gone, changed or damaged; no room on the disk; a VAE whose output is no number in
        fp32 either.
        """
        jobs = [(example, mirrored) for example in examples for mirrored in ((False, True) if flip else (False,))]
        jobs += [(example, False) for example in unmirrored]
        self._asked += jobs
        while True:
            try:
                return self._encode_missing(jobs, on_progress)
            except denoising.VaeNotFinite as error:
                if self._dtype == torch.float32:
                    raise refused(
                        f"{error} holds values that are no numbers even in fp32; use another --model or --vae"
                    ) from None
                self._say(f"vae     {error} holds values that are no numbers in {_name(self._dtype)}; encoding all in fp32")
                self._dtype = torch.float32
                self._vae.to(self._dtype)  # for good: decoding would overflow as well
                jobs = self._asked

    def get(self, example: Example, flip: bool = False) -> Latents:
        """The latents of a picture that was encoded. Raises UserError (failure) if their file vanished or broke since."""
        tensors = self._read((example, flip))
        if tensors is None:
            raise UserError(
                f"{example.path}: its latents are gone from the cache; start again with --resume to compute them anew"
            )
        return Latents(**tensors)

    def _encode_missing(self, jobs: Sequence[Job], on_progress: Callable[[int, int], None]) -> None:
        missing = [job for job in jobs if self._read(job) is None]
        done = len(jobs) - len(missing)
        on_progress(done, len(jobs))
        if not missing:
            return
        needed_bytes = sum(2 * math.prod(self._shape(example)) * torch.float32.itemsize for example, _ in missing)
        check_space(self._folder, needed_bytes)
        home = self._vae.device
        self._vae.to(self._device)
        try:
            for job, pixels in _decode(missing):
                self._store.write(self._key(job), self._encode(pixels))
                done += 1
                on_progress(done, len(jobs))
        finally:
            self._vae.to(home)

    def _encode(self, pixels: torch.Tensor) -> Tensors:
        """Pixels (1, 3, H, W) -> mean and std (4, h, w). One picture at a time: no batch leaves its mark on a cached value."""
        mean, std = denoising.encode_distribution(self._vae, pixels, self._device)
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise denoising.VaeNotFinite("the VAE's encoding")
        return {"mean": mean[0].cpu(), "std": std[0].cpu()}

    def _read(self, job: Job) -> Tensors | None:
        shape = self._shape(job[0])

        def is_right(tensors: Tensors) -> bool:
            return set(tensors) == {"mean", "std"} and all(
                tensor.shape == shape and tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
                for tensor in tensors.values()
            )

        return self._store.read(self._key(job), is_right)

    def _shape(self, example: Example) -> tuple[int, int, int]:
        width_px, height_px = example.size_px
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return self._vae.config.latent_channels, height_px // scale, width_px // scale

    def _key(self, job: Job) -> str:
        example, mirrored = job
        config = self._vae.config
        version = {} if example.version is None else {"picture_version": astuple(example.version)}
        return key_of(
            **version,
            kind="latents",
            version=VERSION,
            picture=example.sha256,
            size_px=example.size_px,
            crop_top_left=example.crop_top_left,
            mirrored=mirrored,
            vae=self._vae_id,
            scale=[config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std")],
            dtype=_name(self._dtype),
        )


def _decode(jobs: Sequence[Job]) -> Iterator[tuple[Job, torch.Tensor]]:
    """The pixels (1, 3, H, W) of each picture in [-1, 1], in order; a few are read ahead by threads, never all."""
    workers = min(MAX_READERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers)
    try:
        ahead: deque[tuple[Job, Future[torch.Tensor]]] = deque()
        for job in jobs:
            ahead.append((job, pool.submit(_pixels, *job)))
            if len(ahead) > 2 * workers:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pixels(example: Example, mirrored: bool) -> torch.Tensor:
    pixels = denoising.to_pixels(load_picture(example, mirrored))
    if sha256_of(example.path) != example.sha256:
        raise refused(f"{example.path}: was changed while the training began; start again")
    return pixels


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
