"""Memory that runs out anywhere costs a line and a step down, never the picture. The CPU stands for a card in this file."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from src import cpu_layers, devices, optimizations
from src.config import AppConfig
from src.errors import ExitCode, UserError
from src.generator import Step, TextToImageGenerator
from src.lora.stack import AdapterStack
from src.measured_peaks import FILE_NAME
from src.memory_prediction import PLANS
from tests.tiny import adapters, pipelines

PROMPT = "a red circle left of a blue square"
STEPS = 2
GIB = 1 << 30
CARD_PLANS = [plan.name for plan in PLANS if plan.on_card]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pipelines.save(pipelines.sd1(), tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GiB; accelerate offloads layers to the CPU only when it is called by itself."""
    monkeypatch.setattr(cpu_layers, "CAN_PACK", False)
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 100 * GIB)

    def offload(pipeline: DiffusionPipeline, device: torch.device) -> None:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                cpu_offload(part, device)

    monkeypatch.setattr(DiffusionPipeline, "enable_sequential_cpu_offload", offload)


class Run:
    """A generator, what it said, and the plans that it took."""

    def __init__(self, folder: Path, tmp_path: Path, precision: str = "fp32", **switches: object) -> None:
        config = AppConfig()
        config.model.model_id, config.model.precision, config.model.device = str(folder), precision, "cpu"
        config.paths.cache, config.generation.num_inference_steps = str(tmp_path / "cache"), STEPS
        for name, value in switches.items():
            setattr(config.optimization, name, value)
        self.lines: list[str] = []
        self.generator = TextToImageGenerator(config, self.lines.append)

    def draw(self, **settings: object) -> list[numpy.ndarray]:
        self.pictures = self.generator.generate(PROMPT, seed=1, **settings)
        return [numpy.asarray(picture).astype(int) for picture in self.pictures]

    @property
    def recipe(self) -> dict:
        return json.loads(self.pictures[0].info["recipe"])

    @property
    def ran_out(self) -> list[str]:
        return [line.partition("plan ")[2].partition(";")[0] for line in self.lines if line.startswith("memory  ran out")]


def overflow(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: set[int] | range) -> list[int]:
    """Let memory run out at these calls (counted from 0) of a function; returns the calls that were made."""
    real, made = getattr(owner, name), []

    @functools.wraps(real)
    def function(*arguments: object, **named: object) -> object:
        made.append(len(made))
        if made[-1] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, function)
    return made


# -- everywhere


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    layers = adapters.random_layers(adapters.source("SD1"), dora=0)  # to attach it, the model's weights are read
    return adapters.write_kohya(tmp_path_factory.mktemp("lora") / "tiny.safetensors", layers)


STAGES = {  # what runs out, and how often it is called while two pictures are drawn over another, with previews
    "place": (optimizations, "apply", 1),
    "adapter": (AdapterStack, "set", 4),
    "encode": (CLIPTextModel, "forward", 2),
    "initial picture": (AutoencoderKL, "encode", 2),
    "denoise": (UNet2DConditionModel, "forward", STEPS),
    "decode and previews": (AutoencoderKL, "decode", 2 * STEPS + 2),
}
CASES = [(stage, call) for stage, (_, _, count) in STAGES.items() for call in range(count)]


def draw_with_all(run: Run, adapter: Path) -> list[numpy.ndarray]:
    """Two pictures in a batch, drawn over another one, with an adapter and a preview at each step."""
    run.generator.load_lora_weights(adapter, 0.8)
    previews = []
    start = Image.radial_gradient("L").resize((64, 64)).convert("RGB")

    def on_step(step: Step) -> None:
        previews.extend(run.generator.preview(step.latents()))

    return run.draw(num_images=2, batch_size=2, init_image=start, strength=1.0, on_step=on_step)


@pytest.fixture(scope="module")
def expected(folder, adapter, tmp_path_factory) -> list[numpy.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_layers, "CAN_PACK", False)
        patch.setattr(optimizations, "memory_budget", lambda *_: 100 * GIB)
        run, counts = Run(folder, tmp_path_factory.mktemp("run")), {}
        for stage, (owner, name, _) in STAGES.items():
            counts[stage] = overflow(patch, owner, name, set())
        pictures = draw_with_all(run, adapter)
    assert {stage: len(made) for stage, made in counts.items()} == {stage: count for stage, (_, _, count) in STAGES.items()}
    return pictures


@pytest.mark.parametrize(("stage", "call"), CASES, ids=[f"{stage}-{call}" for stage, call in CASES])
def test_memory_that_runs_out_at_any_call_leaves_the_picture(
    folder, adapter, tmp_path, monkeypatch, expected, stage, call
) -> None:
    owner, name, _ = STAGES[stage]
    made = overflow(monkeypatch, owner, name, {call})
    run = Run(folder, tmp_path)
    pictures = draw_with_all(run, adapter)
    assert call in made
    assert max(abs(mine - wanted).max() for mine, wanted in zip(pictures, expected, strict=True)) <= 1
    is_preview = stage == "decode and previews" and call < 2 * STEPS
    assert run.ran_out == ([] if is_preview else ["gpu"])
    assert any(line.startswith("preview left out") for line in run.lines) == is_preview


# -- all the way down


def test_each_step_is_said_and_the_picture_is_the_same_at_its_end(folder, tmp_path, monkeypatch) -> None:
    expected = Run(folder, tmp_path).draw()
    run = Run(folder, tmp_path / "other")
    overflow(monkeypatch, UNet2DConditionModel, "forward", range(3))
    (picture,) = run.draw()
    assert abs(picture - expected[0]).max() <= 1
    assert [*run.ran_out, run.recipe["memory_plan"]] == ["gpu", "model-offload", "group-offload", "sequential-offload"]


FAILING = [
    ({"gpu", "gpu+vae-tiling"}, "model-offload"),
    ({"gpu", "group-offload"}, "sequential-offload"),
    (set(CARD_PLANS), "cpu"),
]


@pytest.mark.parametrize(("failing", "taken"), FAILING, ids=["two in a row", "one that is pinned", "every one"])
def test_plans_that_cannot_be_applied_are_passed_over(folder, tmp_path, monkeypatch, failing: set[str], taken: str) -> None:
    real, tried, expected = optimizations.apply, [], Run(folder, tmp_path).draw()

    def apply(pipeline: DiffusionPipeline, placement, options, device: torch.device) -> None:
        tried.append(placement.name)
        assert len(tried) < 20, tried
        if placement.name in failing:
            raise RuntimeError("CUDA error: out of memory")
        real(pipeline, placement, options, device)

    monkeypatch.setattr(optimizations, "apply", apply)
    overflow(monkeypatch, UNet2DConditionModel, "forward", {0} if taken == "sequential-offload" else set())
    (picture,) = (run := Run(folder, tmp_path / "other", "bf16" if taken == "cpu" else "fp32")).draw()
    assert (run.recipe["memory_plan"], len(tried)) == (taken, len(set(tried)))  # none is tried twice
    assert abs(picture - expected[0]).max() <= (12 if taken == "cpu" else 1)


@pytest.mark.parametrize("mode", ["fast", "balanced", "low", "minimal"])
def test_a_mode_is_where_the_ladder_begins(folder, tmp_path, monkeypatch, mode: str) -> None:
    begins = {"fast": "gpu", "balanced": "model-offload", "low": "group-offload", "minimal": "sequential-offload"}[mode]
    overflow(monkeypatch, UNet2DConditionModel, "forward", {STEPS})
    run = Run(folder, tmp_path, memory=mode)
    run.draw()
    assert run.recipe["memory_plan"] == begins
    if mode == "minimal":
        with pytest.raises(UserError, match="out of memory") as caught:
            run.draw()
        assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
    else:
        run.draw()
        assert CARD_PLANS.index(run.recipe["memory_plan"]) > CARD_PLANS.index(begins)


def test_a_switch_that_ran_out_makes_way(folder, tmp_path, monkeypatch) -> None:
    run = Run(folder, tmp_path, enable_model_cpu_offload=True)
    overflow(monkeypatch, UNet2DConditionModel, "forward", range(2))
    run.draw()
    assert run.recipe["memory_plan"] in ("group-offload", "sequential-offload")


def test_all_on_the_card_is_tried_where_it_is_predicted_not_to_fit(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 1)
    overflow(monkeypatch, UNet2DConditionModel, "forward", {STEPS})
    run = Run(folder, tmp_path, memory="fast")
    run.draw()
    assert run.recipe["memory_plan"] == "gpu+vae-tiling"
    assert any("predicted not to fit" in line for line in run.lines)
    run.draw()
    assert run.recipe["memory_plan"] == "sequential-offload"


def test_the_last_rung_is_the_cpu_in_fp32(folder, adapter, tmp_path, monkeypatch) -> None:
    """Every plan of the card fails at the second step; a model in bf16 goes on in fp32, on the same weights."""
    card = Run(folder, tmp_path, "bf16")
    card.generator.load_lora_weights(adapter, 0.8)
    (in_bf16,) = card.draw()
    rounded = pipelines.save(pipelines.sd1().to(torch.bfloat16).to(torch.float32), tmp_path / "rounded")
    exact = Run(rounded, tmp_path, "fp32")
    exact.generator.load_lora_weights(adapter, 0.8)
    (in_fp32,) = exact.draw()
    run = Run(folder, tmp_path, "bf16")
    run.generator.load_lora_weights(adapter, 0.8)
    overflow(monkeypatch, UNet2DConditionModel, "forward", {1, 3, 5, 7})
    (picture,) = run.draw()
    assert (run.recipe["memory_plan"], run.recipe["precision"], run.recipe["device"]) == ("cpu", "fp32", "cpu")
    assert "going on with the CPU in fp32" in "".join(run.lines)
    assert abs(picture - in_bf16).max() <= 12
    assert abs(picture - in_fp32).max() <= 3, "what is left are embeddings that were rounded to bf16"


def test_the_cpu_is_no_way_out_where_main_memory_is_short(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: GIB // 4)
    monkeypatch.setattr(optimizations, "memory_in_use_bytes", lambda device: 0)
    overflow(monkeypatch, UNet2DConditionModel, "forward", range(100))
    run = Run(folder, tmp_path, "bf16")
    with pytest.raises(UserError, match="out of memory") as caught:
        run.draw()
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
    assert run.ran_out[-1] != "sequential-offload", "what is said is followed by another try"


# -- measured peaks


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A counter of the card's memory that shows ``peak``; ``clean`` counts how often it began without old blocks."""
    state = {"peak": 3 * GIB, "clean": 0}

    def reset(device: torch.device, *, clean: bool = False) -> None:
        state["clean"] += clean

    monkeypatch.setattr(optimizations, "reset_peak", reset)
    monkeypatch.setattr(optimizations, "peak_bytes", lambda device: state["peak"])
    return state


def test_what_was_measured_stands_for_the_prediction_the_next_time(folder, tmp_path, monkeypatch, counter) -> None:
    first = Run(folder, tmp_path)
    first.draw()
    assert (first.recipe["peak_bytes"], first.recipe["memory_plan"]) == (3 * GIB, "gpu")
    assert first.recipe["predicted_bytes"] < GIB
    first.draw()
    assert counter["clean"] == 1, "once it is known, nothing is freed for the sake of measuring"
    (remembered,) = json.loads((tmp_path / "cache" / FILE_NAME).read_bytes()).values()
    assert remembered == {"gpu": 3 * GIB}
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 4 * GIB)
    second = Run(folder, tmp_path)
    second.draw()
    assert any(line.startswith("plan    GPU, measured peak 3.00 GiB of 4.00 GiB (predicted 0.5") for line in second.lines)
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 2 * GIB)
    third = Run(folder, tmp_path)
    third.draw()
    assert third.recipe["memory_plan"] == "gpu+vae-tiling", "the next plan that is not known to need more"
    fourth = Run(folder, tmp_path)
    fourth.draw(width=128)
    assert fourth.recipe["memory_plan"] == "gpu", "another size is another thing"


def test_a_batch_that_stepped_down_is_no_measurement(folder, tmp_path, monkeypatch, counter) -> None:
    overflow(monkeypatch, UNet2DConditionModel, "forward", {1})
    run = Run(folder, tmp_path)
    run.draw()
    (failed,) = run.ran_out
    assert [list(item) for item in remembered(tmp_path)] == [[f"{failed}, ran out"]]
    run.draw()
    assert [set(item) for item in remembered(tmp_path)] == [{f"{failed}, ran out", run.recipe["memory_plan"]}]


def test_a_plan_that_ran_out_is_not_tried_again_with_the_same_memory(folder, tmp_path, monkeypatch, counter) -> None:
    Run(folder, tmp_path).draw()
    overflow(monkeypatch, UNet2DConditionModel, "forward", {0})
    run = Run(folder, tmp_path)
    run.draw()
    assert run.ran_out == ["gpu"]
    assert remembered(tmp_path)[-1] == {"gpu": 3 * GIB, "gpu, ran out": 100 * GIB + 1}
    again = Run(folder, tmp_path)
    again.draw()
    assert again.ran_out == []
    assert again.recipe["memory_plan"] in CARD_PLANS[1:]
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 101 * GIB)
    more = Run(folder, tmp_path)
    more.draw()
    assert more.recipe["memory_plan"] == "gpu"


def remembered(tmp_path: Path) -> list[dict[str, int]]:
    return list(json.loads((tmp_path / "cache" / FILE_NAME).read_bytes()).values())


def test_without_a_counter_nothing_is_remembered(folder, tmp_path) -> None:
    run = Run(folder, tmp_path)
    run.draw()
    assert run.recipe["peak_bytes"] is None
    assert not (tmp_path / "cache" / FILE_NAME).exists()


# -- quantised weights


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 12), ("nf4", 60)])
def test_quantised_weights_draw_nearly_the_same_picture_in_every_plan(folder, tmp_path, kind, tolerance) -> None:
    pytest.importorskip("bitsandbytes")
    (plain,) = Run(folder, tmp_path).draw()
    pictures = {}
    for mode in ("fast", "balanced"):
        run = Run(folder, tmp_path, quantize=kind, memory=mode)
        (pictures[mode],) = run.draw()
        assert f", {kind} U-Net, predicted peak" in next(line for line in run.lines if line.startswith("plan"))
        assert run.recipe["quantize"] == kind
    assert 0 < abs(pictures["fast"] - plain).max() <= tolerance
    assert abs(pictures["fast"] - pictures["balanced"]).max() <= 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_work_on_quantised_weights(folder, tmp_path, kind) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = adapters.write_kohya(tmp_path / "tiny.safetensors", adapters.random_layers(adapters.source("SD1")))
    run = Run(folder, tmp_path, quantize=kind)
    (plain,) = run.draw()
    run.generator.load_lora_weights(adapter, 0.8)
    unet = run.generator.model.pipeline.unet
    hooked = [
        name for name, module in unet.named_modules() if type(module).__name__.startswith("Linear") and module._forward_hooks
    ]
    assert len(hooked) >= 16
    (other,) = run.draw()
    assert abs(other - plain).max() > 3


def test_a_quantisation_that_failed_is_not_taken_for_done(folder, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("no bitsandbytes")

    run = Run(folder, tmp_path, quantize="int8")
    monkeypatch.setattr(optimizations, "quantize", fail)
    for _ in range(2):
        with pytest.raises(UserError, match="no bitsandbytes"):
            run.draw()


def test_after_a_picture_too_large_for_the_card_a_smaller_one_returns_to_it(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: 100 * GIB)
    overflow(monkeypatch, UNet2DConditionModel, "forward", range(4))
    run = Run(folder, tmp_path, precision="bf16")
    run.draw(width=128, height=128)
    assert run.recipe["memory_plan"] == "cpu"
    run.draw(width=128, height=128)
    assert run.recipe["memory_plan"] == "cpu", "no smaller one"
    (back,) = run.draw(width=64, height=64)
    assert (run.recipe["memory_plan"], run.recipe["precision"]) == ("gpu", "bf16")
    assert numpy.array_equal(Run(folder, tmp_path, precision="bf16").draw(width=64, height=64)[0], back)


def test_quantised_weights_on_a_cpu_are_refused(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: None)
    with pytest.raises(UserError, match="--quantize int8 needs a card") as caught:
        Run(folder, tmp_path, quantize="int8").draw()
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_changed_form_of_the_weights_loads_them_again(folder, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    run = Run(folder, tmp_path)
    (plain,) = run.draw()
    run.generator.config.optimization.quantize = "int8"
    run.draw()
    assert run.recipe["quantize"] == "int8"
    run.generator.config.optimization.quantize = None
    assert numpy.array_equal(run.draw()[0], plain)
