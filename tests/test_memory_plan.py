"""Predictions against published measurements; choices against their definition."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from src.config import PROJECT_FOLDER, OptimizationConfig, load_config
from src.errors import ExitCode, UserError
from src.memory_plan import WINDOWS_RESERVE_BYTES, budget_of, card_budget, choose
from src.memory_prediction import CONTEXT_BYTES, CPU, CPU_TILED, GIB, PLANS, Placement, Request, adapter_bytes, predict
from src.model_shapes import bundled_shapes
from src.plan_report import describe, table
from src.request import PictureRequest
from src.unet_weights import offload_groups, unet_bytes
from tests.tiny.model_folders import safetensors

SD15, SDXL = Request(512, 512), Request(1024, 1024)
CARD_PLANS = PLANS[:-1]


def peak(name: str, request: Request, placement: Placement) -> int:
    return predict(bundled_shapes(name), request, placement).peak_bytes


# torch.cuda.max_memory_allocated in GiB, as published by diffusers' benchmark data set (SD 1.x) and sayakpaul/sample-datasets
# (SDXL on an A100): what the allocator handed out, without the context and without its own losses.
@pytest.mark.parametrize(
    ("name", "request_", "published_gib"),
    [
        ("sd15", SD15, 3.06),
        ("sdxl", replace(SDXL, precision="bf16"), 8.96),
        ("sdxl", replace(SDXL, precision="fp32"), 16.83),
    ],
)
def test_prediction_is_near_what_others_measured_on_cards(name, request_, published_gib):
    estimate = predict(bundled_shapes(name), request_, PLANS[0])
    allocated = max(phase.weights_bytes + phase.activations_bytes for phase in estimate.phases)
    assert allocated / GIB == pytest.approx(published_gib, rel=0.15)


def test_unet_phase_is_near_what_others_measured_on_a_card():
    shapes = bundled_shapes("sdxl")
    denoise = predict(shapes, replace(SDXL, precision="bf16"), Placement("model-offload", offload="model")).denoise
    assert (denoise.weights_bytes + denoise.activations_bytes) / GIB == pytest.approx(5.05, rel=0.05)  # U-Net forward alone


def test_weights_on_the_card_are_those_that_the_placement_keeps_there():
    shapes = bundled_shapes("sdxl")
    unet, vae, clip_l, big_g = (shapes.parameters[name] for name in ("unet", "vae", "text_encoder", "text_encoder_2"))
    request = replace(SDXL, precision="bf16", lora_bytes=1000)

    def weights(offload: str | None) -> list[int]:
        return [phase.weights_bytes for phase in predict(shapes, request, Placement("any", offload=offload)).phases]

    layers = [49408 * 1280, 2560 * 1280 * 9 + 1280, 512 * 512 * 9 + 512]
    assert weights(None) == [2 * (unet + vae + clip_l + big_g) + 1000] * 3
    assert weights("model") == [2 * count + 1000 for count in (big_g, unet, vae)]  # adapters are hooks, which stay
    assert weights("sequential") == [2 * count + 1000 for count in layers]
    groups = offload_groups(shapes)
    at_work = groups.resident + 2 * groups.largest  # one works, the next is on its way: tests/test_unet_weights.py
    assert weights("group") == [2 * count + 1000 for count in (layers[0], at_work, layers[2])]
    adapters = [predict(shapes, replace(request, lora_bytes=size), CPU).peak_bytes for size in (0, 1000)]
    assert adapters[1] - adapters[0] == 1000


def test_an_adapter_lies_on_the_card_in_the_precision_of_the_run(tmp_path):
    numbers = 4 * 320 + 320 * 4 + 1
    file = safetensors(
        tmp_path / "x.safetensors", {"a.lora_down.weight": (4, 320), "a.lora_up.weight": (320, 4), "a.alpha": (1,)}
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    files = [file, tmp_path / "adapter_config.json"]
    assert [adapter_bytes(files, precision) for precision in ("fp16", "bf16", "fp32")] == [
        2 * numbers,
        2 * numbers,
        4 * numbers,
    ]
    assert adapter_bytes([], "fp16") == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Request(768, 768, 1, True, "bf16")),
        ({"width": 512, "num_images": 3, "batch_size": 2}, Request(512, 768, 2, True, "bf16")),
        ({"height": 512, "num_images": 2, "batch_size": 8}, Request(768, 512, 2, True, "bf16")),
        ({"guidance_scale": 1.0}, Request(768, 768, 1, False, "bf16")),
        ({"guidance_scale": 1.1}, Request(768, 768, 1, True, "bf16")),
    ],
)
def test_a_request_is_made_of_a_picture_and_its_model(settings, expected):
    picture = PictureRequest(prompt="a cat", **settings)
    assert Request.of(picture, 768, "bf16") == expected
    more = Request.of(picture, 768, "bf16", lora_bytes=7, safety_checker=False)
    assert more == replace(expected, lora_bytes=7, safety_checker=False)


def test_safety_checker_stays_on_the_card_unless_it_is_left_out():
    shapes = bundled_shapes("sd15")
    with_it, without = (
        predict(shapes, replace(SD15, safety_checker=checked), Placement("model-offload", offload="model")).decode.weights_bytes
        for checked in (True, False)
    )
    assert with_it - without == 2 * shapes.parameters["safety_checker"]
    assert choose(shapes, SD15, None, OptimizationConfig(disable_safety_checker=True)).estimate.decode.weights_bytes < 2.2 * GIB


def test_sdxl_is_decoded_in_fp32_when_the_rest_is_fp16():
    shapes = bundled_shapes("sdxl")
    fp16, bf16, fp32 = (
        predict(shapes, replace(SDXL, precision=precision), PLANS[0]).decode for precision in ("fp16", "bf16", "fp32")
    )
    assert fp16.activations_bytes == fp32.activations_bytes == 2 * bf16.activations_bytes
    fixed = replace(shapes, vae={**shapes.vae, "force_upcast": False})
    assert predict(fixed, SDXL, PLANS[0]).decode == bf16


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(("name", "side_px"), [("sd15", 512), ("sd21", 768), ("sdxl", 1024), ("sdxl", 2048)])
def test_each_plan_needs_no_more_than_the_one_before(name, side_px, precision):
    peaks = [peak(name, Request(side_px, side_px, precision=precision), plan) for plan in (PLANS[0], *PLANS[2:6])]
    assert peaks == sorted(peaks, reverse=True)
    assert peak(name, Request(side_px, side_px, precision=precision), PLANS[1]) <= peaks[0]


def test_memory_grows_with_what_is_asked():
    base = peak("sd15", SD15, PLANS[0])
    assert peak("sd15", replace(SD15, batch_size=16), PLANS[0]) > base
    assert peak("sd15", replace(SD15, width_px=768), PLANS[0]) > base
    assert peak("sd15", replace(SD15, width_px=513), PLANS[0]) > base
    unguided = predict(bundled_shapes("sd15"), replace(SD15, guidance=False), PLANS[0]).denoise.activations_bytes
    assert predict(bundled_shapes("sd15"), SD15, PLANS[0]).denoise.activations_bytes == 2 * unguided


def test_tiles_bound_the_decode_whatever_the_size():
    tiled = PLANS[1]
    small, large = (predict(bundled_shapes("sdxl"), Request(px, px), tiled).decode.activations_bytes for px in (1024, 2048))
    pictures = 2 * 3 * 4 * (2048**2 - 1024**2)
    assert large - small == pictures


@pytest.mark.parametrize(("name", "request_"), [("sd15", SD15), ("sdxl", SDXL)])
def test_the_fastest_plan_that_fits_is_chosen_at_every_budget(name, request_):
    shapes = bundled_shapes(name)
    peaks = {plan.name: predict(shapes, request_, plan).peak_bytes for plan in CARD_PLANS}
    for budget in sorted({*peaks.values(), *(size - 1 for size in peaks.values()), 1 << 50}):
        expected = next((plan for plan, size in peaks.items() if size <= budget), None)
        plan = choose(shapes, request_, budget, OptimizationConfig())
        assert plan.fits == (expected is not None)
        assert plan.placement.name == (expected or "sequential-offload")
        assert [placement.name for placement, _ in (*plan.rejected, (plan.placement, 0), *plan.smaller)] == list(peaks)
        assert all(size > budget for _, size in plan.rejected)


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({"enable_model_cpu_offload": True}, ["model-offload", "model-offload+vae-tiling"]),
        ({"enable_sequential_cpu_offload": True}, ["sequential-offload"]),
        ({"enable_vae_tiling": True}, ["gpu+vae-tiling", "model-offload+vae-tiling", "group-offload", "sequential-offload"]),
        ({"enable_model_cpu_offload": True, "enable_vae_tiling": True}, ["model-offload+vae-tiling"]),
    ],
)
def test_a_switch_is_honoured_over_the_plan(switches, names):
    plan = choose(bundled_shapes("sd15"), SD15, 80 * GIB, OptimizationConfig(**switches))
    considered = [placement for placement, _ in (*plan.rejected, (plan.placement, 0), *plan.smaller)]
    assert [placement.name for placement in considered] == names


def test_contradictory_switches_are_refused():
    both = OptimizationConfig(enable_model_cpu_offload=True, enable_sequential_cpu_offload=True)
    for budget in (GIB, None):
        with pytest.raises(UserError, match="offload") as raised:
            choose(bundled_shapes("sd15"), SD15, budget, both)
        assert raised.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_an_offload_switch_without_a_card_is_no_error_but_a_note(offload):
    switch = OptimizationConfig(**{f"enable_{offload}_cpu_offload": True})
    plan = choose(bundled_shapes("sd15"), SD15, None, switch)
    assert (plan.placement, plan.fits) == (CPU, True)
    assert plan.notes == (f"{offload} CPU offload has no effect without a card",)
    assert choose(bundled_shapes("sd15"), SD15, 80 * GIB, switch).notes == ()


@pytest.mark.parametrize("wanted_gib", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_an_impossible_amount_of_memory_is_refused_wherever_it_passes(wanted_gib):
    options = OptimizationConfig(max_vram_gb=wanted_gib)
    for call in (lambda: budget_of(options), lambda: choose(bundled_shapes("sd15"), SD15, None, options)):
        with pytest.raises(UserError, match="--max-vram") as raised:
            call()
        assert raised.value.exit_code == ExitCode.USAGE


def test_the_budget_is_in_gib():
    assert budget_of(OptimizationConfig(max_vram_gb=1.5)) == 3 << 29
    assert budget_of(OptimizationConfig()) is None


def test_pictures_are_decoded_one_at_a_time():
    decodes = {predict(bundled_shapes("sd15"), replace(SD15, batch_size=size), PLANS[0]).decode for size in (1, 4)}
    assert len(decodes) == 1


def test_the_cpu_plan_is_compared_with_the_memory_that_is_free():
    shapes, large = bundled_shapes("sd15"), replace(SD15, width_px=1024, height_px=1024)
    need, tiled = (predict(shapes, large, placement).peak_bytes for placement in (CPU, CPU_TILED))
    fitting, less, short = (
        choose(shapes, large, None, OptimizationConfig(), memory_bytes=size) for size in (need, need - 1, tiled - 1)
    )
    assert (fitting.fits, fitting.placement, fitting.notes) == (True, CPU, ())
    assert (less.fits, less.placement, less.notes) == (True, CPU_TILED, ())
    assert [line.split()[2] for line in table(less).splitlines()[1:3]] == ["no", "yes"]
    assert (short.fits, short.placement) == (False, CPU_TILED)
    assert short.notes == (f"needs {tiled / GIB:.2f} of {tiled / GIB:.2f} GiB of free memory; may swap",)
    assert not any(fits for *_, fits in short.rows)
    assert "does not fit" not in describe(short)  # the note says it, and drawing goes on
    assert len(choose(shapes, SD15, None, OptimizationConfig(), memory_bytes=1).rows) == 1, "one tile is no gain"


def test_without_a_card_the_cpu_is_used():
    plan = choose(bundled_shapes("sd15"), SD15, None, OptimizationConfig(enable_vae_tiling=True))
    assert (plan.placement, plan.fits, plan.rejected, plan.smaller) == (CPU_TILED, True, (), ())
    assert describe(plan).startswith(f"CPU + VAE tiling, predicted peak {plan.estimate.peak_bytes / GIB:.2f} GiB (weights ")


@pytest.mark.parametrize(
    ("presets", "expected"),
    [
        (["2gb"], "model-offload"),
        (["sd15", "3gb"], "model-offload"),
        (["sd15", "4gb"], "gpu"),
        (["sd15", "6gb"], "gpu"),
        (["sdxl", "8gb"], "model-offload"),
    ],
)
def test_each_card_preset_gets_the_plan_that_its_comment_promises(presets, expected):
    config = load_config(*presets)
    shapes = bundled_shapes(config.model.model_id)
    request = Request(config.generation.width or shapes.native_px, config.generation.height or shapes.native_px)
    plan = choose(shapes, request, round(config.optimization.max_vram_gb * GIB), config.optimization)
    assert (plan.placement.name, plan.fits) == (expected, True)


@pytest.mark.parametrize(
    ("name", "size_px", "budget_gib", "expected"),
    [
        ("small-sd", 512, 2, "model-offload"),
        ("sd15", 512, 3, "model-offload"),
        ("sd15", 512, 4, "gpu"),
        ("sd15", 512, 6, "gpu"),
        ("sdxl", 1024, 8, "model-offload"),
        ("sd15", 512, 2, "group-offload"),
        ("sdxl", 1024, 6, "model-offload+vae-tiling"),
        ("sdxl", 1024, 4, "group-offload"),
    ],
)
def test_there_is_a_plan_for_small_cards(name, size_px, budget_gib, expected):
    plan = choose(bundled_shapes(name), Request(size_px, size_px), budget_gib * GIB, OptimizationConfig())
    assert (plan.placement.name, plan.fits) == (expected, True)


@pytest.mark.parametrize(
    ("mode", "first"),
    [("fast", "gpu"), ("balanced", "model-offload"), ("low", "group-offload"), ("minimal", "sequential-offload")],
)
def test_a_mode_says_what_lies_on_the_card_at_most(mode, first):
    options = OptimizationConfig(memory=mode)
    plan = choose(bundled_shapes("sd15"), SD15, 80 * GIB, options)
    assert (plan.placement.name, plan.rejected, plan.notes) == (first, (), ())
    tight = choose(bundled_shapes("sd15"), SD15, GIB, options)
    assert tight.placement.name == ("gpu+vae-tiling" if mode == "fast" else "sequential-offload")
    assert not tight.fits
    assert any("predicted not to fit" in note for note in tight.notes) == (mode == "fast")
    assert choose(bundled_shapes("sd15"), SD15, None, options).notes == (f"--memory {mode} has no effect without a card",)


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"memory": "much"}, "memory 'much' is not known"),
        ({"quantize": "int4"}, "quantize 'int4' is not known"),
        ({"memory": "fast", "enable_model_cpu_offload": True}, "contradict"),
        ({"memory": "low", "enable_sequential_cpu_offload": True}, "contradict"),
        ({"memory": "minimal", "quantize": "nf4"}, "exclude each other"),
        ({"enable_sequential_cpu_offload": True, "quantize": "int8"}, "exclude each other"),
    ],
)
def test_modes_and_switches_that_contradict_each_other_are_one_usage_error(switches, said):
    with pytest.raises(UserError, match=said) as raised:
        choose(bundled_shapes("sd15"), SD15, 8 * GIB, OptimizationConfig(**switches))
    assert raised.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(raised.value)


def test_a_mode_and_the_switch_that_means_it_agree():
    plan = choose(bundled_shapes("sd15"), SD15, 80 * GIB, OptimizationConfig(memory="balanced", enable_model_cpu_offload=True))
    assert plan.placement.name == "model-offload"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_counted_where_they_lie_and_never_moved_in_parts(kind):
    shapes = bundled_shapes("sdxl")
    for placement in (PLANS[0], PLANS[2]):
        before, after = (predict(shapes, replace(SDXL, quantize=how), placement) for how in (None, kind))
        saved = unet_bytes(shapes, "fp16", None) - unet_bytes(shapes, "fp16", kind)
        assert before.denoise.weights_bytes - after.denoise.weights_bytes == saved > 2 * GIB
        assert after.denoise.activations_bytes > before.denoise.activations_bytes, "products are wider, or weights brought back"
    plan = choose(shapes, replace(SDXL, quantize=kind), 80 * GIB, OptimizationConfig(quantize=kind))
    assert {placement.offload for placement, _, _ in plan.rows} == {None, "model"}
    assert f"GPU, {kind} U-Net, predicted peak" in describe(plan)
    with pytest.raises(UserError, match="needs a card"):
        choose(shapes, replace(SDXL, quantize=kind), None, OptimizationConfig(quantize=kind))


def test_windows_keeps_a_reserve_below_which_its_driver_would_swap(monkeypatch):
    options = OptimizationConfig()
    assert card_budget(8 * GIB, options) == 8 * GIB
    monkeypatch.setattr(sys, "platform", "win32")
    assert card_budget(8 * GIB, options) == 8 * GIB - WINDOWS_RESERVE_BYTES
    assert card_budget(8 * GIB, OptimizationConfig(max_vram_gb=7.8)) == 8 * GIB - WINDOWS_RESERVE_BYTES
    assert card_budget(8 * GIB, OptimizationConfig(max_vram_gb=4.0)) == 4 * GIB


def test_a_measured_peak_stands_for_the_prediction_and_says_so():
    shapes = bundled_shapes("sd15")
    plan = choose(shapes, SD15, 4 * GIB, OptimizationConfig(), measured={"gpu": 5 * GIB, "model-offload": 3 * GIB})
    assert plan.placement.name == "gpu+vae-tiling"
    plan = choose(shapes, SD15, 3 * GIB, OptimizationConfig(), measured={"gpu": 2 * GIB})
    encode = predict(shapes, SD15, PLANS[0]).encode.total_bytes  # before the measurement begins
    assert plan.placement.name == "model-offload"
    plan = choose(shapes, SD15, 4 * GIB, OptimizationConfig(), measured={"gpu": 3 * GIB + GIB // 2})
    assert (plan.placement.name, plan.peak_bytes) == ("gpu", 3 * GIB + GIB // 2)
    assert describe(plan).startswith("GPU, measured peak 3.50 GiB of 4.00 GiB (predicted 3.71: weights ")
    assert table(plan).splitlines()[1].endswith("yes  <- chosen  (measured)")
    assert choose(shapes, SD15, encode, OptimizationConfig(), measured={"gpu": 1}).peak_bytes == encode


def test_the_line_says_plan_peak_budget_and_parts():
    plan = choose(bundled_shapes("sdxl"), SDXL, 6 * GIB, OptimizationConfig())
    total, unet = plan.estimate.peak_bytes / GIB, 2 * 2_567_463_684 / GIB
    assert describe(plan).startswith(
        f"model offload + VAE tiling, predicted peak {total:.2f} GiB of 6.00 GiB (weights {unet:.2f}, "
    )
    assert "does not fit" in describe(choose(bundled_shapes("sdxl"), SDXL, GIB, OptimizationConfig()))


def test_the_table_lists_every_plan_and_adds_up():
    plan = choose(bundled_shapes("sdxl"), SDXL, 8 * GIB, OptimizationConfig())
    lines = table(plan).splitlines()
    assert [line.split()[0] for line in lines[1:7]] == [placement.name for placement in CARD_PLANS]
    assert [line.split()[2] for line in lines[1:7]] == ["no", "no", "yes", "yes", "yes", "yes"]
    assert [line for line in lines if line.endswith("<- chosen")] == [lines[3]]
    weights, activations, total = (
        float(cell) for cell in next(line for line in lines if line.startswith("decode")).split()[1:]
    )
    assert total == pytest.approx(weights + 1.1 * activations + CONTEXT_BYTES / GIB, abs=0.02)


def test_a_plan_is_made_at_once_and_without_torch():
    program = """
import sys
from src.config import OptimizationConfig
from src.memory_plan import choose
from src.memory_prediction import Request
from src.model_shapes import bundled_shapes
from src.plan_report import table
table(choose(bundled_shapes("sdxl"), Request(1024, 1024), 8 << 30, OptimizationConfig()))
heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT_FOLDER, check=True)
    assert time.monotonic() - started < 2.0  # 0.1 s on an idle machine; importing torch alone takes longer


def test_deep_cache_is_never_planned_with_group_offload():
    shapes = bundled_shapes("sdxl")
    for deep_cache, expected in ((1, "group-offload"), (2, "sequential-offload")):
        plan = choose(shapes, replace(SDXL, deep_cache=deep_cache), 3 * GIB, OptimizationConfig())
        assert plan.placement.name == expected
    picture = PictureRequest("x", deep_cache=3, token_merging=0.25)
    need = Request.of(picture, 512, "fp16")
    assert (need.deep_cache, need.token_merging) == (3, 0.25)


def test_what_was_too_little_counts_beside_a_prediction_that_is_larger():
    """Another program held the card: the mark is below the prediction, and says nothing."""
    shapes = bundled_shapes("sd15")
    need = predict(shapes, SD15, PLANS[0]).peak_bytes
    for mark, budget, chosen in ((need // 2, need, 0), (need + 100, need, 1), (need + 100, need + 100, 0)):
        plan = choose(shapes, SD15, budget, OptimizationConfig(), measured={f"{PLANS[0].name}, ran out": mark})
        assert plan.placement == PLANS[chosen], (mark, budget)
        assert "predicted peak" in describe(plan)
