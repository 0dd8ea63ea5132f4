"""Apply a memory plan and the user's switches to a loaded pipeline: placement, offload, VAE tiling, layout, attention."""

from __future__ import annotations

import gc
import importlib.util
import sys
from typing import TYPE_CHECKING

import psutil
import torch

from src import cpu_layers
from src.config import OptimizationConfig
from src.errors import usage_error
from src.memory_plan import CONTEXT_BYTES, VAE_TILE_PX, budget_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

    from src.memory_plan import Placement

_OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA's own, and MPS's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
)


def memory_budget(device: torch.device, options: OptimizationConfig) -> int | None:
    """Bytes that a plan may use on the device: what is free now, or less if the user says so. None without a card.

    Asking CUDA opens a context, whose memory is then no longer free; a plan counts it, so it is given back here.
    """
    wanted = budget_of(options)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return min(free_bytes + CONTEXT_BYTES, wanted or sys.maxsize)
    if device.type == "mps":
        return min(torch.mps.recommended_max_memory(), wanted or sys.maxsize)
    return None


def memory_in_use_bytes(device: torch.device) -> int:
    """What this process holds: of the card's memory as torch's allocator keeps it, on a CPU of the main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def apply(pipeline: DiffusionPipeline, placement: Placement, options: OptimizationConfig, device: torch.device) -> None:
    """Put the pipeline where the plan says. May be called again with another placement.

    Raises UserError (usage) for a switch that this machine cannot do.
    """
    pipeline.remove_all_hooks()
    _set_modes(pipeline, placement, options)
    _make_vae_safe(pipeline)
    if not placement.on_card and not options.enable_torch_compile:  # a compiler does the same in its own way
        cpu_layers.prepare_for_drawing(pipeline.unet, exchange_attention=not options.enable_attention_slicing)
        cpu_layers.prepare_decoding(pipeline.vae)
    if placement.offload == "model":
        pipeline.to("cpu")
        pipeline.enable_model_cpu_offload(device=device)
    elif placement.offload == "sequential":
        pipeline.to("cpu")  # nothing may lie on the card before: the hooks would keep that copy
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    is_compiled = any(module._compiled_call_impl is not None for module in pipeline.unet.modules())
    if options.enable_torch_compile and not is_compiled:
        pipeline.unet.compile_repeated_blocks()


def use_float32_vae(
    pipeline: DiffusionPipeline, placement: Placement, options: OptimizationConfig, device: torch.device
) -> None:
    """Give the VAE the larger precision, for good: what overflowed once will again."""
    pipeline.remove_all_hooks()
    pipeline.vae.to(torch.float32)
    apply(pipeline, placement, options, device)


def set_vae_tiling(vae: AutoencoderKL, enabled: bool) -> None:
    """Let a VAE work in tiles: large pictures in little memory, slower, and with seams that are hardly seen."""
    (vae.enable_tiling if enabled else vae.disable_tiling)()
    vae.tile_sample_min_size = VAE_TILE_PX  # diffusers takes the training size: 1024 for SDXL, which would tile nothing
    vae.tile_latent_min_size = VAE_TILE_PX // 2 ** (len(vae.config.block_out_channels) - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many shapes of "out of memory", on cards and on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def free_memory() -> None:
    """Give what nobody holds any more back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the device's peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The largest amount allocated since ``reset_peak``; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _set_modes(pipeline: DiffusionPipeline, placement: Placement, options: OptimizationConfig) -> None:
    """VAE modes, memory layout and attention; torch's own attention kernels unless a switch asks for another."""
    vae = pipeline.vae
    (vae.enable_slicing if options.enable_vae_slicing else vae.disable_slicing)()  # decoding is one by one in any case
    set_vae_tiling(vae, placement.vae_tiling)
    if options.enable_channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if options.enable_xformers:
        if importlib.util.find_spec("xformers") is None:
            raise usage_error(
                "xformers is not installed; install it, or leave it out: torch's own attention is as fast on most cards"
            )
        pipeline.unet.enable_xformers_memory_efficient_attention()
    if options.enable_attention_slicing:
        pipeline.enable_attention_slicing()


def _make_vae_safe(pipeline: DiffusionPipeline) -> None:
    """SDXL's VAE overflows in fp16 and gives black pictures: run it in fp32, as the memory plan assumes.

    The fp16-fix VAE (``--vae madebyollin/sdxl-vae-fp16-fix``) says ``force_upcast: false`` and stays in fp16.
    """
    is_sdxl = hasattr(pipeline, "text_encoder_2")
    if is_sdxl and pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)
