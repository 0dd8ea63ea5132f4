"""What a plan advises and notes, and what a request leaves out: switches that are in the way, drawing without guidance."""

from dataclasses import replace

import pytest

from src.config import OptimizationConfig
from src.memory_plan import GIB, choose
from src.memory_prediction import Request
from src.model_shapes import bundled_shapes
from src.plan_report import describe
from src.request import PictureRequest

SD15, SDXL = Request(512, 512), Request(1024, 1024)


@pytest.mark.parametrize(
    ("switches", "request_", "gib", "said"),
    [
        ({"enable_model_cpu_offload": True}, SDXL, 4, "leaving out --model-cpu-offload would"),
        ({"memory": "balanced", "quantize": "int8"}, SDXL, 3, "--quantize nf4 in place of int8 would"),
        ({"quantize": "nf4"}, SDXL, 2.3, "leaving out --quantize nf4 would"),
        (
            {"enable_attention_slicing": True},
            replace(SD15, width_px=1024, height_px=1024, attention_slicing=True),
            3,
            "--attention-slicing would",
        ),
        ({}, SDXL, 1, "a smaller picture or model would"),
    ],
)
def test_what_would_fit_is_named(switches, request_, gib, said):
    shapes = bundled_shapes("sdxl" if request_.width_px == 1024 and not request_.attention_slicing else "sd15")
    request_ = replace(request_, quantize=switches.get("quantize"))
    plan = choose(shapes, request_, int(gib * GIB), OptimizationConfig(**switches))
    assert not plan.fits
    assert describe(plan).endswith(f"even this plan does not fit, {said}") or said in describe(plan)


def test_notes_say_what_has_no_effect_and_not_what_was_asked_for():
    shapes = bundled_shapes("sd15")
    assert "--max-vram 4 has no effect without a card" in choose(shapes, SD15, None, OptimizationConfig(max_vram_gb=4.0)).notes
    asked = choose(bundled_shapes("sdxl"), replace(SDXL, deep_cache=2), 3 * GIB, OptimizationConfig(memory="minimal"))
    assert asked.notes == ()


def test_lcm_draws_without_guidance_and_inpainting_one_picture_at_a_time():
    picture = PictureRequest("x", batch_size=4, num_images=4, guidance_scale=7.5)
    assert Request.of(picture, 512, "fp16").guidance
    assert not Request.of(picture, 512, "fp16", unet={"in_channels": 4, "time_cond_proj_dim": 256}).guidance
    assert Request.of(picture, 512, "fp16", unet={"in_channels": 9}).batch_size == 1
    assert Request.of(picture, 512, "fp16", unet={"in_channels": 4}).batch_size == 4
