"""The mathematics of a training step: noise schedule, noisy latents, target, weight, loss. Pure functions on tensors.

Time is the models' own, in whole steps: t = 0 is almost the picture, t = T-1 almost or wholly noise. With
a_t = ``alphas_cumprod[t]`` falling from about 1 to about 0,

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps,    eps ~ N(0, 1)        (Ho et al. 2020, equation 4)

and SNR(t) = a_t / (1 - a_t). Letters: T timesteps, B latents, C channels, h and w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from src.dataset import subkey
from src.errors import refused, usage_error

EPSILON, V_PREDICTION = "epsilon", "v_prediction"


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """How much of the picture is left at each timestep, and what the model predicts."""

    alphas_cumprod: torch.Tensor  # (T,) float32, falling, in [0, 1)
    prediction_type: str  # epsilon | v_prediction

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a model was trained with, out of its scheduler's configuration.

        ``rescale_betas_zero_snr`` in it rescales the schedule to a last timestep of pure noise.
        Raises UserError (refused) for a schedule or prediction type that is not known here.
        """
        prediction_type = scheduler_config.get("prediction_type", EPSILON)
        if prediction_type not in (EPSILON, V_PREDICTION):
            raise refused(f"the model predicts '{prediction_type}'; only {EPSILON} and {V_PREDICTION} models can be trained")
        betas = _betas(scheduler_config)
        if scheduler_config.get("rescale_betas_zero_snr"):
            betas = _rescale_to_zero_terminal_snr(betas)
        return cls(torch.cumprod(1 - betas, dim=0), prediction_type)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @property
    def timesteps(self) -> int:
        """T, how many there are."""
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> torch.Tensor:
        """The signal-to-noise ratio a / (1 - a) of each timestep, (T,) float32."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether nothing of the picture is left at the last timestep."""
        return bool(self.alphas_cumprod[-1] == 0)


def check_loss(prediction_type: str, snr_gamma: float | None, zero_terminal_snr: bool) -> None:
    """Refuse what cannot work: a model of epsilon has nothing to predict from at a timestep of pure noise.

    There its target is its input, which holds nothing of the picture, and min-SNR's weight is 0 / 0. Velocity models do
    have a target there, -x_0 (Lin et al. 2023, section 3.2). Raises UserError (usage).
    """
    if zero_terminal_snr and prediction_type == EPSILON:
        cause = "and min-SNR's weight there is 0 / 0" if snr_gamma is not None else "where nothing can be learnt"
        raise usage_error(
            "zero-terminal SNR: the last timestep is pure noise, which a model that predicts epsilon would only have to "
            f"copy, {cause}; leave out --zero_terminal_snr, or train a v-prediction model"
        )


def draw_noise(key: int, shape: tuple[int, ...], offset: float = 0.0) -> torch.Tensor:
    """Standard normal noise of ``shape`` (C, h, w), float32 on the CPU: the same on every machine and at any batch size.

    ``offset`` adds that many times another normal number per channel, so that a model learns to change a picture's
    mean, which plain noise leaves in sight (Guttenberg 2023, crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = torch.randn(shape, generator=_generator(key, "noise"))
    if offset:
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        noise += offset * torch.randn(per_channel, generator=_generator(key, "noise offset"))
    return noise


def draw_latents(key: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A sample of the VAE's normal distribution, (C, h, w) float32."""
    return mean.float() + std.float() * torch.randn(mean.shape, generator=_generator(key, "latents"))


def draw_timestep(key: int, count: int) -> int:
    """One of 0 .. ``count``-1, all alike probable."""
    return subkey(key, "timestep") % count


def add_noise(schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x_t of latents x_0 (B, C, h, w) at ``timesteps`` (B,): Ho et al. 2020, equation 4."""
    signal, spread = _coefficients(schedule, timesteps, latents)
    return signal * latents + spread * noise


def target(schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the model shall predict, (B, C, h, w): eps, or v = sqrt(a) eps - sqrt(1-a) x_0 (Salimans and Ho 2022)."""
    if schedule.prediction_type == EPSILON:
        return noise
    signal, spread = _coefficients(schedule, timesteps, latents)
    return signal * noise - spread * latents


def loss_weights(schedule: NoiseSchedule, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """The weight (B,) of each timestep's squared error; ones for ``snr_gamma`` None.

    Min-SNR (Hang et al. 2023, section 3.4): the error of x_0 is weighed by min(SNR, gamma), which is
    min(SNR, gamma) / SNR for the error of eps and min(SNR, gamma) / (SNR + 1) for that of v.
    """
    if snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = schedule.snr[timesteps]
    return snr.clamp(max=snr_gamma) / (snr if schedule.prediction_type == EPSILON else snr + 1)


def weighted_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted mean squared error (B,) of each of B predictions (B, C, h, w), in float32 whatever came in.

    ``mask`` (B, 1, h, w) in [0, 1] weighs the pixels. The mean is over all of them: where the mask is small the loss is.
    """
    error = (prediction.float() - target.float()).square()  # (B, C, h, w)
    if mask is not None:
        error = error * mask
    return error.mean(dim=(1, 2, 3)) * weights


def _coefficients(schedule: NoiseSchedule, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(a) and sqrt(1-a) as (B, 1, 1, 1), the roots taken in float32 and then rounded to the latents' type."""
    a = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)


def _generator(key: int, purpose: str) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(subkey(key, purpose))


def _betas(config: Mapping[str, Any]) -> torch.Tensor:
    """The noise added at each timestep, (T,) float32, computed as diffusers' DDPMScheduler does; its names and defaults."""
    if (trained := config.get("trained_betas")) is not None:
        return torch.tensor(trained, dtype=torch.float32)
    kind = config.get("beta_schedule", "linear")
    count = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if kind == "scaled_linear":  # Stable Diffusion's: the roots are evenly spaced
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999
        cosine = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(cosine)])
    raise refused(f"the model's noise schedule '{kind}' is not known; linear, scaled_linear and squaredcos_cap_v2 are")


def _rescale_to_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(a) so that it starts as before and ends at 0: Lin et al. 2023 (2305.08891), algorithm 1."""
    roots = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    a = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([a[:1], a[1:] / a[:-1]])
