"""``--from-image``: what a stranger's recipe may decide, what must be given with it, and what is said when it differs."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src import devices, images, orders, recipe_orders
from src.arguments import build_config, parse_arguments
from src.config import PROJECT_FOLDER, AppConfig
from src.errors import ExitCode, UserError
from src.recipe import LoraRef, ModelRef, PictureRef, Recipe, to_text_chunks
from src.request import LoraChoice
from tests.tiny.named import picture, safetensors, sha256

RECIPE = Recipe(
    mode="txt2img", prompt="a fox", negative_prompt="", seed=3, width=128, height=128, num_inference_steps=2, guidance_scale=4.0,
    scheduler="euler", clip_skip=1, prompt_weights=True, model=ModelRef("embedded"), precision="fp32", device="cpu",
    memory_plan="fast", version="0.1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def draw_again(chunks: dict[str, str] | Recipe, *argv: str) -> tuple[dict[str, Any], AppConfig, list[str]]:
    """What ``--from-image`` makes of a picture with these chunks: what is typed, the configuration, and what was said."""
    if isinstance(chunks, Recipe):
        chunks = to_text_chunks(chunks, "Euler", None)
    Path("theirs.png").write_bytes(images.encode_png(Image.new("RGB", (8, 8)), chunks))
    typed, said = parse_arguments(["--from-image", "theirs.png", *argv]), []
    recipe = recipe_orders.read_recipe(typed, said.append)
    config = build_config(typed, recipe.settings)
    return recipe_orders.follow_recipe(recipe, typed, config, said.append), config, said


def not_drawn(chunks: dict[str, str] | Recipe, *argv: str) -> UserError:
    with pytest.raises(UserError) as caught:
        draw_again(chunks, *argv)
    assert str(caught.value).startswith("theirs.png: ")
    return caught.value


def a1111(line: str, prompt: str = "a fox") -> dict[str, str]:
    return {"parameters": f"{prompt}\nSteps: 2, CFG scale: 4, Seed: 9, RNG: CPU, {line}"}


def test_a_recipe_is_followed(here: Path) -> None:
    typed, config, said = draw_again(RECIPE)
    assert (typed["prompt"], config.model.model_id, config.model.precision, said) == ("a fox", "embedded", "fp32", [])
    assert (config.generation.seed, config.generation.width, config.generation.scheduler) == (3, 128, "euler")


def test_what_made_it_faster_is_followed_and_can_be_typed_over() -> None:
    recipe = replace(RECIPE, deep_cache=2, token_merging=0.5, guidance_start=0.2, guidance_end=0.8)
    generation = draw_again(recipe)[1].generation
    faster = (generation.deep_cache, generation.token_merging, generation.guidance_start, generation.guidance_end)
    assert faster == (2, 0.5, 0.2, 0.8)
    generation = draw_again(recipe, "--guidance-interval", "0:1", "--deep-cache", "1")[1].generation
    faster = (generation.deep_cache, generation.token_merging, generation.guidance_start, generation.guidance_end)
    assert faster == (1, 0.5, 0.0, 1.0)


@pytest.mark.parametrize("argv", [[], ["--config", "4gb"]])
@pytest.mark.parametrize(
    "model",
    ["", "Model: deliberate_v2, ", "Model: evil/model, ", "Model: stabilityai/stable-diffusion-xl-base-1.0, ", "Model: ../x, "],
)
def test_a_model_that_is_not_here_must_be_named(model: str, argv: list[str]) -> None:
    error = not_drawn(a1111(f"{model}Size: 64x64"), *argv)
    assert error.exit_code is ExitCode.NOT_FOUND
    assert "name the one to draw with: --model MODEL" in str(error)


@pytest.mark.parametrize("argv", [["--model", "embedded"], ["--set", "model.model_id=embedded"], ["--config", "embedded"]])
@pytest.mark.parametrize("model", ["", "Model: deliberate_v2, "])
def test_a_model_that_was_named_is_taken(model: str, argv: list[str]) -> None:
    assert draw_again(a1111(f"{model}Size: 64x64"), *argv)[1].model.model_id == "embedded"


def test_a_card_size_keeps_the_recipes_model() -> None:
    config = draw_again(RECIPE, "--config", "4gb")[1]
    assert (config.model.model_id, config.optimization.max_vram_gb) == ("embedded", 4.0)


def test_models_are_found_under_models_and_whole_in_a_cache(here: Path) -> None:
    own = safetensors(here / "models" / "Stable-diffusion" / "deliberate_v2.safetensors")
    assert draw_again(a1111("Model: deliberate_v2, Size: 64x64"))[1].model.model_id == str(own.relative_to(here))
    safetensors(here / "models" / "lora" / "ink.safetensors"), (here / "elsewhere").mkdir()
    for name in ("ink", "cache", "lora", "elsewhere"):
        assert not_drawn(a1111(f"Model: {name}, Size: 64x64")).exit_code is ExitCode.NOT_FOUND
    storage = here / "models" / "cache" / "models--owner--name"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text("0" * 40)
    snapshot = storage / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert not_drawn(a1111("Model: owner/name, Size: 64x64")).exit_code is ExitCode.NOT_FOUND  # not whole
    snapshot.rmdir()
    snapshot.symlink_to(PROJECT_FOLDER / "models" / "embedded")
    assert draw_again(a1111("Model: owner/name, Size: 64x64"))[1].model.model_id == "owner/name"


def test_of_two_models_of_one_name_the_one_with_the_recorded_weights_is_drawn_with(here: Path) -> None:
    files = [safetensors(here / "models" / folder / "fox.safetensors", n) for n, folder in enumerate("ab")]
    unet = safetensors(here / "models" / "c" / "fox" / "unet" / "diffusion_pytorch_model.safetensors", 2)
    (here / "models" / "c" / "fox" / "model_index.json").write_text("{}")
    for weights, expected in [*((file, file) for file in files), (unet, unet.parents[1])]:
        ours = replace(RECIPE, model=ModelRef("fox", "SD1", sha256(weights)))
        theirs = a1111(f"Size: 64x64, Model hash: {sha256(weights)[:10]}, Model: fox")
        for chunks in (ours, theirs):
            assert draw_again(chunks)[1].model.model_id == str(expected.relative_to(here))
    for model in (ModelRef("fox", "SD1", "0" * 64), ModelRef("fox")):
        assert draw_again(replace(RECIPE, model=model))[1].model.model_id == str(files[0].relative_to(here))


def test_a_missing_vae_is_named() -> None:
    recipe = replace(RECIPE, vae=ModelRef("sharp.safetensors"))
    assert "give one with --vae VAE" in str(not_drawn(recipe))
    assert draw_again(recipe, "--vae", "mine")[1].model.vae == "mine"
    assert draw_again(recipe, "--set", "model.vae=null")[1].model.vae is None
    safetensors(Path("models/vae/sharp.safetensors"))
    assert draw_again(recipe)[1].model.vae == "models/vae/sharp.safetensors"


def test_what_it_was_drawn_over_must_be_given_and_is_compared() -> None:
    picture("a.png"), picture("m.png", 1), picture("b.png", 2)
    refs = {"init_image": PictureRef("a.png", sha256("a.png")), "mask": PictureRef("m.png", sha256("m.png"))}
    recipe = replace(RECIPE, mode="inpaint", strength=1.0, **refs)
    both = ["--init-image", "a.png", "--mask", "m.png"]
    for argv, missing in ([], "--init-image FILE and --mask FILE"), (both[:2], "--mask FILE"), (both[2:], "--init-image FILE"):
        error = str(not_drawn(recipe, *argv))
        assert error.endswith(f"give that with {missing}")
    assert draw_again(recipe, *both)[2] == []
    said = draw_again(recipe, "--init-image", "a.png", "--mask", "b.png")[2]
    assert said == ["recipe  b.png is not the mask 'm.png' of then: the picture will differ"]


def test_adapters_are_found_compared_and_replaced(here: Path) -> None:
    ink = safetensors(here / "models" / "lora" / "ink.safetensors", 1)
    recipe = replace(RECIPE, prompt="a fox <lora:wash:0.5>", loras=(LoraRef("wash", 0.5), LoraRef("ink", 0.8, sha256(ink))))
    assert "the recipe's LoRA 'wash' is not in models/lora; give it with --lora PATH" in str(not_drawn(recipe))
    typed = draw_again(recipe, "--lora", "elsewhere/wash.safetensors:0.5")[0]
    assert (typed["lora"], typed["prompt"]) == (["elsewhere/wash.safetensors:0.5"], "a fox ")
    safetensors(here / "models" / "lora" / "wash.safetensors")
    typed, _, said = draw_again(recipe)
    flags = ["models/lora/wash.safetensors:0.5", "models/lora/ink.safetensors:0.8"]
    assert (typed["lora"], typed["prompt"], said) == (flags, "a fox ", [])
    assert LoraChoice.parse(typed["lora"][1]) == LoraChoice(Path("models/lora/ink.safetensors"), 0.8)
    safetensors(ink, 2)
    (line,) = draw_again(recipe)[2]
    assert "is not the LoRA 'ink' of then" in line


@pytest.mark.parametrize("is_ours", [True, False])
def test_of_two_adapters_of_one_name_the_one_with_the_recorded_hash_is_drawn_with(here: Path, is_ours: bool) -> None:
    """A tag would take the first path of that name; what is drawn with is checked as the run itself resolves it."""
    first = safetensors(here / "models" / "lora" / "a" / "ink.safetensors", 1)
    second = safetensors(here / "models" / "lora" / "b" / "ink.safetensors", 2)
    for path in (first, second):
        chunks = a1111(
            f'Size: 64x64, Lora hashes: "ink: {hashlib.sha256(path.read_bytes()[-1:]).hexdigest()[:12]}"', "a <lora:ink:0.5>"
        )
        recipe = replace(RECIPE, prompt="a <lora:ink:0.5>", loras=(LoraRef("ink", 0.5, sha256(path)),))
        typed, config, said = draw_again(recipe if is_ours else chunks, "--model", "embedded")
        request = orders.read_request(config, typed, print)
        assert [(choice.path.resolve(), choice.weight) for choice in request.loras] == [(path.resolve(), 0.5)]
        assert (request.prompt, said) == ("a ", [])


def test_tags_that_a_recipe_does_not_list_and_those_of_a_typed_prompt_are_followed(here: Path) -> None:
    for name in ("ink", "wash"):
        safetensors(here / "models" / "lora" / f"{name}.safetensors")
    recipe = replace(RECIPE, prompt="a <lora:ink:0.5>", loras=(LoraRef("wash", 0.3),))
    assert draw_again(recipe)[0]["lora"] == ["models/lora/wash.safetensors:0.3", "models/lora/ink.safetensors:0.5"]
    typed = draw_again(recipe, "--prompt", "b <lora:wash:1>")[0]
    assert (typed["prompt"], typed["lora"]) == ("b <lora:wash:1>", [])


def test_a1111s_hash_of_an_adapter_is_that_of_its_tensors(here: Path) -> None:
    safetensors(here / "models" / "lora" / "ink.safetensors", 7, note="edited")
    digits = hashlib.sha256(bytes([7])).hexdigest()[:12]
    for recorded, lines in (digits, 0), ("0" * 12, 1):
        chunks = a1111(f'Size: 64x64, Lora hashes: "ink: {recorded}"', "a fox <lora:ink:1>")
        assert len(draw_again(chunks, "--model", "embedded")[2]) == lines


def test_precision_is_restored_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, precision="fp16")
    card = devices.Card("RTX", 8 << 30, 8 << 30, 0)
    for found, argv, expected in (
        (None, [], "auto"),
        (card, [], "fp16"),
        (card, ["--device", "cpu"], "auto"),
        (card, ["--precision", "fp32"], "fp32"),
        (card, ["--set", "model.precision=bf16"], "bf16"),
    ):
        monkeypatch.setattr(devices, "detect_card", lambda *_, found=found: found)
        monkeypatch.setattr(devices, "has_apple_gpu", lambda: False)
        assert draw_again(recipe, *argv)[1].model.precision == expected


def test_quantised_weights_are_taken_again_where_there_may_be_a_card_and_said_where_not(monkeypatch) -> None:
    recipe = replace(RECIPE, quantize="int8")
    card = devices.Card("RTX", 8 << 30, 8 << 30, 0)
    monkeypatch.setattr(devices, "has_apple_gpu", lambda: False)
    spec = importlib.util.find_spec
    for found, has_package, argv, expected in (
        (card, True, [], "int8"), (card, True, ["--quantize", "nf4"], "nf4"), (None, True, [], None),
        (card, False, [], None), (card, True, ["--memory", "low"], None),  # nobody typed what would be refused
    ):  # fmt: skip
        monkeypatch.setattr(devices, "detect_card", lambda *_, found=found: found)
        there = {"bitsandbytes": object() if has_package else None}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *_, there=there: there[name] if name in there else spec(name)
        )
        assert draw_again(recipe, *argv)[1].optimization.quantize == expected
    parsed = recipe_orders.from_text_chunks(to_text_chunks(recipe, "Euler", None))
    said: list[str] = []
    parsed = replace(parsed, drawn_on=replace(parsed.drawn_on, torch=None))
    recipe_orders.compare_with_recipe(parsed, "", "fp32", "cpu", said.append, "int8")
    recipe_orders.compare_with_recipe(parsed, "", "fp32", "cpu", said.append, None)
    (line,) = said
    assert line.startswith("recipe  drawn in fp32 with an int8 U-Net on cpu; this run is in fp32 on cpu: the picture may")


def test_other_weights_and_machines_are_a_line_each() -> None:
    recipe = replace(
        RECIPE, model=ModelRef("embedded", "sd15", "a" * 64), precision="fp16", device="RTX", stack={"torch": "1.0"}
    )
    parsed = recipe_orders.from_text_chunks(to_text_chunks(recipe, "Euler", None))
    said: list[str] = []
    recipe_orders.compare_with_recipe(parsed, "b" * 64, "fp32", "cpu", said.append)
    assert said[0] == "recipe  drawn with weights aaaaaaaaaa, these are bbbbbbbbbb: the picture will differ"
    assert said[1].startswith("recipe  drawn in fp16 on RTX with torch 1.0; this run is in fp32 on cpu with torch 2")
    same = replace(parsed, drawn_on=replace(parsed.drawn_on, torch=None))
    recipe_orders.compare_with_recipe(same, "a" * 64, "fp16", "RTX", said.append)
    assert len(said) == 2


def test_a_recorded_prompt_is_final(here: Path) -> None:
    recipe = replace(RECIPE, prompt="a {red|blue} __fox__")
    typed, config, _ = draw_again(recipe)
    request = orders.read_request(config, typed, print)
    assert (request.prompt, request.wildcards) == ("a {red|blue} __fox__", False)
    typed, config, _ = draw_again(recipe, "--prompt", "a {red|red} cat")
    assert orders.read_request(config, typed, print).wildcards


@pytest.mark.parametrize(
    ("sampler", "drawn", "said"),
    [
        ("Sampler: Euler a, Schedule type: Karras", "Euler a", 1),
        ("Sampler: DPM++ 2M, Schedule type: Align Your Steps", "DPM++ 2M", 1),
        ("Sampler: DPM++ 2M SDE Heun, Schedule type: Karras", "DPM++ 2M SDE", 1),
        ("Sampler: DPM adaptive", "dpm++_2m_karras", 1),
        ("Sampler: Restart", "dpm++_2m_karras", 1),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "DPM++ 2M Karras", 0),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "DPM++ 2M Karras", 0),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "DPM++ 2M SDE Exponential", 0),
        ("Sampler: Euler, Schedule type: Simple", "Euler Simple", 0),
        ("Sampler: DPM++ SDE, Schedule type: Simple", "DPM++ SDE", 1),
    ],
)
def test_samplers_that_are_not_here_become_the_nearest(sampler: str, drawn: str, said: int) -> None:
    _, config, lines = draw_again(a1111(f"{sampler}, Size: 64x64"), "--model", "embedded")
    assert (config.generation.scheduler, len(lines)) == (drawn, said)
    assert all("the picture will differ" in line for line in lines)
    assert draw_again(a1111(f"{sampler}, Size: 64x64"), "--model", "embedded", "--sampler", "ddim")[2] == []


def test_odd_sizes_are_rounded_with_a_note() -> None:
    _, config, said = draw_again(a1111("Size: 511x48"), "--model", "embedded")
    assert (config.generation.width, config.generation.height) == (512, 64)
    assert [line.split(",")[0] for line in said] == ["recipe  width 511 is drawn as 512", "recipe  height 48 is drawn as 64"]


def test_usage_of_from_image() -> None:
    typed = parse_arguments(["--from-image", "a.png", "--prompts", "x.txt"])
    with pytest.raises(UserError, match="one picture again and --prompts many") as caught:
        recipe_orders.read_recipe(typed, print)
    assert caught.value.exit_code is ExitCode.USAGE
    assert "holds no recipe" in str(not_drawn({}))
