"""The answer of ``--estimate-vram``: the plan that a run would take, and what it would need. Loads nothing, needs no torch."""

from __future__ import annotations

from pathlib import Path

from src import devices, memory_plan, model_files, model_shapes, model_source
from src.config import AppConfig
from src.errors import not_found
from src.request import PictureRequest
from src.tensor_files import read_header

GIB = 1 << 30


def estimate(config: AppConfig, request: PictureRequest) -> str:
    """Say, for the card at hand or ``max_vram_gb``, every plan with its predicted peak and which one would be taken."""
    name, shapes = _find_shapes(config)
    place, budget_bytes, precision = _find_place(config)
    need = memory_plan.Request(
        width_px=request.width or shapes.native_px, height_px=request.height or shapes.native_px,
        batch_size=min(request.batch_size, request.num_images), guidance=request.guidance_scale > 1, precision=precision,
        lora_bytes=sum(_size_bytes(choice.path) for choice in request.loras),
    )  # fmt: skip
    plan = memory_plan.choose(shapes, need, budget_bytes, config.optimization)
    size = f"{need.width_px}x{need.height_px}"
    lines = [
        f"model   {name} ({shapes.family}), {precision}",
        f"picture {size}, batch size {need.batch_size}, guidance {'on' if need.guidance else 'off'}",
        f"device  {place}",
        "",
        memory_plan.table(plan),
    ]
    if budget_bytes is None:
        lines.append("to plan for a card that is not here, add --max-vram GB")
    return "\n".join(lines)


def _find_shapes(config: AppConfig) -> tuple[str, model_shapes.ModelShapes]:
    """The model's name and shapes: bundled for the known models, else from its configs on disk."""
    model = config.model
    shapes = model_shapes.bundled_shapes(model.model_id)
    if shapes is not None:
        return model.model_id, shapes
    source = model_source.resolve(model.model_id, Path(config.paths.cache), offline=False, revision=model.revision)
    if source.kind == "file":
        folder = model_files.architecture_folder(read_header(source.path), source.path, model.architecture)
        return source.name, model_shapes.read_shapes(folder)
    if source.path is None:
        raise not_found(f"{model.model_id}: not on disk, and its shapes are not bundled; draw with it once, or give a folder")
    return source.name, model_shapes.read_shapes(source.path)


def _find_place(config: AppConfig) -> tuple[str, int | None, str]:
    """What is drawn on, in words; its memory in bytes (None: no card); and the precision used there."""
    wanted, cap_gb = config.model, config.optimization.max_vram_gb
    card = devices.detect_card() if wanted.device in ("auto", "cuda") else None
    if wanted.device != "cpu" and (card is not None or cap_gb is not None):
        precision = "fp16" if wanted.precision == "auto" else wanted.precision
        if cap_gb is not None:
            return f"a card with {cap_gb:g} GiB (--max-vram)", int(cap_gb * GIB), precision
        return f"{card.name}, {card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free", card.free_bytes, precision
    precision = wanted.precision
    if precision == "auto":
        precision = "bf16" if devices.cpu_has_bf16() else "fp32"
    return f"CPU, {devices.total_memory_bytes() / GIB:.1f} GiB of memory", None, precision


def _size_bytes(path: Path) -> int:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
