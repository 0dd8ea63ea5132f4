"""Apply a memory plan and the user's switches to a loaded pipeline: placement, offload, VAE tiling, layout, attention."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import psutil
import torch
from diffusers.hooks import HookRegistry, apply_group_offloading

from src import cpu_layers
from src.config import OptimizationConfig
from src.devices import available_memory_bytes, driver_spills
from src.memory_plan import budget_of, card_budget
from src.memory_prediction import CONTEXT_BYTES, VAE_TILE_PX
from src.processes import from_environment
from src.quantization import quantize_unet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

    from src.memory_prediction import Placement


def memory_budget(device: torch.device, options: OptimizationConfig) -> int | None:
    """Bytes that a plan may use on the device: what is free now, or less if the user says so. None without a card.

    Asking CUDA opens a context, whose memory is then no longer free; a plan counts it, so it is given back here. Where there
    is a limit below what is free, torch is held to it: what exceeds it fails and steps down. On Windows the driver would
    otherwise move memory off the card in silence, and draw a hundred times slower.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget_bytes = card_budget(free_bytes + CONTEXT_BYTES, options)
        is_held = driver_spills() or options.max_vram_gb is not None
        share = min(1.0, max(0, budget_bytes - CONTEXT_BYTES) / total_bytes) if is_held else 1.0
        torch.cuda.set_per_process_memory_fraction(share, device.index)  # of the current card where there is none
        return budget_bytes
    if device.type == "mps":
        limit_bytes = torch.mps.recommended_max_memory()
        budget_bytes = min(limit_bytes, budget_of(options) or sys.maxsize)
        torch.mps.set_per_process_memory_fraction(budget_bytes / limit_bytes)  # its own limit is above the machine's memory
        return budget_bytes
    return None


def room_bytes(device: torch.device) -> int | None:
    """What this process could hold now: what is free, and what it holds already. None on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def memory_in_use_bytes(device: torch.device) -> int:
    """What this process holds: of the card's memory as torch's allocator keeps it, on a CPU of the main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def apply(pipeline: DiffusionPipeline, placement: Placement, options: OptimizationConfig, device: torch.device) -> None:
    """Put the pipeline where the plan says. May be called again with another placement."""
    _release(pipeline)
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
    elif placement.offload == "group":
        pipeline.to("cpu")
        _offload_groups(pipeline, device)
    else:
        pipeline.to(device)
    is_compiled = any(module._compiled_call_impl is not None for module in pipeline.unet.modules())
    if options.enable_torch_compile and not is_compiled:
        pipeline.unet.compile_repeated_blocks()


def use_float32_vae(
    pipeline: DiffusionPipeline, placement: Placement, options: OptimizationConfig, device: torch.device
) -> None:
    """Give the VAE the larger precision, for good: what overflowed once will again."""
    _release(pipeline)
    pipeline.vae.to(torch.float32)
    apply(pipeline, placement, options, device)


def quantize(pipeline: DiffusionPipeline, kind: str, device: torch.device) -> None:
    """Bring the U-Net's matrices to ``"int8"`` or ``"nf4"``, for good: on the device, so that every plan has the same numbers.

    Raises UserError (usage) without bitsandbytes. That the card can do it was asked before the model was loaded.
    """
    quantize_unet(pipeline.unet.requires_grad_(False), kind)
    pipeline.unet.to(device)


def move_to_cpu(pipeline: DiffusionPipeline) -> None:
    """Take everything off the card, in fp32."""
    _release(pipeline)
    pipeline.disable_xformers_memory_efficient_attention()  # knows no CPU
    pipeline.to("cpu", torch.float32)
    free_memory()


def set_vae_tiling(vae: AutoencoderKL, enabled: bool) -> None:
    """Let a VAE work in tiles: large pictures in little memory, slower, and with seams that are hardly seen."""
    (vae.enable_tiling if enabled else vae.disable_tiling)()
    vae.tile_sample_min_size = VAE_TILE_PX  # diffusers takes the training size: 1024 for SDXL, which would tile nothing
    vae.tile_latent_min_size = VAE_TILE_PX // 2 ** (len(vae.config.block_out_channels) - 1)


def free_memory() -> None:
    """Give what nobody holds any more back to the card, and pinned memory of group offload to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def reset_peak(device: torch.device, *, clean: bool = False) -> None:
    """Start a new measurement of the device's peak memory; ``clean``: without what earlier work left in torch's reserve."""
    if device.type == "cuda":
        if clean:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that this process held of the card since ``reset_peak``, counted as a plan counts: torch's reserve (what it
    handed out and what it lost) and the context. None where torch does not count: on a CPU and a Mac."""
    return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES if device.type == "cuda" else None


def _offload_groups(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Keep weights in main memory, pinned where that suffices, and fetch each part for its work.

    The U-Net, which works at every step, in blocks (``unet_weights.offload_groups``): on CUDA the next one is fetched by a
    stream of its own while one works. diffusers' own blocks (a whole level, and the middle always) would hold 2.2 of SDXL's
    2.6 billion parameters at once. The others, which work once a picture, layer by layer. A safety checker stays on the card.
    """
    unet = pipeline.unet
    places = {"onload_device": device, "offload_device": torch.device("cpu")}
    streams = {}
    if device.type == "cuda":
        weights = sum(item.numel() * item.element_size() for item in unet.parameters())
        short = _free_memory_bytes() < 2 * weights  # torch rounds what it pins up to a power of two
        streams = {"use_stream": True, "low_cpu_mem_usage": short}
    levels = [str(level) for level in range(len(unet.config.block_out_channels))]
    blocks = ["down_blocks", "mid_block", "up_blocks", *levels]  # looked into; what they list are the groups
    apply_group_offloading(unet, **places, **streams, offload_type="block_level", num_blocks_per_group=1, block_modules=blocks)
    for name, component in pipeline.components.items():
        if name == "safety_checker" and component is not None:
            component.to(device)
        elif isinstance(component, torch.nn.Module) and component is not unet:
            apply_group_offloading(component, **places, offload_type="leaf_level")


def _free_memory_bytes() -> int:
    """This process's share of the main memory that is free, of a container's where it has a limit."""
    free_bytes = available_memory_bytes()
    return (psutil.virtual_memory().available if free_bytes is None else free_bytes) // from_environment().local_count


def _release(pipeline: DiffusionPipeline) -> None:
    """Take every offload hook off; weights stay where they are."""
    pipeline.remove_all_hooks()
    for component in pipeline.components.values():
        for module in component.modules() if isinstance(component, torch.nn.Module) else ():
            if hasattr(module, "_diffusers_hook"):
                registry: HookRegistry = module._diffusers_hook
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)
                del module._diffusers_hook
            # Both libraries put back the class's own forward as an attribute, which hides that of a class exchanged later.
            if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                del module.forward


def _set_modes(pipeline: DiffusionPipeline, placement: Placement, options: OptimizationConfig) -> None:
    """VAE modes, memory layout and attention; torch's own attention kernels unless a switch asks for another."""
    vae = pipeline.vae
    set_vae_tiling(vae, placement.vae_tiling)
    if options.enable_channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if options.enable_xformers:
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
