"""What a plan advises and notes, when it is said, what a request leaves out, and predictions beside the peaks on record."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from src import base_models, cpu_layers, devices, memory_ladder, optimizations
from src.config import PROJECT_FOLDER, AppConfig, OptimizationConfig
from src.errors import UserError
from src.generator import TextToImageGenerator
from src.measured_peaks import FILE_NAME
from src.memory_plan import GIB, choose
from src.memory_prediction import CPU, Request, predict
from src.model_files import EMBEDDED
from src.model_shapes import bundled_shapes, read_shapes
from src.plan_report import describe
from src.processes import Processes
from src.request import PictureRequest
from tests.tiny import pipelines

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
        ({"max_vram_gb": 1.0}, SDXL, 1, "--max-vram 1.9 would"),
        ({"max_vram_gb": 8.0}, SDXL, 1, "a smaller picture or model would"),
        ({"max_vram_gb": 3.5, "enable_model_cpu_offload": True}, SDXL, 3.5, "leaving out --model-cpu-offload would"),
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
    picture = PictureRequest(prompt="x", batch_size=4, num_images=4, guidance_scale=7.5)
    assert Request.of(picture, 512, "fp16").guidance
    assert not Request.of(picture, 512, "fp16", unet={"in_channels": 4, "time_cond_proj_dim": 256}).guidance
    assert Request.of(picture, 512, "fp16", unet={"in_channels": 9}).batch_size == 1
    assert Request.of(picture, 512, "fp16", unet={"in_channels": 4}).batch_size == 4


def test_an_offload_says_what_main_memory_cannot_keep():
    """The weights' numbers are those of the published model; in fp16 the VAE of SDXL works in fp32."""
    weights = 2 * (2_567_463_684 + 123_060_480 + 694_659_840) + 4 * 83_653_863
    plan = choose(bundled_shapes("sdxl"), SDXL, 6 * GIB, OptimizationConfig(), memory_bytes=4 * GIB)
    assert plan.placement.offload == "model"
    said = f"keeps {weights / GIB:.2f} GiB of weights in main memory, of which 4.00 GiB are free; may swap"
    assert plan.notes == (said,)
    assert choose(bundled_shapes("sdxl"), SDXL, 6 * GIB, OptimizationConfig(), memory_bytes=weights).notes == ()
    assert choose(bundled_shapes("sdxl"), SDXL, 80 * GIB, OptimizationConfig(), memory_bytes=GIB).notes == ()


@pytest.mark.parametrize("is_known", [True, False])
def test_a_plan_is_said_once_and_before_the_model_is_loaded_if_its_shapes_are_known(is_known, tmp_path, monkeypatch):
    def unknown(*_):
        raise UserError("not on disk")

    said, load, config = [], base_models.load, AppConfig()
    monkeypatch.setattr(base_models, "load", lambda *args: said.append("loading") or load(*args))
    if not is_known:
        monkeypatch.setattr(memory_ladder, "estimate", unknown)
    config.model.model_id, config.model.device = str(pipelines.save(pipelines.sd1(), tmp_path / "sd1")), "cpu"
    config.paths.cache = str(tmp_path / "cache")
    generator = TextToImageGenerator(config, said.append)
    generator.load_model()
    generator.generate("a cat", num_inference_steps=1, seed=1)
    order = ["plan", "loading", "model"] if is_known else ["loading", "model", "plan"]
    assert [line.split()[0] for line in said if line.split()[0] in order] == order


def test_beside_a_card_only_what_the_model_took_is_its_own(monkeypatch):
    """The process holds CUDA's libraries already; a CPU's prediction counts libraries, so all of the process is its own."""
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: 4 * GIB)
    monkeypatch.setattr(optimizations, "memory_in_use_bytes", lambda _: 3 * GIB)
    assert memory_ladder._main_memory_bytes(torch.device("cuda:0"), 1 * GIB) == 6 * GIB
    assert memory_ladder._main_memory_bytes(torch.device("cpu"), 1 * GIB) == 7 * GIB
    assert memory_ladder._main_memory_bytes(torch.device("mps"), 1 * GIB) is None
    monkeypatch.setattr(memory_ladder, "from_environment", lambda: Processes(0, 2, 0, 2))
    assert memory_ladder._main_memory_bytes(torch.device("cpu"), 1 * GIB) == 5 * GIB, "two share what is free"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("quantize", "nf4", "needs a card"), ("memory", "tiny", "choose auto"), ("max_vram_gb", -1, "above")],
)
def test_switches_that_cannot_be_are_refused_before_anything_is_loaded(name, value, said, tmp_path, monkeypatch):
    config = AppConfig()
    config.model.model_id, config.model.device = str(pipelines.save(pipelines.sd1(), tmp_path / "sd1")), "cpu"
    setattr(config.optimization, name, value)
    monkeypatch.setattr(base_models, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        TextToImageGenerator(config).load_model()


def test_the_plan_is_that_of_the_first_request(tmp_path):
    said, config = [], AppConfig()
    config.model.model_id, config.model.device = str(pipelines.save(pipelines.sd1(), tmp_path / "sd1")), "cpu"
    config.paths.cache = str(tmp_path / "cache")
    generator = TextToImageGenerator(config, said.append)
    for size_px in (64, 512):
        generator.load_model(PictureRequest(prompt="x", width=size_px, height=size_px))
    small, large = (float(line.partition("decode ")[2].rstrip(")")) for line in said if line.startswith("plan"))
    assert small < large


@pytest.fixture
def runs_out_once(monkeypatch):
    """The first call of a U-Net does not find the memory that it needs."""
    forward, calls = UNet2DConditionModel.forward, []

    def once(*given, **named):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(*given, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", once)


def test_a_plan_that_comes_back_is_said_again(runs_out_once, tmp_path, monkeypatch):
    """The card runs out once, so the next smaller plan draws; a smaller picture returns to the plan of the announcement."""
    monkeypatch.setattr(cpu_layers, "CAN_PACK", False)
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 100 * GIB)
    said, config = [], AppConfig()
    config.model.model_id, config.model.device = str(pipelines.save(pipelines.sd1(), tmp_path / "sd1")), "cpu"
    config.paths.cache = str(tmp_path / "cache")
    generator = TextToImageGenerator(config, said.append)
    for size_px in (128, 64):
        generator.generate("a cat", width=size_px, height=size_px, num_inference_steps=1, seed=1)
    first, second, third = (line.partition(",")[0] for line in said if line.startswith("plan"))
    assert first == third == "plan    GPU" != second


def test_without_a_card_memory_that_runs_out_is_tried_with_tiles_where_they_need_less(tmp_path, monkeypatch):
    decode, sizes = AutoencoderKL.decode, []

    def once(vae, latents, *given, **named):
        sizes.append((latents.shape[-1], vae.use_tiling))
        if not vae.use_tiling:
            raise MemoryError("not enough memory")
        return decode(vae, latents, *given, **named)

    monkeypatch.setattr(AutoencoderKL, "decode", once)
    said, config = [], AppConfig()
    config.model.model_id, config.model.device = str(pipelines.save(pipelines.sd1(), tmp_path / "sd1")), "cpu"
    config.paths.cache, config.generation.num_inference_steps = str(tmp_path / "cache"), 1
    generator = TextToImageGenerator(config, said.append)
    with pytest.raises(UserError, match="out of memory"):
        generator.generate("a cat", width=64, height=64, seed=1)
    assert len(sizes) == 1, "a tile is no smaller"
    (picture,) = generator.generate("a cat", width=1024, height=1024, seed=1)
    assert picture.size == (1024, 1024)
    assert "memory  ran out with plan cpu; trying it with VAE tiling" in said


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A generator on a card of 100 GiB, for which the CPU stands."""
    monkeypatch.setattr(cpu_layers, "CAN_PACK", False)
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 100 * GIB)
    config = AppConfig()
    config.model.model_id, config.model.device = str(pipelines.save(pipelines.sd1(), tmp_path / "sd1")), "cpu"
    config.paths.cache, config.generation.num_inference_steps = str(tmp_path / "cache"), 1
    return TextToImageGenerator(config)


def test_of_a_batch_smaller_than_planned_nothing_is_remembered(card, tmp_path, monkeypatch):
    """A prompt of two windows shares no batch with one of one."""
    monkeypatch.setattr(optimizations, "peak_bytes", lambda _: 3 * GIB)
    long = "a red circle left of a blue square and " * 12
    list(card.draw(PictureRequest(prompt="-", seed=1, num_images=2, batch_size=2, num_inference_steps=1), texts=["a", long]))
    assert not (tmp_path / "cache" / FILE_NAME).exists()
    card.generate("a", seed=1, num_images=2, batch_size=2)
    assert (tmp_path / "cache" / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("room", "mark"), [(100 * GIB - (150 << 20), 100 * GIB + 1), (3 * GIB, 3 * GIB + 1)], ids=["kernels", "another program"]
)
def test_a_mark_is_what_there_was_for_this_process(card, runs_out_once, tmp_path, monkeypatch, room, mark):
    monkeypatch.setattr(optimizations, "room_bytes", lambda _: room)
    card.generate("a", seed=1)
    assert list(json.loads((tmp_path / "cache" / FILE_NAME).read_bytes()).values()) == [{"gpu, ran out": mark}]


def test_the_model_that_left_the_card_is_freed_before_it_is_loaded_again(card, monkeypatch):
    card.load_model()
    old, load = weakref.ref(card.model.pipeline.unet), base_models.load
    card._memory._left_card_for = PictureRequest(prompt="x", width=512, height=512)
    monkeypatch.setattr(base_models, "load", lambda *given: pytest.fail("still there") if old() else load(*given))
    card.generate("a cat", seed=1, width=64, height=64)
    assert old() is None


def test_a_switch_that_is_changed_loads_the_model_anew_and_one_that_is_planned_does_not(card):
    card.generate("a", seed=1)
    first = card.model
    card.config = replace(card.config, optimization=replace(card.config.optimization, memory="low"))
    card.generate("a", seed=1)
    assert (card.model, card._memory.plan.placement.name) == (first, "group-offload")
    card.config.optimization.enable_attention_slicing = True
    card.generate("a", seed=1)
    assert card.model is not first


RECORDS = sorted((PROJECT_FOLDER / "docs" / "bench").glob("memory*.json"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_what_is_predicted_today_is_within_a_tenth_of_every_peak_on_record(record):
    rows = [item for item in json.loads(record.read_text())["items"] if isinstance(item, dict)]
    ours = [(row["model"], row["measured GiB"]) for row in rows if "ours" in row.get("model", "")]
    assert ours
    for label, measured_gib in ours:
        name, size, side = label.split(", ")
        shapes = read_shapes(EMBEDDED) if name == "embedded" else bundled_shapes(name)
        size_px = int(size.removesuffix(" px"))
        need = Request(size_px, size_px, precision=side.removeprefix("ours "), safety_checker=False)
        assert predict(shapes, need, CPU).peak_bytes / GIB == pytest.approx(measured_gib, rel=0.1), label
