"""The training mathematics against diffusers' DDPMScheduler, closed forms and statistics."""

import hashlib
import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from src import diffusion
from src.diffusion import NoiseSchedule, subkey
from src.errors import ExitCode, UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195},
    SD,
    SD | {"num_train_timesteps": 37},
    SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01, 0.02, 0.2, 0.5]},
]


def tensors(seed: int = 0, count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, 4, 6, 8, generator=source)
    return latents, noise, torch.tensor([0, 3, 499, 998, 999])[:count]


# --- the schedule ---


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alphas_are_those_of_diffusers(config: dict) -> None:
    """To the last bit, with what a saved configuration holds (every key) and with what the caller gave (the rest by default)."""
    expected = DDPMScheduler(**config)
    for given in (config, dict(expected.config)):
        mine = NoiseSchedule.from_config(given)
        assert mine.alphas_cumprod.dtype == torch.float32
        assert torch.equal(mine.alphas_cumprod, expected.alphas_cumprod)
        assert mine.timesteps == expected.config.num_train_timesteps or "trained_betas" in config
        assert mine.prediction_type == expected.config.prediction_type


def test_a_samplers_configuration_gives_the_schedule_of_the_training() -> None:
    sampler = DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, prediction_type="v_prediction")
    mine = NoiseSchedule.from_config(dict(sampler.config))
    assert torch.equal(mine.alphas_cumprod, DDPMScheduler(**SD).alphas_cumprod)
    assert mine.prediction_type == "v_prediction"


def test_zero_terminal_snr_is_algorithm_1() -> None:
    plain = NoiseSchedule.from_config(SD)
    mine = NoiseSchedule.from_config(SD | {"rescale_betas_zero_snr": True})
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(DDPMScheduler(**SD).betas), dim=0)
    assert torch.equal(mine.alphas_cumprod, expected)
    assert mine.alphas_cumprod[-1] == 0
    assert mine.snr[-1] == 0
    assert mine.has_zero_terminal_snr
    assert not plain.has_zero_terminal_snr
    torch.testing.assert_close(mine.alphas_cumprod[0], plain.alphas_cumprod[0])
    root, was = mine.alphas_cumprod.double().sqrt(), plain.alphas_cumprod.double().sqrt()
    torch.testing.assert_close(root, (was - was[-1]) * was[0] / (was[0] - was[-1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"), [({"prediction_type": "sample"}, "'sample'"), ({"beta_schedule": "exponential"}, "'exponential'")]
)
def test_unknown_schedules_are_refused(config: dict, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        NoiseSchedule.from_config(SD | config)
    assert caught.value.exit_code == ExitCode.REFUSED


def test_the_schedule_moves_as_a_whole() -> None:
    moved = NoiseSchedule.from_config(SD).to("meta")
    assert moved.alphas_cumprod.device.type == "meta"
    assert moved.prediction_type == "epsilon"


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_epsilon_and_zero_terminal_snr_exclude_each_other(snr_gamma: float | None) -> None:
    with pytest.raises(UserError, match="v-prediction model") as caught:
        diffusion.check_loss("epsilon", snr_gamma, True)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)
    diffusion.check_loss("epsilon", snr_gamma, False)
    diffusion.check_loss("v_prediction", snr_gamma, True)


# --- noisy latents and targets ---


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noisy_latents_and_velocity_are_those_of_diffusers(zero_terminal_snr: bool) -> None:
    config = SD | {"prediction_type": "v_prediction"}
    expected = DDPMScheduler(**config, rescale_betas_zero_snr=zero_terminal_snr)
    mine = NoiseSchedule.from_config(config | {"rescale_betas_zero_snr": zero_terminal_snr})
    latents, noise, timesteps = tensors()
    assert torch.equal(diffusion.add_noise(mine, latents, noise, timesteps), expected.add_noise(latents, noise, timesteps))
    assert torch.equal(diffusion.target(mine, latents, noise, timesteps), expected.get_velocity(latents, noise, timesteps))


def test_an_epsilon_models_target_is_the_noise() -> None:
    latents, noise, timesteps = tensors()
    assert diffusion.target(NoiseSchedule.from_config(SD), latents, noise, timesteps) is noise


def test_coefficients_keep_their_precision_when_latents_are_half() -> None:
    """At t = 0, 1 - a is 0.00085: its root taken in float16 after rounding a would be off by percents."""
    schedule = NoiseSchedule.from_config(SD)
    noisy = diffusion.add_noise(schedule, torch.zeros(1, 4, 2, 2).half(), torch.ones(1, 4, 2, 2).half(), torch.tensor([0]))
    assert noisy.dtype == torch.float16
    assert noisy[0, 0, 0, 0].item() == pytest.approx(math.sqrt(0.00085), rel=1e-3)


# --- weights and loss ---


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_closed_form(prediction_type: str, gamma: float) -> None:
    config = SD | {"prediction_type": prediction_type}
    scheduler = DDPMScheduler(**config)
    timesteps = torch.arange(1000)
    mine = diffusion.loss_weights(NoiseSchedule.from_config(config), timesteps, gamma).double()
    snr = compute_snr(scheduler, timesteps).double()
    a = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(snr, a / (1 - a), rtol=1e-4, atol=0)
    expected = torch.minimum(snr, torch.tensor(gamma)) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_means_the_same_for_both_targets(prediction_type: str) -> None:
    """The weighted loss is min(SNR, gamma) times the squared error of x_0, whatever is predicted: the paper's definition."""
    schedule = NoiseSchedule.from_config(SD | {"prediction_type": prediction_type})
    latents, noise, _ = tensors()
    timesteps = torch.tensor([50, 200, 499, 800, 999])
    goal = diffusion.target(schedule, latents, noise, timesteps)
    prediction = goal + 0.1 * torch.randn(goal.shape, generator=torch.Generator().manual_seed(1))
    mine = diffusion.weighted_loss(prediction, goal, diffusion.loss_weights(schedule, timesteps, 5.0))
    a = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1).double()
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    if prediction_type == "epsilon":
        clean = (noisy - (1 - a).sqrt() * prediction) / a.sqrt()
    else:
        clean = a.sqrt() * noisy - (1 - a).sqrt() * prediction
    snr = (a / (1 - a)).flatten()
    expected = snr.clamp(max=5) * (clean - latents).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=1e-9)


def test_weights_are_ones_without_gamma_and_finite_at_zero_snr() -> None:
    schedule = NoiseSchedule.from_config(SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    timesteps = torch.tensor([0, 500, 999])
    assert torch.equal(diffusion.loss_weights(schedule, timesteps, None), torch.ones(3))
    assert diffusion.loss_weights(schedule, timesteps, 5.0)[-1] == 0


def test_the_loss_is_the_weighted_mean_square() -> None:
    prediction, target, _ = tensors()
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    mine = diffusion.weighted_loss(prediction, target, weights)
    expected = torch.stack([torch.nn.functional.mse_loss(*pair) for pair in zip(prediction, target)]) * weights
    torch.testing.assert_close(mine, expected)
    mask = torch.zeros(5, 1, 6, 8)
    mask[..., :2] = 1.0  # a quarter counts, the rest a tenth
    mask[..., 2:] = 0.1
    error = (prediction - target).square()
    by_hand = (error[..., :2].sum(dim=(1, 2, 3)) + 0.1 * error[..., 2:].sum(dim=(1, 2, 3))) / (4 * 6 * 8) * weights
    torch.testing.assert_close(diffusion.weighted_loss(prediction, target, weights, mask), by_hand)


def test_the_loss_is_float32_where_half_would_overflow() -> None:
    prediction, target = torch.full((1, 4, 2, 2), 400.0).half(), torch.zeros(1, 4, 2, 2).half()
    loss = diffusion.weighted_loss(prediction, target, torch.ones(1))
    assert loss.dtype == torch.float32
    assert loss.item() == 160_000


# --- randomness ---


def test_draws_follow_from_their_key_alone() -> None:
    torch.manual_seed(1)
    first = diffusion.draw_noise(7, (4, 8, 8), 0.1)
    torch.manual_seed(2)
    assert torch.equal(first, diffusion.draw_noise(7, (4, 8, 8), 0.1))
    assert first.dtype == torch.float32
    assert not torch.equal(first, diffusion.draw_noise(8, (4, 8, 8), 0.1))
    state = torch.get_rng_state()
    diffusion.draw_noise(9, (4, 8, 8))
    assert torch.equal(state, torch.get_rng_state())


def test_purposes_of_a_key_are_independent_streams() -> None:
    noise = diffusion.draw_noise(7, (4, 64, 64)).flatten()
    latents = diffusion.draw_latents(7, torch.zeros(4, 64, 64), torch.ones(4, 64, 64)).flatten()
    for first, second in ((noise, latents), (noise, diffusion.draw_noise(8, (4, 64, 64)).flatten())):
        correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(len(first))


def test_a_subkey_is_63_bits_of_blake2b() -> None:
    """Written out: another formula would make every saved training go on with other noise."""
    digest = hashlib.blake2b(b"12345 noise", digest_size=8).digest()
    assert subkey(12345, "noise") == int.from_bytes(digest, "little") // 2
    assert 0 <= subkey(2**63 - 1, "timestep") < 2**63


def test_noise_is_standard_normal_and_offset_shifts_whole_channels() -> None:
    noise = torch.stack([diffusion.draw_noise(key, (4, 16, 16)) for key in range(200)])
    assert noise.mean().abs() < 0.01
    assert noise.var().item() == pytest.approx(1, abs=0.01)
    shifted = torch.stack([diffusion.draw_noise(key, (4, 16, 16), 0.5) for key in range(200)])
    shift = shifted - noise
    assert shift.var(dim=(2, 3)).max() < 1e-9  # one number for each channel of each draw
    assert shift.mean(dim=(2, 3)).std().item() == pytest.approx(0.5, rel=0.1)


def test_latents_are_samples_of_their_distribution() -> None:
    mean, std = torch.full((4, 8, 8), 2.0), torch.full((4, 8, 8), 0.5)
    drawn = torch.stack([diffusion.draw_latents(key, mean, std) for key in range(200)])
    assert drawn.mean().item() == pytest.approx(2, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(diffusion.draw_latents(3, mean, torch.zeros(4, 8, 8)), mean)


def test_timesteps_are_uniform() -> None:
    """Chi-squared of 20,000 draws in 20 cells: 19 degrees of freedom, 99.9 % below 43.8."""
    counts = torch.zeros(20)
    for key in range(20_000):
        counts[diffusion.draw_timestep(key, 1000) // 50] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert {diffusion.draw_timestep(key, 3) for key in range(50)} == {0, 1, 2}
