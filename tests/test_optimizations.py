"""Memory modes draw the same picture, running out of memory steps down, and SDXL's VAE never decodes in fp16."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from PIL import Image

from src import cpu_layers, memory_plan, memory_prediction, optimizations
from src.config import AppConfig, OptimizationConfig
from src.errors import ExitCode, UserError, is_out_of_memory
from src.generator import TextToImageGenerator
from src.memory_prediction import Placement
from src.processes import Processes
from tests.tiny import pipelines

PROMPT = "a red circle left of a blue square"
CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"sd1": pipelines.save(pipelines.sd1(), root / "sd1"), "sdxl": pipelines.save(pipelines.sdxl(), root / "sdxl")}


@pytest.fixture(params=["sd1", "sdxl"])
def generator(request, folders, tmp_path) -> TextToImageGenerator:
    config = AppConfig()
    config.model.model_id, config.model.precision, config.model.device = str(folders[request.param]), "fp32", "cpu"
    config.paths.cache, config.generation.num_inference_steps = str(tmp_path / "cache"), 3
    return TextToImageGenerator(config)


def draw(generator: TextToImageGenerator, **settings: object) -> numpy.ndarray:
    return numpy.asarray(generator.generate(PROMPT, seed=1, **settings)[0]).astype(int)


def apply(generator: TextToImageGenerator, placement: Placement, **switches: bool) -> None:
    optimizations.apply(generator.model.pipeline, placement, OptimizationConfig(**switches), CPU)


@pytest.fixture(autouse=True)
def _cards_have_the_librarys_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a card in this file."""
    monkeypatch.setattr(cpu_layers, "prepare_for_drawing", lambda *_, **__: None)
    monkeypatch.setattr(cpu_layers, "prepare_decoding", lambda _: None)


# -- the same picture in every memory mode


@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
def test_sequential_offload_draws_the_same_picture_bit_for_bit(generator, mode: str) -> None:
    """Weights lie on the meta device between uses, as on a small card; the compute device is the CPU here."""
    start = {"init_image": Image.radial_gradient("L").resize((64, 64)).convert("RGB")} if mode != "txt2img" else {}
    if mode == "inpaint":
        start["mask_image"] = Image.new("L", (64, 64), 255)
    expected = draw(generator, **start)
    components = [part for part in generator.model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for part in components:
        cpu_offload(part, CPU)
    assert all(parameter.is_meta for parameter in generator.model.pipeline.unet.parameters())
    assert numpy.array_equal(draw(generator, **start), expected)
    for part in components:
        remove_hook_from_submodules(part)
    assert numpy.array_equal(draw(generator, **start), expected)


@pytest.mark.parametrize(
    ("placement", "switches", "tolerance"),
    [
        (Placement("gpu"), {}, 0),
        (Placement("gpu"), {"enable_attention_slicing": True}, 1),
        (Placement("gpu"), {"enable_channels_last": True}, 1),
        (Placement("gpu+vae-tiling", vae_tiling=True), {}, 0),  # below a tile's size nothing is tiled
    ],
)
def test_memory_modes_keep_the_picture(generator, placement: Placement, switches: dict, tolerance: int) -> None:
    expected = draw(generator)
    apply(generator, placement, **switches)
    assert abs(draw(generator) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
def test_group_offload_draws_the_same_picture_bit_for_bit(generator, mode: str) -> None:
    """Without a stream, which takes a card; tests/test_unet_weights.py watches one that is made up."""
    start = {"init_image": Image.radial_gradient("L").resize((64, 64)).convert("RGB")} if mode != "txt2img" else {}
    if mode == "inpaint":
        start["mask_image"] = Image.new("L", (64, 64), 255)
    expected = draw(generator, clip_skip=2, **start)
    pipeline = generator.model.pipeline
    for name in ("group-offload", "gpu", "group-offload"):
        placement = next(plan for plan in memory_prediction.PLANS if plan.name == name)
        apply(generator, placement)
        hooked = [module for module in pipeline.unet.modules() if hasattr(module, "_diffusers_hook")]
        assert bool(hooked) == (name == "group-offload")
        assert numpy.array_equal(draw(generator, clip_skip=2, **start), expected)
    optimizations.use_float32_vae(pipeline, placement, OptimizationConfig(), CPU)
    assert numpy.array_equal(draw(generator, clip_skip=2, **start), expected)
    apply(generator, Placement("gpu"))
    assert not any("forward" in module.__dict__ for module in pipeline.unet.modules()), "no class is hidden by its own forward"


def test_what_the_card_has_free_is_what_windows_leaves(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GIB, 8 * GIB))
    shares = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda share, index: shares.append(share), raising=False)
    card = torch.device("cuda")  # as accelerate has it
    elsewhere = optimizations.memory_budget(card, OptimizationConfig())
    optimizations.memory_budget(card, OptimizationConfig(max_vram_gb=4.5))
    monkeypatch.setattr(sys, "platform", "win32")
    assert elsewhere - optimizations.memory_budget(card, OptimizationConfig()) == memory_plan.WINDOWS_RESERVE_BYTES
    held = (7 * GIB - memory_plan.WINDOWS_RESERVE_BYTES) / (8 * GIB)  # of the allocator: the context is not its own
    assert shares == [1.0, 0.5, pytest.approx(held)]


@pytest.mark.parametrize(
    ("contained", "machine", "processes", "is_short"),
    [(3, 99, 1, False), (1, 99, 1, True), (3, 99, 2, True), (None, 3, 1, False), (None, 3, 2, True)],
)
def test_weights_are_pinned_where_the_container_leaves_each_process_enough(
    monkeypatch, contained, machine, processes, is_short
) -> None:
    """Amounts in sizes of the U-Net; twice that is enough."""
    pipeline, said = pipelines.sd1(), []
    size = sum(item.numel() * item.element_size() for item in pipeline.unet.parameters())
    monkeypatch.setattr(optimizations, "available_memory_bytes", lambda: contained and contained * size)
    monkeypatch.setattr(optimizations.psutil, "virtual_memory", lambda: SimpleNamespace(available=machine * size))
    monkeypatch.setattr(optimizations, "from_environment", lambda: Processes(0, processes, 0, processes))
    monkeypatch.setattr(optimizations, "apply_group_offloading", lambda module, **options: said.append(options))
    optimizations._offload_groups(pipeline, torch.device("cuda"))
    assert [options["low_cpu_mem_usage"] for options in said if "use_stream" in options] == [is_short]


def test_a_measured_peak_is_what_a_plan_counts(monkeypatch) -> None:
    """Torch's reserve and the context, and None where nothing counts."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * GIB)
    assert optimizations.peak_bytes(torch.device("cuda")) == 3 * GIB + memory_prediction.CONTEXT_BYTES
    assert optimizations.peak_bytes(CPU) is None


def test_tiles_are_of_the_size_that_the_plan_counts_with(generator) -> None:
    """diffusers' own tile is the training size, at which nothing would be tiled."""
    apply(generator, Placement("x", vae_tiling=True))
    vae = generator.model.pipeline.vae
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 512, 64)
    apply(generator, Placement("x"))
    assert not vae.use_tiling


def test_offload_switches_do_no_harm_without_a_card(generator) -> None:
    expected, lines = draw(generator), []
    other = TextToImageGenerator(generator.config, lines.append)
    other.config.optimization.enable_sequential_cpu_offload = True
    assert numpy.array_equal(draw(other), expected)
    assert any("no effect" in line for line in lines)


# -- SDXL's VAE


@pytest.mark.parametrize(
    ("family", "force_upcast", "expected"),
    [("sdxl", True, torch.float32), ("sdxl", False, torch.float16), ("sd1", True, torch.float16)],
)
def test_an_sdxl_vae_that_overflows_in_fp16_runs_in_fp32(family: str, force_upcast: bool, expected: torch.dtype) -> None:
    pipeline = (pipelines.sdxl() if family == "sdxl" else pipelines.sd1()).to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=force_upcast)
    optimizations.apply(pipeline, Placement("gpu"), OptimizationConfig(), CPU)
    assert pipeline.vae.dtype == expected
    assert pipeline.unet.dtype == torch.float16


# -- out of memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (77x768 and 1024x320)"), False),
    ],
)
def test_out_of_memory_is_recognised_in_all_its_shapes(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def run_out(generator: TextToImageGenerator, monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Give the run a card of 100 GiB whose first ``times`` U-Net calls overflow; returns the plans that are applied."""
    applied: list[str] = []
    monkeypatch.setattr(optimizations, "memory_budget", lambda *_: 100 * GIB)
    monkeypatch.setattr(optimizations, "apply", lambda _, placement, *__: applied.append(placement.name))
    unet = generator.model.pipeline.unet
    real, calls = unet.forward, []

    def forward(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **named)

    monkeypatch.setattr(unet, "forward", forward)
    return applied


def test_a_run_steps_down_plan_by_plan_and_draws_the_same_picture(generator, monkeypatch) -> None:
    expected = draw(generator)
    generator.unload()
    lines: list[str] = []
    generator.say = lines.append
    applied = run_out(generator, monkeypatch, times=2)
    assert numpy.array_equal(draw(generator), expected)
    assert applied == ["gpu", *applied[1:]]
    assert len(applied) == 3
    peaks = [
        memory_prediction.PLANS.index(next(plan for plan in memory_prediction.PLANS if plan.name == name)) for name in applied
    ]
    assert peaks == sorted(peaks)
    assert sum("ran out" in line for line in lines) == 2
    draw(generator)
    assert len(applied) == 3, "the plan that worked is kept"


def test_when_every_plan_failed_it_is_exit_code_3(generator, monkeypatch) -> None:
    applied = run_out(generator, monkeypatch, times=100)
    with pytest.raises(UserError, match="out of memory") as caught:
        draw(generator)
    assert caught.value.exit_code is ExitCode.OUT_OF_MEMORY
    assert applied[-1] == "sequential-offload"
    assert caught.value.__context__ is None, "the error must not keep the tensors that filled the memory"
