"""Samplers: every name resolves, every sampler draws, and the model's noise schedule is kept."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from src.config import GenerationConfig
from src.errors import UserError
from src.model_files import ARCHITECTURES
from src.schedulers import (
    PRESETS,
    SAMPLERS,
    Sampler,
    SamplerChoice,
    apply_preset,
    build_scheduler,
    find_sampler,
    list_schedulers,
)
from tests.tiny import pipelines

ALL = [SamplerChoice(sampler, schedule) for sampler in SAMPLERS for schedule in ("", *sampler.schedules)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("DPM++ 2M Karras", "dpm++_2m_karras"), ("dpm++_2m_karras", "dpm++_2m_karras"), ("dpmpp_2m_karras", "dpm++_2m_karras"),
        ("dpmpp-2m", "dpm++_2m"), ("DPM++ 2M SDE Karras", "dpm++_2m_sde_karras"), ("DPM++ SDE", "dpm++_sde"), ("Euler a", "euler_a"),
        ("euler_a", "euler_a"), ("k_euler_a", "euler_a"), ("EulerAncestralDiscreteScheduler", "euler_a"), ("euler_ancestral", "euler_a"),
        ("Euler", "euler"), ("Heun", "heun"), ("LMS Karras", "lms_karras"), ("DPM2 a Karras", "dpm2_a_karras"), ("DDIM", "ddim"),
        ("DDPM", "ddpm"), ("PLMS", "pndm"), ("pndm", "pndm"), ("UniPC", "unipc"), ("LCM", "lcm"), ("DPM++ 2M SGM Uniform", "dpm++_2m_sgm_uniform"),
        ("DPM++ 2M Simple", "dpm++_2m_sgm_uniform"), ("DDIM Uniform", "ddim"), ("Euler Beta", "euler_beta"),
    ],
)  # fmt: skip
def test_known_spellings(name: str, key: str) -> None:
    assert find_sampler(name).key == key


@pytest.mark.parametrize("choice", ALL, ids=lambda choice: choice.key)
def test_every_listed_name_finds_itself(choice: SamplerChoice) -> None:
    assert find_sampler(choice.key) == find_sampler(choice.label) == choice


@pytest.mark.parametrize(
    "name", ["eulr", "", "ddim_karras", "lcm karras", "DPM++ SDE Simple", "Restart", "DPM++ 2M Karras Karras"]
)
def test_unknown_names_and_impossible_schedules_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="scheduler"):
        find_sampler(name)


@pytest.fixture(scope="module")
def pipeline():
    tiny = pipelines.sd1()
    tiny.set_progress_bar_config(disable=True)
    return tiny


@pytest.mark.parametrize("choice", ALL, ids=lambda choice: choice.key)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_sampler_draws_finite_latents(pipeline, choice: SamplerChoice, steps: int) -> None:
    embeds = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    pipeline.scheduler = build_scheduler(choice, pipelines.scheduler().config)
    latents = pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), num_inference_steps=steps, width=64, height=64,
        output_type="latent", generator=[torch.Generator().manual_seed(1)],
    ).images  # fmt: skip
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("choice", ALL, ids=lambda choice: choice.key)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_models_noise_schedule_is_kept(choice: SamplerChoice, prediction_type: str) -> None:
    """The reference is the closed form of scaled_linear betas, not the scheduler it was built from."""
    built = build_scheduler(choice, pipelines.scheduler(prediction_type).config)
    start, end = math.sqrt(0.00085), math.sqrt(0.012)
    betas = (torch.linspace(0, 1, 1000, dtype=torch.float64) * (end - start) + start) ** 2
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(built.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)
    assert built.config.prediction_type == prediction_type
    if "steps_offset" in inspect.signature(type(built).__init__).parameters:
        assert built.config.steps_offset == 1


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.key)
def test_a_real_models_own_config_gives_what_diffusers_makes_of_it(architecture: str, sampler: Sampler) -> None:
    """The class that a model ships with has defaults of its own, which are not the model's: PNDM's spacing is "leading"."""
    own = DiffusionPipeline.load_config(ARCHITECTURES / architecture)["scheduler"][1]
    model = getattr(diffusers, own).from_pretrained(ARCHITECTURES / architecture / "scheduler")
    expected = getattr(diffusers, sampler.class_name).from_config(model.config, **sampler.options)
    mine = build_scheduler(SamplerChoice(sampler), dict(model.config))
    for scheduler in (expected, mine):
        scheduler.set_timesteps(25)
    assert torch.equal(mine.timesteps, expected.timesteps)
    torch.testing.assert_close(mine.init_noise_sigma, expected.init_noise_sigma)


def test_karras_sigmas_are_karras() -> None:
    """Karras et al. 2022, equation 5 with rho = 7, between the schedule's own extremes."""
    scheduler = build_scheduler(find_sampler("DPM++ 2M Karras"), pipelines.scheduler().config)
    scheduler.set_timesteps(10)
    low, high, rho = scheduler.sigmas[-2].item(), scheduler.sigmas[0].item(), 7
    ramp = torch.linspace(0, 1, 10)
    expected = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    torch.testing.assert_close(scheduler.sigmas[:-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_steps_guidance_and_sampler_together(name: str) -> None:
    generation = GenerationConfig()
    apply_preset(generation, name)
    preset = PRESETS[name]
    assert (generation.num_inference_steps, generation.guidance_scale) == (preset.num_inference_steps, preset.guidance_scale)
    assert generation.num_inference_steps <= 8
    assert generation.guidance_scale <= 2
    build_scheduler(find_sampler(generation.scheduler), pipelines.scheduler().config).set_timesteps(
        generation.num_inference_steps
    )


def test_trailing_spacing_ends_at_the_last_timestep() -> None:
    """Few-step models are distilled at the noisiest timestep: with "leading" spacing it would never be visited."""
    scheduler = build_scheduler(find_sampler("euler_sgm_uniform"), pipelines.scheduler().config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a1111s_simple_schedule_is_trailing() -> None:
    """Its simple_scheduler takes sigmas[-(1 + int(i * 1000 / n))], so the timestep 999 - int(i * 1000 / n)."""
    scheduler = build_scheduler(find_sampler("Euler Simple"), pipelines.scheduler().config)
    for steps in (1, 4, 20, 61):
        scheduler.set_timesteps(steps)
        theirs = torch.tensor([999 - i * 1000 // steps for i in range(steps)])
        assert (scheduler.timesteps - theirs).abs().max() <= 1
        table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        torch.testing.assert_close(scheduler.sigmas[:-1], table[theirs], rtol=0.04, atol=0)  # a timestep more or less


@pytest.mark.parametrize("spacing", [None, "leading"])
@pytest.mark.parametrize("choice", ALL, ids=lambda choice: choice.key)
def test_a_single_step_begins_at_noise(choice: SamplerChoice, spacing: str | None) -> None:
    """All noise of the schedule is taken away in it: of timestep 999, whatever spacing the model's own file names."""
    config = {**pipelines.scheduler().config, **({"timestep_spacing": spacing, "_use_default_values": []} if spacing else {})}
    scheduler = build_scheduler(choice, config)
    for steps in (1, 2, 1):
        scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == 1
    assert 998 <= scheduler.timesteps[0] <= 999
    a = scheduler.alphas_cumprod[-1].item()
    if scheduler.init_noise_sigma > 1.5:  # Euler and its kin
        assert float(scheduler.init_noise_sigma) == pytest.approx(((1 - a) / a) ** 0.5, rel=1e-3)


TRAILING = [SamplerChoice(sampler, "sgm_uniform") for sampler in SAMPLERS if "sgm_uniform" in sampler.schedules]
CHEAP = ("ddim", "euler", "dpm++_2m")  # the first of them destroys its sample at timestep -1


@pytest.mark.parametrize("choice", TRAILING, ids=lambda choice: choice.key)
def test_trailing_steps_are_as_many_as_asked_for(choice: SamplerChoice) -> None:
    """Step i of n lies at T - i T / n, counted from 1 and rounded; for 62 of the numbers diffusers gives one more, at -1."""
    scheduler = build_scheduler(choice, pipelines.scheduler().config)
    for steps in range(1, 1001) if choice.sampler.key in CHEAP else (2, 60, 61, 103):
        scheduler.set_timesteps(steps)
        places = scheduler.timesteps.double()
        if choice.sampler.key in ("heun", "dpm2", "dpm2_a"):  # those between two steps left out
            places = places[torch.arange(len(places)) % 2 == 0]
        if choice.sampler.key == "pndm":  # its second step is there twice
            places = torch.cat([places[:1], places[1 + (steps > 1) :]])
        exact = 1000 - torch.arange(steps, dtype=torch.float64) * 1000 / steps - 1
        assert len(places) == steps
        assert (places - exact).abs().max() <= 0.5 + 1e-9, steps
        assert (scheduler.num_inference_steps, type(scheduler.num_inference_steps)) == (steps, int)


def test_noise_levels_that_are_spaced_anew_over_a_trailing_model_keep_their_number() -> None:
    config = {**pipelines.scheduler().config, "timestep_spacing": "trailing", "_use_default_values": []}
    for name in ("Euler Karras", "DPM++ 2M Exponential", "Heun Beta"):
        scheduler = build_scheduler(find_sampler(name), config)
        scheduler.set_timesteps(61)
        assert len(scheduler.sigmas.unique()) == 62


def test_the_list_names_every_sampler() -> None:
    text = list_schedulers()
    assert all(sampler.key in text and sampler.label in text for sampler in SAMPLERS)
