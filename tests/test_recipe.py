"""Recipes: there and back, what is written to the letter, and what a hostile picture may say."""

from __future__ import annotations

import json
import random
import re
import string
from dataclasses import replace
from typing import Any

import pytest

from src.errors import ExitCode, UserError
from src.recipe import LoraRef, ModelRef, ParsedRecipe, PictureRef, Recipe, from_text_chunks, public_name, to_text_chunks

SHA = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"
RECIPE = Recipe(
    mode="txt2img",
    prompt="a red fox, <lora:ink:0.8>",
    negative_prompt="blurry, text",
    seed=42,
    width=512,
    height=768,
    num_inference_steps=25,
    guidance_scale=7.5,
    scheduler="dpm++_2m_karras",
    clip_skip=1,
    prompt_weights=True,
    model=ModelRef("v1-5-pruned-emaonly.safetensors", "sd15", SHA),
    loras=(LoraRef("ink", 0.8, "a" * 64, 192, 192, tensors_sha256="b" * 64),),
    precision="fp16",
    device="cuda",
    memory_plan="fast",
    version="0.1",
)

INVOKEAI = json.dumps({"positive_prompt": "a fox", "seed": 7, "width": 512, "scheduler": "euler", "loras": [], "steps": 3})


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a reader must get back: the recipe's own values, without the strength that txt2img does not have."""
    names = "width height num_inference_steps guidance_scale negative_prompt scheduler seed clip_skip prompt_weights"
    names += " deep_cache token_merging guidance_start guidance_end"
    strength = {} if recipe.strength is None else {"strength": recipe.strength}
    return {name: getattr(recipe, name) for name in names.split()} | strength


def own(**changes: Any) -> ParsedRecipe:
    """Read our JSON with some fields changed."""
    document = json.loads(to_text_chunks(RECIPE, "DPM++ 2M", "Karras")["recipe"]) | changes
    return from_text_chunks({"recipe": json.dumps(document)})


# --- there and back ----------------------------------------------------------------------------------------------------


def any_text(rng: random.Random) -> str:
    pieces = [
        "\n",
        '"',
        "\\",
        ": ",
        ", ",
        "Negative prompt: ",
        "Steps: 1, Seed: 2, Size: 8x8",
        "<lora:x:1>",
        "é",
        "猫",
        "😀",
        "\udce9",
    ]
    return "".join(rng.choice([*pieces, *string.printable]) for _ in range(rng.randrange(60)))


def any_recipe(rng: random.Random) -> Recipe:
    return replace(
        RECIPE,
        prompt=any_text(rng),
        negative_prompt=any_text(rng),
        seed=rng.randrange(2**32),
        width=rng.randrange(64, 8193, 8),
        height=rng.randrange(64, 8193, 8),
        num_inference_steps=rng.randint(1, 1000),
        guidance_scale=rng.choice([1.0, 7.0, rng.random() * 100]),
        scheduler=rng.choice(["dpm++_2m_karras", "euler_a", "lcm"]),
        clip_skip=rng.randint(1, 12),
        prompt_weights=rng.random() < 0.5,
        deep_cache=rng.randint(1, 50),
        token_merging=rng.uniform(0, 0.75),
        guidance_start=rng.uniform(0, 0.5),
        guidance_end=rng.uniform(0.5, 1),
        strength=rng.choice([None, rng.random()]),
        loras=tuple(LoraRef(f"lora-{index}", rng.uniform(-2, 2), None, 1, 2) for index in range(rng.randrange(4))),
        quantize=rng.choice([None, "int8", "nf4"]),
        peak_bytes=rng.choice([None, rng.randrange(2**40)]),
        config={"generation": {"width": None, "negative_prompt": any_text(rng)}},
    )


def test_any_recipe_comes_back_exactly() -> None:
    rng = random.Random(0)
    for _ in range(500):
        recipe = any_recipe(rng)
        parsed = from_text_chunks(to_text_chunks(recipe, "Euler", None))
        assert parsed.settings == settings_of(recipe)
        assert (parsed.prompt, parsed.mode, parsed.dialect) == (recipe.prompt, "txt2img", "text-to-image")
        assert [(item.name, item.weight) for item in parsed.loras] == [(item.name, item.weight) for item in recipe.loras]
        assert parsed.notes == ()


def test_what_identifies_the_weights_comes_back() -> None:
    parsed = from_text_chunks(to_text_chunks(replace(RECIPE, vae=ModelRef("madebyollin/vae", "sdxl")), "DPM++ 2M", "Karras"))
    assert (parsed.model_name, parsed.model_sha256, parsed.vae_name) == (RECIPE.model.name, SHA, "madebyollin/vae")
    assert parsed.loras == (LoraRef("ink", 0.8, "a" * 64, tensors_sha256="b" * 64),)


def test_the_pictures_it_was_drawn_over_come_back() -> None:
    recipe = replace(
        RECIPE, mode="inpaint", strength=0.5, init_image=PictureRef("cat.png", SHA), mask=PictureRef("m.png", None)
    )
    parsed = from_text_chunks(to_text_chunks(recipe, "Euler", None))
    assert parsed.mode == "inpaint"
    assert parsed.settings["strength"] == 0.5
    assert (parsed.init_image, parsed.mask) == (PictureRef("cat.png", SHA), None)  # without a hash nothing can be compared
    assert parsed.notes == ()


def test_what_it_was_drawn_on_comes_back() -> None:
    recipe = replace(RECIPE, device="NVIDIA RTX 3060", stack={"torch": "2.4.0+cu121"})
    drawn_on = from_text_chunks(to_text_chunks(recipe, "Euler", None)).drawn_on
    assert (drawn_on.precision, drawn_on.device, drawn_on.torch) == ("fp16", "NVIDIA RTX 3060", "2.4.0+cu121")


@pytest.mark.parametrize("value", [None, 3, [], "auto", "fp64", "x\x1b[2J", "x" * 101])
def test_odd_surroundings_are_not_taken(value: Any) -> None:
    drawn_on = own(precision=value, device=value, stack={"torch": value}).drawn_on
    assert drawn_on.precision is None
    assert drawn_on.device in (None, "auto", "fp64")
    assert own(stack=value).drawn_on.torch is None


@pytest.mark.parametrize("name", ["../cat.png", "/home/x/cat.png", 3, None])
def test_a_path_is_no_pictures_name(name: Any) -> None:
    parsed = own(init_image={"name": name, "sha256": SHA})
    assert parsed.init_image is None
    assert len(parsed.notes) == 1


# --- what is written ---------------------------------------------------------------------------------------------------


def test_the_a1111_text_to_the_letter() -> None:
    text = to_text_chunks(replace(RECIPE, clip_skip=2), "DPM++ 2M", "Karras")["parameters"]
    assert text == (
        "a red fox, <lora:ink:0.8>\n"
        "Negative prompt: blurry, text\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, "
        'Model: v1-5-pruned-emaonly, Clip skip: 2, RNG: CPU, Lora hashes: "ink: bbbbbbbbbbbb", Version: text-to-image 0.1'
    )


def test_what_is_not_there_is_not_written() -> None:
    recipe = replace(RECIPE, prompt="a fox", negative_prompt="", loras=(), model=ModelRef("owner/name"), guidance_scale=7.0)
    assert to_text_chunks(recipe, "Euler a", None)["parameters"] == (
        "a fox\nSteps: 25, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768, Model: owner/name, RNG: CPU, "
        "Version: text-to-image 0.1"
    )


def test_values_with_separators_are_quoted_as_json() -> None:
    model = ModelRef('fox, "best": v2.safetensors', "sd15", SHA)
    recipe = replace(
        RECIPE, model=model, vae=ModelRef("a:b.pt", "sd15", SHA), strength=0.4, mode="img2img", prompt_weights=False
    )
    text = to_text_chunks(recipe, "Euler", None)["parameters"]
    assert (
        r'Model: "fox, \"best\": v2", VAE hash: 6ce0161689, VAE: "a:b.pt", Denoising strength: 0.4, RNG: CPU, Emphasis: None'
        in text
    )
    parsed = from_text_chunks({"parameters": text})
    assert (parsed.model_name, parsed.vae_name) == ('fox, "best": v2', "a:b.pt")
    assert (parsed.mode, parsed.settings["strength"], parsed.settings["prompt_weights"]) == ("img2img", 0.4, False)


def test_a_lora_given_by_flag_gets_its_tag_in_the_text() -> None:
    recipe = replace(RECIPE, prompt="a fox", loras=(LoraRef("ink", 0.8), LoraRef("a:b,c", 1.0, "c" * 64)))
    text = to_text_chunks(recipe, "Euler", None)["parameters"]
    assert text.startswith("a fox <lora:ink:0.8> <lora:abc:1>\n")
    assert 'Lora hashes: "abc: cccccccccccc"' in text


def test_our_own_text_alone_gives_the_settings_too() -> None:
    text = to_text_chunks(RECIPE, "DPM++ 2M", "Karras")["parameters"]
    parsed = from_text_chunks({"parameters": text})
    defaults = ("deep_cache", "token_merging", "guidance_start", "guidance_end")  # not written, and not read
    expected = settings_of(RECIPE) | {"scheduler": "DPM++ 2M Karras"}
    assert parsed.settings == {name: value for name, value in expected.items() if name not in defaults}
    assert (parsed.prompt, parsed.model_sha256, parsed.notes) == (RECIPE.prompt, SHA[:10], ())
    assert parsed.loras == (LoraRef("ink", 0.8, tensors_sha256="b" * 12),)


def test_what_made_it_faster_is_in_both_texts() -> None:
    """A1111 knows the ratio by this name; the others have none there."""
    faster = {"deep_cache": 3, "token_merging": 0.5, "guidance_start": 0.25, "guidance_end": 1.0}
    chunks = to_text_chunks(replace(RECIPE, **faster), "DPM++ 2M", "Karras")
    assert ', Token merging ratio: 0.5, DeepCache: 3, Guidance interval: "0.25:1", RNG: CPU,' in chunks["parameters"]
    for text in ({"recipe": chunks["recipe"]}, {"parameters": chunks["parameters"]}):
        parsed = from_text_chunks(text)
        assert {name: parsed.settings[name] for name in faster} == faster
        assert parsed.notes == ()


@pytest.mark.parametrize(
    "path",
    [
        "/home/alice/secret/x.safetensors",
        "~/alice/x.safetensors",
        "../alice/x.safetensors",
        r"C:\Users\alice\x.safetensors",
        "C:/Users/alice/x.safetensors",
        r"\\server\alice\x.safetensors",
        "alice/models/x.safetensors",
        "alice/x.safetensors",
        "/home/alice/x.safetensors/",
        "file:///home/alice/x.safetensors",
    ],
)
def test_no_private_path_gets_into_a_picture(path: str) -> None:
    ref, lora = ModelRef(path, path), LoraRef(path, 1.0)
    recipe = replace(
        RECIPE,
        **dict.fromkeys(("scheduler", "precision", "device"), path),
        **{"model": ref, "vae": ref, "loras": (lora,), "init_image": PictureRef(path, SHA), "mask": PictureRef(path, SHA)},
        stack={"torch": path},
        config={"model": {"model_id": path, "list": [path]}, "paths": {"outputs": "alice"}},
    )
    chunks = to_text_chunks(recipe, "Euler", None)
    assert "alice" not in str(chunks)
    assert "x.safetensors" in chunks["recipe"]


@pytest.mark.parametrize(
    "name", ["owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "SG161222/Realistic_Vision_V5.1_noVAE", "embedded"]
)
def test_hub_ids_are_public(name: str) -> None:
    assert public_name(name) == name


def test_a_chunk_that_no_reader_takes_is_not_written() -> None:
    assert to_text_chunks(replace(RECIPE, prompt="x" * 70_000), "Euler", None) == {}


# --- which chunk counts ------------------------------------------------------------------------------------------------


def test_ours_before_a1111_before_invokeai() -> None:
    chunks = to_text_chunks(RECIPE, "Euler", None) | {"invokeai_metadata": INVOKEAI}
    assert from_text_chunks(chunks).dialect == "text-to-image"
    del chunks["recipe"]
    assert from_text_chunks(chunks).dialect == "a1111"
    assert from_text_chunks(chunks | {"recipe": "{}"}).notes[0] == "'recipe' is damaged or of another program"


def test_a_chunk_over_64_kib_is_not_read() -> None:
    chunks = to_text_chunks(RECIPE, "Euler", None)
    with pytest.raises(UserError, match="'recipe' is longer than 64 KiB"):
        from_text_chunks({"recipe": chunks["recipe"] + " " * 65_536})


@pytest.mark.parametrize("chunks", [{}, {"workflow": "{}", "Software": "GIMP"}])
def test_no_recipe(chunks: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"holds no recipe \(made with --no-metadata") as caught:
        from_text_chunks(chunks)
    assert caught.value.exit_code == ExitCode.REFUSED


# --- hostile pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", "[" * 60_000, '{"a":' * 10_000, "9" * 60_000, "x" * 70_000,
        '{"schema": "text-to-image.recipe/v2"}',
        '{"schema": "text-to-image.recipe/v1", "seed": NaN}',
        '{"schema": "text-to-image.recipe/v1", "seed": Infinity}',
    ],
    ids=range(11),
)  # fmt: skip
def test_damaged_json_is_refused(text: str) -> None:
    for key in ("recipe", "invokeai_metadata"):
        with pytest.raises(UserError, match=key) as caught:
            from_text_chunks({key: text})
        assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("width", value) for value in (-512, 0, 10**9, "512", 512.0, True, [512])],
        *[("num_inference_steps", value) for value in (10**12, 0, 20.0)],
        *[("guidance_scale", value) for value in (1e308, 10**400, -1, "7", False)],
        *[("seed", value) for value in (-1, 2**32, 1e3, "x", False)],
        *[("clip_skip", value) for value in (0, 99, True)],
        *[("strength", value) for value in (1.5, -0.1, [])],
        *[("deep_cache", value) for value in (0, 51, 2.0)],
        *[("token_merging", value) for value in (0.8, -0.1, "0.5")],
        *[("guidance_start", value) for value in (-0.1, 1.1, "0")],
        *[("scheduler", value) for value in ("../../etc/passwd", "/etc/passwd", "http://evil.example/x")],
        *[("scheduler", value) for value in ("a\x1b[2J", "", "x" * 1000)],
        ("prompt_weights", 1),
        ("negative_prompt", {"a": 1}),
    ],
)  # fmt: skip
def test_a_hostile_setting_is_dropped_and_noted(name: str, value: Any) -> None:
    parsed = own(**{name: value})
    assert name not in parsed.settings
    assert len(parsed.notes) == 1
    assert name in parsed.notes[0]
    assert parsed.notes[0].isprintable()
    assert len(parsed.notes[0]) < 200
    assert parsed.settings == {key: value for key, value in settings_of(RECIPE).items() if key != name}


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../secret", r"C:\secret", "http://evil.example/x.ckpt", "..", "a/b/c", "~/x", "x\n", 3, {}]
)
def test_a_hostile_name_is_dropped_and_noted(name: Any) -> None:
    for changes in ({"model": {"name": name}}, {"vae": {"name": name}}, {"loras": [{"name": name, "weight": 1.0}]}):
        parsed = own(**changes)
        assert name not in (parsed.model_name, parsed.vae_name, *(lora.name for lora in parsed.loras))
        assert len(parsed.notes) == 1
        assert parsed.notes[0].isprintable()


@pytest.mark.parametrize(
    "changes",
    [{"mode": "rm -rf"}, {"mode": None}, {"mode": []}, {"prompt": None}, {"prompt": 3}, {"rng": "cuda"}, {"extra": 1}],
)
def test_other_odd_fields_are_noted(changes: dict[str, Any]) -> None:
    parsed = own(**changes)
    assert len(parsed.notes) == 1
    assert parsed.settings == settings_of(RECIPE)


@pytest.mark.parametrize(
    "changes",
    [{"loras": 3}, {"loras": [3, None, {}]}, {"loras": [{"name": "x", "weight": float(10**300)}] * 500}, {"model": []}],
)
def test_odd_lists_and_objects_do_no_harm(changes: dict[str, Any]) -> None:
    parsed = own(**changes)
    assert parsed.settings == settings_of(RECIPE)
    assert len(parsed.notes) <= 21


def read_or_refuse(chunks: dict[str, str]) -> ParsedRecipe | None:
    try:
        return from_text_chunks(chunks)
    except UserError:
        return None


def test_mutated_recipes_are_read_or_refused() -> None:
    """Ten thousand damaged chunks: an answer with checked values, or UserError; never anything else."""
    rng = random.Random(1)
    sources = {**to_text_chunks(RECIPE, "DPM++ 2M", "Karras"), "invokeai_metadata": INVOKEAI}
    read = 0
    for _ in range(10_000):
        key = rng.choice(list(sources))
        text = list(sources[key])
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(text))
            text[place : place + rng.randrange(3)] = rng.choice(["", *'"{[9-\0\udc80,:\\', "null", "1e999"])
        parsed = read_or_refuse({key: "".join(text)})
        if parsed is not None:
            read += 1
            assert 0 <= parsed.settings.get("seed", 0) < 2**32
            assert 8 <= parsed.settings.get("width", 8) <= 8192
            assert all(note.isprintable() for note in parsed.notes)
            assert not re.search(r"[/\\]", parsed.settings.get("scheduler", "") + "".join(lora.name for lora in parsed.loras))
    assert 1000 < read < 9000  # both ways are taken


@pytest.mark.parametrize("piece", ["a", " ", "ab: ", 'ab: "', 'ab: "\\', "ab: x, ", '\\"', "\n", "<lora:", "1"])
def test_sixty_kilobytes_take_linear_time(piece: str) -> None:
    read_or_refuse({"parameters": "x\nSteps: 1, Seed: 2, Size: 8x8, " + (piece * 60_000)[:60_000]})
