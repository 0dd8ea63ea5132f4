"""The generator against hand-called diffusers pipelines: same noise, same scheduler, same picture, pixel for pixel."""

import hashlib
import json
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from src import denoising, images
from src.config import AppConfig
from src.errors import ExitCode, UserError
from src.generator import Step, TextToImageGenerator
from src.request import PictureRequest
from src.schedulers import build_scheduler, find_sampler
from tests.tiny import pipelines

PROMPT, NEGATIVE = "a red circle left of a blue square", "green"
STEPS, GUIDANCE, SEED = 4, 5.0, 42


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"sd1": pipelines.save(pipelines.sd1(), root / "sd1"), "sdxl": pipelines.save(pipelines.sdxl(), root / "sdxl")}


def config_for(folder: Path, tmp_path: Path, **generation: object) -> AppConfig:
    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = str(folder), "fp32", "cpu"
    config.paths.cache, config.paths.outputs, config.paths.lora = (str(tmp_path / name) for name in ("cache", "out", "lora"))
    config.generation.num_inference_steps, config.generation.guidance_scale = STEPS, GUIDANCE
    for name, value in generation.items():
        setattr(config.generation, name, value)
    return config


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def loaded(request, folders, tmp_path_factory) -> TextToImageGenerator:
    """One generator for each family; a test that changes its configuration makes its own."""
    generator = TextToImageGenerator(config_for(folders[request.param], tmp_path_factory.mktemp("run")))
    generator.load_model()
    return generator


@pytest.fixture
def sd1(folders, tmp_path) -> TextToImageGenerator:
    return TextToImageGenerator(config_for(folders["sd1"], tmp_path))


def stock(generator: TextToImageGenerator):
    """The pipeline as diffusers itself loads it."""
    reference = DiffusionPipeline.from_pretrained(generator.config.model.model_id)
    reference.set_progress_bar_config(disable=True)
    return reference


def pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture).astype(int)


def largest_difference(first: Image.Image, second: Image.Image) -> int:
    return int(abs(pixels(first) - pixels(second)).max())


SETTINGS = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
SAMPLERS = ["DPM++ 2M Karras", "Euler a", "DDIM", "DPM++ 2M SDE", "LCM"]


# -- one picture


@pytest.mark.parametrize("name", SAMPLERS)
def test_text_to_image_equals_diffusers(loaded, name: str) -> None:
    reference = stock(loaded)
    reference.scheduler = build_scheduler(find_sampler(name), reference.scheduler.config)
    source = [torch.Generator("cpu").manual_seed(SEED)]
    expected = reference(PROMPT, width=64, height=96, generator=source, **SETTINGS).images[0]
    (mine,) = loaded.generate(PROMPT, NEGATIVE, width=64, height=96, seed=SEED, scheduler=name)
    assert mine.size == (64, 96)
    assert largest_difference(mine, expected) <= 1  # layers of ours on a CPU add up in another order


def test_without_guidance_equals_diffusers(loaded) -> None:
    reference = stock(loaded)
    reference.scheduler = build_scheduler(find_sampler("euler"), reference.scheduler.config)
    source = [torch.Generator("cpu").manual_seed(1)]
    expected = reference(PROMPT, num_inference_steps=2, guidance_scale=1.0, width=64, height=64, generator=source).images[0]
    (mine,) = loaded.generate(PROMPT, seed=1, scheduler="euler", num_inference_steps=2, guidance_scale=1.0)
    assert largest_difference(mine, expected) <= 1


def test_a_negative_prompt_that_is_not_drawn_does_not_lengthen_the_prompt(sd1) -> None:
    """Without guidance the U-Net reads the prompt alone: the one window that it fills, however long the negative one is."""
    lengths: list[int] = []
    note_length = lambda _, args, named: lengths.append(named["encoder_hidden_states"].shape[1])  # noqa: E731
    sd1.model.pipeline.unet.register_forward_pre_hook(note_length, with_kwargs=True)
    for guidance in (1.0, 5.0):
        (picture,) = sd1.generate(PROMPT, "blue, " * 80, seed=1, guidance_scale=guidance, num_inference_steps=1)
        assert json.loads(picture.info["recipe"])["negative_prompt"] == "blue, " * 80
    assert lengths == [77, 3 * 77]


def gradient(width: int, height: int) -> Image.Image:
    ramp = numpy.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype("uint8")
    return Image.fromarray(ramp)


def test_image_to_image_equals_diffusers(loaded) -> None:
    kind = StableDiffusionXLImg2ImgPipeline if loaded.model.family == "SDXL" else StableDiffusionImg2ImgPipeline
    reference = kind(
        **stock(loaded).components, **({} if loaded.model.family == "SDXL" else {"requires_safety_checker": False})
    )
    reference.set_progress_bar_config(disable=True)
    start, source = gradient(64, 64), [torch.Generator("cpu").manual_seed(SEED)]
    expected = reference(PROMPT, image=start, strength=0.6, generator=source, **SETTINGS).images[0]
    (mine,) = loaded.generate(PROMPT, NEGATIVE, init_image=start, strength=0.6, seed=SEED)
    assert largest_difference(mine, expected) <= 1


def test_inpainting_equals_diffusers_inside_and_the_original_outside(loaded) -> None:
    kind = StableDiffusionXLInpaintPipeline if loaded.model.family == "SDXL" else StableDiffusionInpaintPipeline
    reference = kind(
        **stock(loaded).components, **({} if loaded.model.family == "SDXL" else {"requires_safety_checker": False})
    )
    reference.set_progress_bar_config(disable=True)
    start, source = gradient(64, 64), [torch.Generator("cpu").manual_seed(SEED)]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    expected = reference(
        PROMPT, image=start, mask_image=mask, strength=0.8, width=64, height=64, generator=source, **SETTINGS
    ).images[0]
    (mine,) = loaded.generate(PROMPT, NEGATIVE, init_image=start, mask_image=mask, strength=0.8, seed=SEED)
    assert numpy.array_equal(pixels(mine)[:, :32], pixels(start)[:, :32])
    assert abs(pixels(mine)[:, 32:] - pixels(expected)[:, 32:]).max() <= 1


def test_an_inpainting_unet_with_nine_channels_equals_diffusers(tmp_path) -> None:
    tiny = pipelines.sd1(in_channels=9)
    folder = pipelines.save(
        StableDiffusionInpaintPipeline(**tiny.components, requires_safety_checker=False), tmp_path / "inpaint"
    )
    generator = TextToImageGenerator(config_for(folder, tmp_path))
    reference = StableDiffusionInpaintPipeline(**tiny.components, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    start, mask = gradient(64, 64), Image.new("L", (64, 64), 255)
    source = [torch.Generator("cpu").manual_seed(SEED)]
    expected = reference(
        PROMPT, image=start, mask_image=mask, strength=1.0, generator=source, width=64, height=64, **SETTINGS
    ).images[0]
    (mine,) = generator.generate(PROMPT, NEGATIVE, init_image=start, mask_image=mask, strength=1.0, seed=SEED)
    assert largest_difference(mine, expected) <= 1
    settings = {"init_image": start, "mask_image": mask, "strength": 0.8}
    alone = [generator.generate(PROMPT, seed=index, **settings)[0] for index in range(2)]
    together = generator.generate(PROMPT, seed=0, num_images=2, batch_size=2, **settings)
    assert max(map(largest_difference, alone, together)) <= 1
    with pytest.raises(UserError, match="--mask"):
        generator.generate(PROMPT)


@pytest.mark.parametrize(("strength", "sampler"), [(0.8, "euler_a"), (1.0, "dpm++_2m_karras"), (0.8, "ddim"), (1.0, "ddim")])
def test_inpainting_with_any_latents_equals_diffusers_where_that_knows_them(sd1, monkeypatch, strength, sampler) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 0, 64, 40))
    start = gradient(64, 64)
    options = {"init_image": start, "mask_image": mask, "strength": strength, "seed": SEED, "scheduler": sampler}
    expected = sd1.generate(PROMPT, NEGATIVE, **options, num_images=2, batch_size=2)
    monkeypatch.setattr(denoising, "_has_other_latents", lambda pipeline: True)
    found = sd1.generate(PROMPT, NEGATIVE, **options, num_images=2, batch_size=2)
    assert max(map(largest_difference, found, expected)) == 0
    steps: list[float] = []
    sd1.generate(PROMPT, NEGATIVE, **options, on_step=lambda step: steps.append(step.latents().shape[1]))
    assert steps == [4] * int(STEPS * strength)


def test_image_to_image_with_twelve_latents_equals_diffusers(tmp_path) -> None:
    tiny = pipelines.sd1(in_channels=12, latent_channels=12)
    generator = TextToImageGenerator(config_for(pipelines.save(tiny, tmp_path / "twelve"), tmp_path))
    reference = StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    start, source = gradient(64, 64), [torch.Generator("cpu").manual_seed(SEED)]
    expected = reference(PROMPT, image=start, strength=0.6, generator=source, **SETTINGS).images[0]
    (mine,) = generator.generate(PROMPT, NEGATIVE, init_image=start, strength=0.6, seed=SEED)
    assert largest_difference(mine, expected) <= 1
    everywhere = Image.new("L", (64, 64), 255)
    (painted,) = generator.generate(PROMPT, NEGATIVE, init_image=start, mask_image=everywhere, strength=0.6, seed=SEED)
    assert largest_difference(painted, mine) == 0, "all of it is repainted"


# -- seeds


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "Euler a", "DPM++ SDE", "DPM++ 2M SDE Karras", "DDPM"])
def test_a_picture_is_the_same_at_any_batch_size(sd1, name: str) -> None:
    alone = [sd1.generate(PROMPT, seed=SEED + index, scheduler=name)[0] for index in range(3)]
    for batch_size in (1, 2, 3):
        together = sd1.generate(PROMPT, seed=SEED, num_images=3, batch_size=batch_size, scheduler=name)
        assert max(map(largest_difference, alone, together)) <= 1, batch_size
    assert largest_difference(alone[0], alone[1]) > 20, "different seeds must give different pictures"


def test_a_neighbours_longer_prompt_does_not_change_a_picture(sd1, tmp_path) -> None:
    """Wildcards give each picture its own prompt; a short one must not be filled up to a long one's windows."""
    prompt = "{a red circle|" + "a blue square, " * 30 + "}"
    together = sd1.generate(prompt, seed=1, num_images=6, batch_size=6)
    texts = [json.loads(picture.info["recipe"])["prompt"] for picture in together]
    assert len({len(text) for text in texts}) == 2, "the seeds must give both"
    for index, text in enumerate(texts):
        assert largest_difference(together[index], sd1.generate(text, seed=1 + index)[0]) <= 1


def test_a_random_seed_is_drawn_and_recorded(sd1) -> None:
    first, second = (sd1.generate(PROMPT)[0] for _ in range(2))
    seeds = [json.loads(picture.info["recipe"])["seed"] for picture in (first, second)]
    assert seeds[0] != seeds[1]
    assert largest_difference(first, sd1.generate(PROMPT, seed=seeds[0])[0]) == 0


def test_seeds_wrap_at_32_bits(sd1) -> None:
    pictures = sd1.generate(PROMPT, seed=2**32 - 1, num_images=2)
    assert [json.loads(picture.info["recipe"])["seed"] for picture in pictures] == [2**32 - 1, 0]


def test_a_prompt_out_of_a_recipe_is_final(sd1) -> None:
    """Its wildcards were filled in when it was recorded; braces that are left were meant as braces."""
    request = PictureRequest.from_config(sd1.config.generation, "a {red|blue} circle", seed=1, wildcards=False)
    (picture,) = sd1.draw(request)
    assert json.loads(picture.info["recipe"])["prompt"] == "a {red|blue} circle"


def test_image_to_image_is_the_same_at_any_batch_size(sd1, tmp_path) -> None:
    mask = Image.new("L", (64, 64), 255)
    for settings in (
        {"init_image": gradient(64, 64)},
        {"init_image": gradient(64, 64), "mask_image": mask, "scheduler": "Euler a"},
    ):
        alone = [sd1.generate(PROMPT, seed=SEED + index, **settings)[0] for index in range(2)]
        together = sd1.generate(PROMPT, seed=SEED, num_images=2, batch_size=2, **settings)
        assert max(map(largest_difference, alone, together)) <= 1


# -- files and recipes


@pytest.mark.parametrize("prefix", ["../x", "a/b", "..\\x", "a\0b"])
def test_a_prefix_is_a_name_and_no_path(sd1, tmp_path, prefix: str) -> None:
    with pytest.raises(UserError):
        sd1.save_images([gradient(64, 64)], prefix=prefix)
    assert not [path for path in tmp_path.rglob("*.png")]


def test_saved_pictures_carry_their_recipe_and_never_overwrite(sd1, tmp_path) -> None:
    pictures = sd1.generate(PROMPT, NEGATIVE, seed=SEED, num_images=2)
    paths = sd1.save_images(pictures, prefix="garden") + sd1.save_images(pictures, prefix="garden")
    assert len({path.name for path in paths}) == 4
    assert all(path.parent == tmp_path / "out" and path.name.startswith("garden_20") for path in paths)
    with Image.open(paths[1]) as saved:
        recipe = json.loads(saved.info["recipe"])
        assert "Seed: 43" in saved.info["parameters"]
        assert numpy.array_equal(pixels(saved), pixels(pictures[1]))
    assert (recipe["seed"], recipe["width"], recipe["scheduler"], recipe["negative_prompt"]) == (
        43,
        64,
        "dpm++_2m_karras",
        NEGATIVE,
    )
    assert str(tmp_path) not in json.dumps(recipe)


def test_steps_are_reported_to_the_end(sd1) -> None:
    steps: list[Step] = []
    sd1.generate(PROMPT, seed=1, num_images=3, batch_size=2, on_step=steps.append)
    assert [(step.pictures_done, step.batch_size) for step in steps] == [(0, 2)] * STEPS + [(2, 1)] * STEPS
    assert [step.fraction for step in steps[:STEPS]] == [0.25, 0.5, 0.75, 1.0]
    assert steps[0].latents().shape[1:] == (4, 8, 8)


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "Euler", "Euler a", "Heun", "DDIM", "UniPC", "DPM2 Karras", "LCM"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_estimate_of_the_finished_latents_is_exact_for_a_perfect_unet(name: str, prediction_type: str) -> None:
    """Noise known latents to each timestep by the closed form and predict that very noise: they must come back."""
    scheduler = build_scheduler(find_sampler(name), pipelines.scheduler(prediction_type).config)
    scheduler.set_timesteps(8)
    table = scheduler.alphas_cumprod.double()
    clean, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for timestep in scheduler.timesteps[:8].tolist():
        low = int(timestep)
        a = table[low] + (timestep - low) * (table[min(low + 1, 999)] - table[low])
        sample = a.sqrt() * clean + (1 - a).sqrt() * eps
        velocity = a.sqrt() * eps - (1 - a).sqrt() * clean
        sample = sample / a.sqrt() if float(scheduler.init_noise_sigma) > 1.5 else sample
        prediction = velocity if prediction_type == "v_prediction" else eps
        torch.testing.assert_close(
            denoising.estimate_clean(scheduler, prediction, timestep, sample), clean, rtol=1e-6, atol=1e-6
        )


def test_previews_show_what_the_picture_becomes(sd1) -> None:
    """The last estimate of a DDIM run is its result; the preview of it is the picture itself."""
    steps: list[Step] = []
    (picture,) = sd1.generate(PROMPT, seed=1, scheduler="ddim", on_step=steps.append)
    assert largest_difference(sd1.preview(steps[-1].latents())[0], picture) <= 12


# -- what can go wrong


def test_pictures_are_recorded_as_they_were_read_whatever_becomes_of_them(sd1, tmp_path) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    gradient(64, 64).save(start), Image.new("L", (64, 64), 255).save(mask)
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (start, mask)]
    settings = {"init_image": start, "mask_image": mask, "num_images": 2, "seed": 1}
    pictures = sd1.draw(PictureRequest.from_config(sd1.config.generation, PROMPT, **settings))
    first = next(pictures)
    start.unlink(), mask.write_bytes(b"another")
    for picture in (first, next(pictures)):
        recipe = json.loads(picture.info["recipe"])
        assert [recipe[name]["sha256"] for name in ("init_image", "mask")] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "nearest: 96 or 104"),
        ({"height": -8}, "outside"),
        ({"num_inference_steps": 0}, "steps"),
        ({"scheduler": "nope"}, "unknown scheduler"),
        ({"seed": -5}, "seed"),
        ({"clip_skip": 9}, "3 layers"),
        ({"init_image": gradient(64, 64), "strength": 0.01}, "no step at all"),
        ({"init_image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_wrong_requests_are_one_line(sd1, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sd1.generate(PROMPT, **settings)
    assert "\n" not in str(caught.value)


def test_out_of_memory_is_exit_code_3(sd1, monkeypatch) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(sd1.model.pipeline.unet, "forward", run_out)
    with pytest.raises(UserError, match="batch size 1") as caught:
        sd1.generate(PROMPT)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY


def test_numbers_that_are_none_are_reported_not_saved(sd1) -> None:
    with torch.no_grad():
        sd1.model.pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="fp32"):
        sd1.generate(PROMPT)


def test_a_vae_that_overflows_is_run_again_in_fp32(folders, tmp_path) -> None:
    """A bf16 VAE whose weights overflow in no precision but give NaN in bf16 is simulated by one NaN hook on bf16 input."""
    config = config_for(folders["sdxl"], tmp_path)
    config.model.precision = "bf16"
    lines: list[str] = []
    generator = TextToImageGenerator(config, lines.append)
    vae = generator.model.pipeline.vae
    vae.decoder.conv_out.register_forward_hook(
        lambda _, __, output: output * float("nan") if output.dtype == torch.bfloat16 else output
    )
    (picture,) = generator.generate(PROMPT, seed=1)
    assert pixels(picture).std() > 0
    assert vae.dtype == torch.float32
    assert any("fp32" in line for line in lines)


def test_unload_frees_and_loads_again(sd1) -> None:
    before = sd1.generate(PROMPT, seed=3)[0]
    sd1.unload()
    assert sd1._model is None
    assert largest_difference(before, sd1.generate(PROMPT, seed=3)[0]) == 0


@pytest.mark.parametrize(
    ("picture_px", "native_px", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((768, 512), 512, (768, 512)),
        ((3000, 2000), 512, (888, 592)),
        ((500, 333), 512, (496, 336)),
        ((20, 20), 512, (64, 64)),
    ],
)
def test_the_size_follows_the_picture_that_is_drawn_over(picture_px, native_px, expected) -> None:
    assert images.fitting_size(picture_px, native_px) == expected
