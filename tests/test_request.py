"""One request: every setting has its type and range before anything is loaded; one that has not is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from src.arguments import FLAG_OF
from src.config import GenerationConfig
from src.errors import ExitCode, UserError
from src.request import LoraChoice, PictureRequest
from src.schedulers import SAMPLERS, build_scheduler, find_sampler

PICTURE = Image.new("RGB", (8, 8))


def request(**settings: Any) -> PictureRequest:
    made = PictureRequest(**{"prompt": "x", **settings})
    made.check()
    return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "42"}, "seed: expected a whole number, got '42'"),
        ({"seed": True}, "seed: expected a whole number, got True"),
        ({"seed": 1.0}, "seed: expected a whole number, got 1.0"),
        ({"width": "128"}, "width: expected a whole number, got '128'"),
        ({"height": 128.5}, "height: expected a whole number"),
        ({"num_inference_steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"num_images": None}, "number of pictures: expected a whole number, got None"),
        ({"guidance_scale": "7"}, "guidance scale: expected a number, got '7'"),
        ({"guidance_scale": False}, "guidance scale: expected a number, got False"),
        ({"guidance_scale": 10**400}, "guidance scale"),
        ({"deep_cache": 2.0}, "deep cache: expected a whole number, got 2.0"),
        ({"token_merging": "0.5"}, "token merging: expected a number, got '0.5'"),
        ({"guidance_start": None}, "guidance start: expected a number, got None"),
        ({"strength": 1j}, "strength: expected a number, got complex"),
        ({"scheduler": 3}, "scheduler: expected text, got 3"),
        ({"prompt": None}, "prompt: expected text, got None"),
        ({"prompt": ["a", "b"]}, "prompt: expected text, got ['a', 'b']"),
        ({"negative_prompt": 5}, "negative prompt: expected text, got 5"),
        ({"prompt_weights": 1}, "prompt weights: expected true or false, got 1"),
        ({"init_image": numpy.zeros((8, 8, 3))}, "init image: expected a path or a PIL image, got ndarray"),
        ({"init_image": PICTURE, "mask_image": 3}, "mask image: expected a path"),
        ({"loras": "ink"}, "loras: expected a sequence of LoraChoice, got 'ink'"),
        ({"loras": ["ink"]}, "loras: expected LoraChoice(path, weight), got 'ink'"),
    ],
)
def test_a_wrong_type_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        request(**settings)
    assert message in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"num_inference_steps": 0}, "use 1 to 1,000"),
        ({"batch_size": 257}, "use 1 to 256"),
        ({"seed": 2**32}, "use 0 to 4,294,967,295"),
        ({"seed": -2}, "use 0 to"),
        ({"width": 8}, "use one in between, e.g. 512"),
        ({"width": 65}, "nearest: 64 or 72"),
        ({"guidance_scale": float("nan")}, "use one such as"),
        ({"guidance_scale": 101}, "5 to 9 is usual"),
        ({"deep_cache": 0}, "use 1 to 50"),
        ({"token_merging": 0.8}, "use 0.5, or 0 for none"),
        ({"token_merging": -0.1}, "use 0.5, or 0 for none"),
        ({"guidance_start": 0.8, "guidance_end": 0.2}, "0.2:0.8 is usual"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "0.2:0.8 is usual"),
        ({"guidance_end": 1.5}, "0.2:0.8 is usual"),
        ({"init_image": PICTURE, "strength": 0}, "0.6 keeps the layout, 1 hardly anything"),
        ({"num_inference_steps": 51, "scheduler": "LCM"}, "LCM takes 50 at most"),
        ({"num_inference_steps": 51, "scheduler": "tcd"}, "TCD takes 50 at most"),
        ({"mask_image": PICTURE}, "--init-image FILE"),
    ],
)
def test_a_range_error_says_what_to_use(settings: dict[str, Any], step: str) -> None:
    with pytest.raises(UserError) as caught:
        request(**settings)
    assert step in str(caught.value)


@pytest.mark.parametrize("name", [sampler.key for sampler in SAMPLERS])
def test_diffusers_takes_the_most_steps_that_a_request_may_ask_for_and_no_more(name: str) -> None:
    most = find_sampler(name).sampler.max_steps
    scheduler = build_scheduler(find_sampler(name), {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"})
    request(num_inference_steps=most or 1000, scheduler=name)
    scheduler.set_timesteps(most or 50)
    if most is not None:
        with pytest.raises(ValueError, match="50"):
            scheduler.set_timesteps(most + 1)


def test_at_strength_1_something_of_the_picture_is_left() -> None:
    """diffusers adds the noise of timestep 999 to it: sqrt(a) is left, which is 7 %; so no text may say that it is ignored."""
    scheduler = build_scheduler(
        find_sampler("ddim"), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    )
    assert 0.06 < scheduler.alphas_cumprod[999].sqrt() < 0.08
    assert "ignores" not in "".join(flag.help for flag in FLAG_OF.values())


def test_what_acts_by_guidance_alone_is_idle_without() -> None:
    chosen = {"negative_prompt": "blurry", "guidance_end": 0.6}
    assert request(**chosen).idle_settings == []
    assert request(guidance_scale=1, negative_prompt=" ").idle_settings == []
    assert request(guidance_scale=1, **chosen).idle_settings == [
        "the negative prompt does nothing: guidance 1 draws without guidance",
        "the guidance interval does nothing: guidance 1 draws without guidance",
    ]


def test_other_spellings_of_the_same_value_become_it() -> None:
    made = request(
        width=numpy.int64(64), seed=numpy.uint8(7), guidance_scale=numpy.float32(5), strength=1, loras=[LoraChoice("a", 1)]
    )
    assert [(value, type(value)) for value in (made.width, made.seed, made.guidance_scale, made.strength)] == [
        (64, int),
        (7, int),
        (5.0, float),
        (1.0, float),
    ]
    assert made.loras == (LoraChoice(Path("a"), 1.0),)


def test_pictures_may_be_paths_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    made = request(init_image="~/a.png", mask_image="m.png")
    assert (made.init_image, made.mask_image, made.mode) == (Path("/home/someone/a.png"), Path("m.png"), "inpaint")
    assert request(init_image=PICTURE).init_image is PICTURE


def test_minus_one_is_a_random_seed_everywhere() -> None:
    assert request(seed=-1).seed is None
    assert request(seed=numpy.int64(-1)).seed is None
    assert PictureRequest.from_config(GenerationConfig(seed=-1), "x").seed is None
    assert PictureRequest.from_config(GenerationConfig(seed=5), "x", seed=-1).seed is None
    assert PictureRequest.from_config(GenerationConfig(seed=5), "x").seed == 5


@pytest.mark.parametrize("weight", ["0.5", None, True, float("nan"), float("inf"), [1]])
def test_an_adapters_weight_is_a_number(weight: Any) -> None:
    with pytest.raises(UserError, match="LoRA weight"):
        LoraChoice(Path("a"), weight)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match="the weight 'strong' is no number"):
        LoraChoice.parse(f"{tmp_path / 'final'}:strong")
    assert LoraChoice.parse(f"{tmp_path / 'other'}:strong").weight == 1.0  # a path that is not there is named as a path


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_adapter_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--lora is empty"):
        LoraChoice.parse(text)
