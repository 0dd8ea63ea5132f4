"""Recipes of A1111 and InvokeAI as found in the wild."""

from __future__ import annotations

import json

import pytest

from src.errors import ExitCode, UserError
from src.recipe import LoraRef, from_text_chunks

# --- A1111: each row is the text, its prompt and negative prompt, some of its settings, and parts of the notes ----------------

GPU = "drawn with GPU noise"
WILD = [
    (  # 2022
        "girl with an artist's beret, ((eyeshadow)), (coquettish)\nNegative prompt: ugly, (((deformed))), [blurry]\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b",
        "girl with an artist's beret, ((eyeshadow)), (coquettish)",
        "ugly, (((deformed))), [blurry]",
        {
            "num_inference_steps": 20,
            "scheduler": "Euler a",
            "guidance_scale": 7.0,
            "clip_skip": 1,
            "seed": 965400086,
            "width": 512,
        },
        [GPU],
    ),
    (  # 2023: sampler and schedule in one name
        "a castle\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1, Size: 768x512, Model hash: 6ce0161689, "
        "Model: v1-5-pruned-emaonly, Clip skip: 2, Version: v1.6.0",
        "a castle",
        "",
        {"scheduler": "DPM++ 2M Karras", "guidance_scale": 6.5, "clip_skip": 2, "width": 768, "height": 512},
        [GPU],
    ),
    (  # 2024: apart
        "a castle\nNegative prompt: text\nSteps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 4294967294, "
        "Size: 1024x1024, Model hash: 31e35c80fc, Model: sd_xl_base_1.0, RNG: CPU, Version: v1.10.1",
        "a castle",
        "text",
        {"scheduler": "DPM++ 2M Karras", "seed": 4294967294},
        [],
    ),
    (
        "x\nSteps: 8, Sampler: Euler, Schedule type: Automatic, CFG scale: 1, Seed: 0, Size: 64x64, RNG: CPU",
        "x",
        "",
        {"scheduler": "Euler", "seed": 0, "guidance_scale": 1.0},
        [],
    ),
    (
        "x\nSteps: 8, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 1, Seed: 0, Size: 64x64, RNG: NV",
        "x",
        "",
        {"scheduler": "Euler SGM Uniform"},
        [GPU],
    ),
    (  # prompts of many lines, blank ones among them
        "a fox,\n\nin the snow\nNegative prompt: ugly,\nblurry\n"
        "Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU",
        "a fox,\n\nin the snow",
        "ugly,\nblurry",
        {"scheduler": "DDIM"},
        [],
    ),
    (  # no prompt at all
        "Negative prompt: ugly\nSteps: 20, Sampler: Heun, CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU",
        "",
        "ugly",
        {"scheduler": "Heun"},
        [],
    ),
    ("Steps: 20, Sampler: Heun, CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU", "", "", {"num_inference_steps": 20}, []),
    (  # hires fix: its denoising strength does not make it img2img
        "x\nSteps: 20, Sampler: DPM++ SDE Karras, CFG scale: 7, Seed: 5, Size: 512x768, Denoising strength: 0.45, "
        "Hires upscale: 2, Hires steps: 10, Hires upscaler: R-ESRGAN 4x+, RNG: CPU",
        "x",
        "",
        {"width": 512, "height": 768},
        ["not reproduced: Hires upscale, Hires steps, Hires upscaler"],
    ),
    (  # ADetailer quotes a prompt that looks like parameters
        "x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 512x512, ADetailer model: face_yolov8n.pt, "
        'ADetailer prompt: "a face, (detailed:1.2), Seed: 99, Steps: 3", '
        "ADetailer confidence: 0.3, ADetailer version: 24.4.2, RNG: CPU",
        "x",
        "",
        {"seed": 5, "num_inference_steps": 20},
        ["not reproduced: ADetailer model, ADetailer prompt, ADetailer confidence, ADetailer version"],
    ),
    (
        "x\nSteps: 20, Sampler: LMS, CFG scale: 7, Seed: 5, Size: 512x512, "
        'TI hashes: "easynegative: c74b4e810b03, bad: 1234567890ab", RNG: CPU',
        "x",
        "",
        {},
        ["not reproduced: TI hashes"],
    ),
    (
        "x\nSteps: 20, Sampler: UniPC, CFG scale: 7, Seed: 5, Size: 512x512, "
        'Model: "big, model: v2", RNG: CPU, Hashes: {"model": "6ce0161689"}',
        "x",
        "",
        {"scheduler": "UniPC"},
        [],
    ),
    (  # stable-diffusion.cpp
        "x\nSteps: 20, CFG scale: 7.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 42, Size: 512x512, Model: sd.gguf, "
        "RNG: cuda, Sampler: euler_a, Version: stable-diffusion.cpp",
        "x",
        "",
        {"scheduler": "euler_a", "guidance_scale": 7.0},
        [GPU, "not reproduced: Guidance, Eta"],
    ),
    (  # Windows line ends
        "a\r\nNegative prompt: b\r\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU\r\n",
        "a",
        "b",
        {"height": 512},
        [],
    ),
]


@pytest.mark.parametrize(("text", "prompt", "negative", "some", "notes"), WILD, ids=range(len(WILD)))
def test_a1111_in_the_wild(text: str, prompt: str, negative: str, some: dict, notes: list[str]) -> None:
    parsed = from_text_chunks({"parameters": text})
    assert (parsed.dialect, parsed.mode, parsed.prompt) == ("a1111", "txt2img", prompt)
    assert parsed.settings["negative_prompt"] == negative
    assert {name: parsed.settings[name] for name in some} == some
    assert "strength" not in parsed.settings
    assert len(parsed.notes) == len(notes)
    assert all(wanted in note for wanted, note in zip(notes, parsed.notes))


LAST = "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 512x512, RNG: CPU"


@pytest.mark.parametrize(
    ("sampler", "automatic"),  # A1111 1.10's table of samplers_k_diffusion: the option 'scheduler' of each
    [
        ("DPM++ 2M", "Karras"), ("DPM++ SDE", "Karras"), ("DPM++ 2S a", "Karras"), ("DPM2", "Karras"), ("DPM2 a", "Karras"),
        ("DPM++ 2M SDE", "Exponential"), ("DPM++ 2M SDE Heun", "Exponential"), ("DPM++ 3M SDE", "Exponential"),
        ("Euler", ""), ("Euler a", ""), ("LMS", ""), ("Heun", ""), ("UniPC", ""), ("DDIM", ""),
    ],
)  # fmt: skip
def test_a1111s_automatic_schedule_is_the_samplers_own(sampler: str, automatic: str) -> None:
    line = LAST.replace("Sampler: Euler", f"Sampler: {sampler}")
    settings = from_text_chunks({"parameters": f"x\n{line}, Schedule type: Automatic"}).settings
    assert settings["scheduler"] == f"{sampler} {automatic}".strip()
    assert from_text_chunks({"parameters": f"x\n{line}"}).settings["scheduler"] == sampler, "before 1.9 it was the plain one"


@pytest.mark.parametrize(
    ("emphasis", "notes"),
    [
        ("Original", ()),
        ("None", ()),
        ("No norm", ("not reproduced: Emphasis 'No norm'",)),
        ("Ignore", ("not reproduced: Emphasis 'Ignore'; the prompt's weights are applied here",)),
    ],
)
def test_an_emphasis_that_is_not_here_is_said(emphasis: str, notes: tuple[str, ...]) -> None:
    parsed = from_text_chunks({"parameters": f"a (fox:1.3)\n{LAST}, Emphasis: {emphasis}"})
    assert (parsed.notes, parsed.settings["prompt_weights"]) == (notes, emphasis != "None")


def test_a1111_names_of_models_and_loras() -> None:
    prompt = "a <lora:ink:0.8> <lora:b,c> <lora:d:0.5:0.7>"
    names = 'Model hash: 6ce0161689, Model: "x: y", VAE: v.pt, Lora hashes: "ink: 1a2b3c4d5e6f, bc: 0123456789ab"'
    parsed = from_text_chunks({"parameters": f"{prompt}\n{LAST}, {names}"})
    assert (parsed.model_name, parsed.model_sha256, parsed.vae_name) == ("x: y", "6ce0161689", "v.pt")
    assert parsed.loras == (
        LoraRef("ink", 0.8, tensors_sha256="1a2b3c4d5e6f"),
        LoraRef("b,c", 1.0, tensors_sha256="0123456789ab"),
        LoraRef("d", 0.5),
    )


def test_a1111_hash_of_the_old_kind_is_not_a_sha256() -> None:
    assert from_text_chunks({"parameters": f"x\n{LAST}, Model hash: 45dee52b"}).model_sha256 is None


@pytest.mark.parametrize(
    ("extra", "mode"),
    [
        ("Denoising strength: 0.6", "img2img"),
        ("Denoising strength: 0.6, Mask blur: 4", "inpaint"),
        ("Denoising strength: 0.6, Inpaint area: Only masked", "inpaint"),
        ("Denoising strength: 0.6, First pass size: 0x0", "txt2img"),
    ],
)
def test_a1111_modes(extra: str, mode: str) -> None:
    parsed = from_text_chunks({"parameters": f"x\n{LAST}, {extra}"})
    assert parsed.mode == mode
    assert parsed.settings.get("strength") == (0.6 if mode != "txt2img" else None)


@pytest.mark.parametrize(
    "text",
    ["", "just a prompt", "a fox\nSteps: 20, Sampler: Euler", '{"sui_image_params": {"prompt": "x", "steps": 20, "seed": 3}}'],
)
def test_a_text_with_fewer_than_three_pairs_is_no_recipe(text: str) -> None:
    with pytest.raises(UserError, match="parameters") as caught:
        from_text_chunks({"parameters": text})
    assert caught.value.exit_code == ExitCode.REFUSED


# --- InvokeAI ----------------------------------------------------------------------------------------------------------

INVOKEAI_4 = {
    "generation_mode": "sdxl_img2img", "positive_prompt": "a fox", "negative_prompt": "blurry", "width": 1024, "height": 768,
    "seed": 7, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 1, "strength": 0.35,
    "model": {"key": "0b", "hash": "blake3:" + "0" * 64, "name": "Juggernaut XL", "base": "sdxl", "type": "main"},
    "loras": [{"model": {"name": "ink", "hash": "blake3:1"}, "weight": 0.75}], "vae": {"name": "fix"}, "app_version": "5.0.0",
    "controlnets": [], "seamless_x": False, "refiner_steps": 20,
}  # fmt: skip


def test_invokeai() -> None:
    parsed = from_text_chunks({"invokeai_metadata": json.dumps(INVOKEAI_4)})
    assert parsed.settings == {
        "width": 1024, "height": 768, "num_inference_steps": 30, "guidance_scale": 7.5, "negative_prompt": "blurry",
        "scheduler": "dpmpp_2m_k", "seed": 7, "clip_skip": 2, "strength": 0.35,
    }  # fmt: skip
    assert (parsed.dialect, parsed.mode, parsed.prompt) == ("invokeai", "img2img", "a fox")
    assert (parsed.model_name, parsed.model_sha256, parsed.vae_name) == ("Juggernaut XL", None, "fix")
    assert parsed.loras == (LoraRef("ink", 0.75),)
    assert [note.split(":")[0] for note in parsed.notes] == ["not reproduced"]
    assert "refiner_steps" in parsed.notes[0]


def test_invokeai_version_3() -> None:
    old = {
        "positive_prompt": "a fox++ in (snow)1.2", "rand_device": "cuda", "seed": 1, "strength": 0.5,
        "model": {"model_name": "sd-1", "base_model": "sd-1"}, "loras": [{"lora": {"model_name": "ink"}, "weight": 1}],
    }  # fmt: skip
    parsed = from_text_chunks({"invokeai_metadata": json.dumps(old)})
    assert (parsed.model_name, parsed.loras, parsed.settings) == ("sd-1", (LoraRef("ink", 1.0),), {"seed": 1})
    assert [note[:12] for note in parsed.notes] == ["drawn with G", "the prompt's"]


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-3", "9" * 100, "/etc/passwd", '"/etc/passwd"', "0x10", ""])
@pytest.mark.parametrize("key", ["Steps", "CFG scale", "Seed", "Size", "Clip skip", "Denoising strength"])
def test_hostile_a1111_values(key: str, value: str) -> None:
    pairs = dict(pair.split(": ") for pair in LAST.split(", ")) | {key: value}
    parsed = from_text_chunks({"parameters": "x\n" + ", ".join(f"{name}: {item}" for name, item in pairs.items())})
    field_name = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Size": "width", "Clip skip": "clip_skip"}.get(
        key, key.lower()
    )
    assert field_name not in parsed.settings
    assert "strength" not in parsed.settings
