"""How well the adapter predicts noise on pictures it does not learn from: a number that can be compared between steps.

The loss of training jumps, because each step draws other timesteps, and an easy timestep's loss is a hundredth of a hard
one's. Here timesteps and noise are the same at every step, so what changes is the adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from src import diffusion
from src.dataset import subkey
from src.diffusion import NoiseSchedule
from src.training.batches import TextInput, predict
from src.training.latent_cache import Latents
from src.training.text_cache import Text

TIMESTEPS = 4  # of each picture
BATCH_SIZE = 2  # as many as guidance needs when a picture is drawn

# Latents, text, and time ids (6,) of SDXL. A function in place of the text gives it as the encoders, which learn, have it now.
Item = tuple[Latents, Text | Callable[[], Text], Tensor | None]


class Validation:
    """Held-out pictures, each at ``timesteps`` places of the schedule, with noise of its own that never changes."""

    def __init__(
        self,
        items: Sequence[Item],
        schedule: NoiseSchedule,
        *,
        seed: int,
        timesteps: int = TIMESTEPS,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self._items, self._schedule, self._seed, self._batch_size = list(items), schedule, seed, batch_size
        self.timesteps = spaced_timesteps(schedule.timesteps, timesteps)  # (K,)

    def loss(
        self,
        unet: nn.Module,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        encoders: Sequence[nn.Module] = (),
    ) -> float:
        """The mean of ||prediction - target||^2 over pictures and timesteps, unweighted, in float32; NaN without pictures.

        The same number at any batch size, up to the rounding of the U-Net's products. Nothing that training depends on
        changes: not the modes of the modules, not the random numbers. ``encoders``: the text encoders, if they learn.
        """
        schedule = self._schedule.to(device)
        with undisturbed(unet, *encoders, device=device), autocast():
            losses = [self._losses(index, unet, schedule, device) for index in range(len(self._items))]  # (K,) each
        return torch.cat(losses).double().mean().item() if losses else float("nan")

    def _losses(self, index: int, unet: nn.Module, schedule: NoiseSchedule, device: torch.device) -> Tensor:
        """One picture's loss at each timestep, (K,) on the CPU."""
        latents, text, time_ids = self._items[index]
        text = text() if callable(text) else text
        keys = [subkey(self._seed, f"validation {index} {place}") for place in range(len(self.timesteps))]
        noise = torch.stack([diffusion.draw_noise(key, tuple(latents.mean.shape)) for key in keys])  # (K, 4, h, w)
        found = []
        for t, eps in zip(self.timesteps.split(self._batch_size), noise.split(self._batch_size)):
            t, eps = t.to(device), eps.to(device)
            x0 = latents.mean.float().to(device).expand_as(eps)  # the mean: a sample would only add noise
            noisy = diffusion.add_noise(schedule, x0, eps, t)
            prediction = predict(unet, noisy, t, _repeated(text, time_ids, len(t), device))
            ones = torch.ones(len(t), device=device)
            found.append(diffusion.weighted_loss(prediction, diffusion.target(schedule, x0, eps, t), ones).cpu())
        return torch.cat(found)


def spaced_timesteps(count: int, places: int) -> Tensor:
    """The middles of ``places`` equal stretches of 0 .. ``count``-1, (places,): 125, 375, 625, 875 of 1000.

    Training draws timesteps uniformly; the mean over the middles is the midpoint rule for the mean that it estimates, and
    no stretch of the schedule, from fine detail (low) to layout (high), goes unseen.
    """
    return torch.tensor([(2 * place + 1) * count // (2 * places) for place in range(places)])


@contextmanager
def undisturbed(*models: nn.Module, device: torch.device) -> Iterator[None]:
    """Look at models without changing a training: evaluation mode, no gradients, and random numbers as if none were drawn.

    Every module gets back the mode it had: those of one model need not be alike.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _repeated(text: Text, time_ids: Tensor | None, count: int, device: torch.device) -> TextInput:
    """One text for ``count`` inputs."""
    parts = (text.tokens, text.pooled, time_ids)
    return TextInput(*(None if part is None else part.to(device).expand(count, *part.shape) for part in parts))
