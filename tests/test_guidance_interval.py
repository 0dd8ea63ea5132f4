"""The guidance interval against diffusers' pipelines with their documented callback, and with a U-Net that is always whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from src import denoising
from src.config import AppConfig
from src.generator import TextToImageGenerator
from src.guidance_interval import limit_guidance
from src.schedulers import build_scheduler, find_sampler
from tests.tiny import pipelines

PROMPT, NEGATIVE = "a red circle left of a blue square", "green"
STEPS, GUIDANCE, SEED = 6, 40.0, 42  # a random model hardly hears its prompt


def generator_for(folder: Path, tmp_path: Path) -> TextToImageGenerator:
    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = str(folder), "fp32", "cpu"
    config.paths.cache, config.paths.lora = str(tmp_path / "cache"), str(tmp_path / "lora")
    config.generation.num_inference_steps, config.generation.guidance_scale = STEPS, GUIDANCE
    config.generation.negative_prompt, config.generation.seed = NEGATIVE, SEED
    return TextToImageGenerator(config)


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd1 of nine channels"])
def generator(request, tmp_path_factory) -> TextToImageGenerator:
    make = {"sd1": pipelines.sd1, "sdxl": pipelines.sdxl, "sd1 of nine channels": lambda: pipelines.sd1(in_channels=9)}
    folder = tmp_path_factory.mktemp("model")
    generator = generator_for(pipelines.save(make[request.param](), folder / "model"), folder)
    generator.load_model()
    return generator


def pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture).astype(int)


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(abs(pixels(one) - pixels(other)).max())


def pictures_to_start_from(generator: TextToImageGenerator) -> list[dict]:
    rng = numpy.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=numpy.uint8))
    mask = Image.fromarray((rng.random((64, 64)) < 0.5).astype(numpy.uint8) * 255)
    inpaint = {"init_image": picture, "mask_image": mask, "strength": 0.9}
    if generator.model.pipeline.unet.config.in_channels == 9:
        return [inpaint]
    return [{}, {"init_image": picture, "strength": 0.9}, inpaint]


def batch_sizes(unet: torch.nn.Module) -> tuple[list[int], object]:
    sizes: list[int] = []
    return sizes, unet.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))


def without_guidance_outside(unet: torch.nn.Module, start: float, end: float) -> object:
    """A U-Net that computes both halves at every step, and outside of the interval answers the prompt's for both."""

    def equal_halves(_, args, output):
        guided = start <= (1000 - float(args[1])) / 1000 <= end
        return None if guided else (output[0].chunk(2)[1].repeat(2, 1, 1, 1),)

    return unet.register_forward_hook(equal_halves)


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.8), (0.0, 0.5), (0.5, 1.0)])
def test_every_mode_draws_as_if_both_halves_were_computed(generator, start, end) -> None:
    unet = generator.model.pipeline.unet
    for mode in pictures_to_start_from(generator):
        sizes, handle = batch_sizes(unet)
        (drawn,) = generator.generate(PROMPT, guidance_start=start, guidance_end=end, **mode)
        handle.remove()
        handle = without_guidance_outside(unet, start, end)
        (wanted,) = generator.generate(PROMPT, **mode)
        handle.remove()
        assert difference(drawn, wanted) <= 1
        assert difference(drawn, generator.generate(PROMPT, **mode)[0]) > 1
        assert set(sizes) == {1, 2}
        turns = sum(before != after for before, after in pairwise(sizes))
        assert turns == (start > 0) + (end < 1)  # outside, inside, outside
        assert sizes[0] == (1 if start > 0 else 2)


def test_diffusers_own_way_gives_the_same_picture(tmp_path) -> None:
    """Dynamic guidance as diffusers documents it: the callback sets the scale to 0 and halves the prompts, once."""
    generator = generator_for(pipelines.save(pipelines.sd1(), tmp_path / "model"), tmp_path)
    (drawn,) = generator.generate(PROMPT, guidance_end=0.5, scheduler="Euler")
    stock = DiffusionPipeline.from_pretrained(generator.config.model.model_id)
    stock.scheduler = build_scheduler(find_sampler("Euler"), generator.model.scheduler_config)
    stock.set_progress_bar_config(disable=True)

    def stop_guiding(pipeline, step, timestep, tensors):
        following = pipeline.scheduler.timesteps[step + 1 : step + 2]
        if len(following) and 1 - float(following) / 1000 > 0.5 and pipeline.do_classifier_free_guidance:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    latents = denoising.noise(denoising.generators([SEED]), 4, 8, 8)
    options = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": latents}
    ends = {"callback_on_step_end": stop_guiding, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert difference(drawn, stock(PROMPT, **options, **ends).images[0]) <= 1


@pytest.mark.parametrize("sampler", ["Heun", "Euler a", "DPM++ 2M SDE", "PLMS", "DPM2"])
def test_every_sampler_goes_with_every_option_at_any_batch_size(generator, sampler) -> None:
    """The same picture alone and in a batch of three; previews get their latents; nothing is left behind."""
    (mode, *_) = pictures_to_start_from(generator)
    cheaper = {"deep_cache": 2, "token_merging": 0.5, "guidance_start": 0.2, "guidance_end": 0.8, "scheduler": sampler, **mode}
    finite = []
    alone = generator.generate(
        PROMPT, seed=SEED + 1, on_step=lambda step: finite.append(step.latents().isfinite().all()), **cheaper
    )
    together = generator.generate(PROMPT, num_images=3, batch_size=3, **cheaper)
    assert difference(alone[0], together[1]) <= 1
    assert all(finite)
    assert len(finite) >= STEPS - 1  # at strength 0.9 one less
    unet = generator.model.pipeline.unet
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())


def test_the_defaults_are_no_hook_and_the_same_bits(generator) -> None:
    unet = generator.model.pipeline.unet
    (mode, *_) = pictures_to_start_from(generator)
    hooks = []
    watch = unet.register_forward_pre_hook(lambda *_: hooks.append([len(m._forward_pre_hooks) for m in unet.modules()]))
    (plain,) = generator.generate(PROMPT, **mode)
    (named,) = generator.generate(PROMPT, deep_cache=1, token_merging=0.0, guidance_start=0.0, guidance_end=1.0, **mode)
    watch.remove()
    assert difference(plain, named) == 0
    assert {sum(counts) for counts in hooks} == {1}  # the one that watches
    assert limit_guidance(unet, 0.0, 1.0, 1000) == []


def test_a_unet_that_is_told_the_scale_is_never_halved(tmp_path) -> None:
    """LCM models take the scale as an input (time_cond_proj_dim): their batch has no halves, it is the pictures."""
    pipeline = pipelines.sd1()
    torch.manual_seed(0)
    facts = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    pipeline.register_modules(unet=UNet2DConditionModel(**facts | {"time_cond_proj_dim": 16}))
    generator = generator_for(pipelines.save(pipeline, tmp_path / "model"), tmp_path)
    plain = generator.generate(PROMPT, num_images=2, batch_size=2)
    limited = generator.generate(PROMPT, num_images=2, batch_size=2, guidance_end=0.5)
    assert [difference(*pair) for pair in zip(plain, limited)] == [0, 0]
    said: list[str] = []
    generator.say = said.append
    generator.generate(PROMPT, negative_prompt="", num_inference_steps=1, guidance_end=0.5)
    generator.generate(PROMPT, negative_prompt="", num_inference_steps=1)
    assert said == [
        "idle    the guidance interval does nothing: this U-Net is told the guidance scale, and draws the prompt alone"
    ]
    assert difference(*plain) > 1


@pytest.mark.parametrize("make", [pipelines.sd1, pipelines.sdxl])
def test_outside_both_halves_are_the_prompts(make) -> None:
    """The second half of every input, the first being the negative prompt's; the limits themselves are inside."""
    unet, random = make().unet, torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=random) for shape in ((4, 4, 8, 8), (4, 7, unet.config.cross_attention_dim)))
    named = {"encoder_hidden_states": 10 * text, "return_dict": False}
    if unet.config.addition_embed_type:
        pooled, sizes = torch.randn(4, 40, generator=random), torch.full((4, 6), 64.0)
        named["added_cond_kwargs"] = {"text_embeds": 10 * pooled, "time_ids": sizes}
    with torch.no_grad():
        (whole,), (later,) = (unet(sample, torch.tensor(time), **named) for time in (500, 501))
        limit_guidance(unet, 0.5, 0.9, 1000)
        assert torch.equal(unet(sample, torch.tensor(500), **named)[0], whole)
        (outside,) = unet(sample, torch.tensor(501), **named)
    assert torch.equal(outside[:2], outside[2:])
    torch.testing.assert_close(outside[2:], later[2:])
    assert (outside[2:] - later[:2]).abs().max() > 0.1
