"""The answer of ``--estimate-vram``: the plan that a run would take, and what it would need. Loads nothing, needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src import devices, images, memory_plan, memory_prediction, model_files, model_shapes, model_source
from src.config import AppConfig, OptimizationConfig, check_machine
from src.errors import not_found, refused
from src.measured_peaks import MeasuredPeaks, peak_key
from src.memory_plan import WINDOWS_RESERVE_BYTES
from src.memory_prediction import GIB
from src.model_files import read_json
from src.named_files import NamedFiles, adapter_weights, tagged_loras
from src.plan_report import table
from src.request import PictureRequest
from src.tensor_files import read_header


@dataclass(frozen=True)
class Answer:
    """What a run would need, for a person (``text``) and for a program (``as_json``)."""

    model: str
    family: str
    device: str  # what is drawn on, in words
    request: memory_prediction.Request
    plan: memory_plan.Plan

    def text(self) -> str:
        """Some lines of text: what is asked, every plan with its peak, the phases of the chosen one, and notes."""
        need = self.request
        quantized = f", {need.quantize} U-Net" if need.quantize else ""
        adapters = f", adapters {need.lora_bytes / GIB:.2f} GiB" if need.lora_bytes else ""
        lines = [
            f"model   {self.model} ({self.family}), {need.precision}{quantized}{adapters}",
            f"picture {need.width_px}x{need.height_px}, batch size {need.batch_size}, "
            f"guidance {'on' if need.guidance else 'off'}",
            f"device  {self.device}",
            "",
            table(self.plan),
            *(f"note: {note}" for note in self.plan.notes),
        ]
        if self.plan.budget_bytes is None:
            lines.append("to plan for a card that is not here, add --max-vram GB")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values. ``budget_bytes`` is None without a card; ``plans`` are in order from fast to small."""
        need, plan = self.request, self.plan
        return {
            "model": self.model, "family": self.family, "precision": need.precision, "device": self.device,
            "width": need.width_px, "height": need.height_px, "batch_size": need.batch_size, "guidance": need.guidance,
            "lora_bytes": need.lora_bytes, "quantize": need.quantize, "plan": plan.placement.name,
            "predicted_peak_bytes": plan.estimate.peak_bytes, "measured_peak_bytes": plan.measured.get(plan.placement.name),
            "budget_bytes": plan.budget_bytes, "fits": plan.fits, "notes": list(plan.notes),
            "phases": [
                {"name": phase.name, "weights_bytes": phase.weights_bytes, "activations_bytes": phase.activations_bytes,
                 "total_bytes": phase.total_bytes}
                for phase in plan.estimate.phases
            ],
            "plans": [
                {"name": item.name, "peak_bytes": peak, "is_measured": item.name in plan.measured, "fits": fits}
                for item, peak, fits in plan.rows
            ],
        }  # fmt: skip


def estimate(config: AppConfig, request: PictureRequest, place: Place | None = None) -> Answer:
    """Plan ``request`` as a run would, for ``place``: where it is not given, for what `find_place` finds.

    Raises UserError for what a run would refuse before it loads weights: the device, the precision, the switches, and a
    model, VAE or adapter that is missing or something else.
    """
    check_machine(config.model)
    memory_plan.check_switches(config.optimization)
    place = find_place(config) if place is None else place
    source, shapes = find_model(config)
    if isinstance(request.init_image, Path):  # as the run does, the size follows the picture that is drawn over
        width_px, height_px = images.fitting_size(images.read_image(request.init_image).size, shapes.native_px)
        request = replace(request, width=request.width or width_px, height=request.height or height_px)
    adapters = [_adapter_files(config, request, names) for names in tagged_loras(request, config)]
    need = memory_prediction.Request.of(
        request, shapes.native_px, place.precision,
        lora_bytes=max(memory_prediction.adapter_bytes(files, place.precision) for files in adapters),
        safety_checker=source.kind != "file" and not config.optimization.disable_safety_checker,
        quantize=config.optimization.quantize, attention_slicing=config.optimization.enable_attention_slicing,
        unet=shapes.unet,
    )  # fmt: skip
    key = peak_key(place.name, source.name, shapes, need, request.mode, config)
    measured = MeasuredPeaks(config.paths.folder("cache")).of(key)
    plan = memory_plan.choose(
        shapes, need, place.budget_bytes, config.optimization, memory_bytes=place.memory_bytes, measured=measured
    )
    return Answer(source.name, shapes.family, place.words, need, plan)


def find_model(config: AppConfig) -> tuple[model_source.Source, model_shapes.ModelShapes]:
    """The model and its shapes: bundled for a known hub id, which need not be here, else from its configs on disk."""
    source, shapes = _find_own(config)
    model, cache = config.model, config.paths.folder("cache")
    if model.vae:
        vae = model_source.resolve_vae(model.vae, cache, model.offline)
        if vae.kind == "file":  # brings no configuration: that of the model's own
            read_header(vae.path)
        elif vae.path is not None:  # another one may do without fp32
            shapes = replace(shapes, vae=read_json(model_files.vae_folder(vae.path) / "config.json", "take a whole copy"))
    return source, shapes


def _find_own(config: AppConfig) -> tuple[model_source.Source, model_shapes.ModelShapes]:
    """The same, with the model's own VAE."""
    model, cache = config.model, config.paths.folder("cache")
    if model.model_id in model_shapes.BUNDLED:
        return model_source.Source("hub", None, model.model_id), model_shapes.bundled_shapes(model.model_id)
    checker = not config.optimization.disable_safety_checker
    source = model_source.resolve(model.model_id, cache, model.offline, revision=model.revision, include_safety_checker=checker)
    if source.path is None:
        raise not_found(f"{model.model_id}: not on disk, and its shapes are not bundled; draw with it once, or give a folder")
    if source.kind != "file":
        return source, model_shapes.read_shapes(source.path)
    header = read_header(source.path)
    folder = model_files.architecture_folder(header, source.path, model.architecture)
    return source, model_shapes.read_shapes(folder, model_files.in_channels_of(header))


@dataclass(frozen=True)
class Place:
    """What is drawn on."""

    words: str
    name: str  # as torch calls the device
    precision: str
    budget_bytes: int | None  # None: no card
    memory_bytes: int | None = None  # main memory that is free


def find_place(config: AppConfig) -> Place:
    """The card, Mac or CPU that a run would take; without a card, one with ``max_vram_gb`` where the device is ``auto``."""
    wanted, cap_bytes = config.model, memory_plan.budget_of(config.optimization)
    cards = devices.detect_cards()
    device = devices.pick_device(wanted.device, card_count=len(cards), has_mps=devices.has_apple_gpu())
    is_imagined = (wanted.device, device) == ("auto", "cpu") and cap_bytes is not None
    precision = devices.pick_precision(
        wanted.precision, on_card=device != "cpu" or is_imagined, cpu_bf16=devices.cpu_has_bf16()
    )
    if is_imagined:
        return Place(f"a card with {cap_bytes / GIB:g} GiB (--max-vram), which is not here", "", precision, cap_bytes)
    total_bytes = devices.total_memory_bytes()
    free_bytes = devices.available_memory_bytes() or total_bytes
    if device == "cpu":
        words = f"CPU, {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB of memory free"
        return Place(words, device, precision, None, free_bytes)
    if device == "mps":  # shares the machine's memory; what macOS lets it have is about this much
        limit_bytes, name = total_bytes * 2 // 3, device
        words = f"Apple GPU, two thirds of {total_bytes / GIB:.1f} GiB of memory"
    else:
        card = cards[int(device.partition(":")[2] or 0)]
        limit_bytes, name = memory_plan.card_budget(card.free_bytes, OptimizationConfig()), card.name
        words = f"{card.name}, {card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
        if limit_bytes < card.free_bytes:
            words += f", of which {WINDOWS_RESERVE_BYTES / GIB:.1f} are left to Windows"
    if cap_bytes is not None and cap_bytes < limit_bytes:
        words, limit_bytes = f"{words}, planned for {cap_bytes / GIB:g} (--max-vram)", cap_bytes
    return Place(words, name, precision, limit_bytes, None if device == "mps" else free_bytes)


def _adapter_files(config: AppConfig, request: PictureRequest, names: Iterable[str]) -> list[Path]:
    """The weights of all adapters, those of the prompt's ``names`` included; refused when their tensors are no LoRA's."""
    named = NamedFiles(config.paths.folder("lora"), config.paths.folder("cache") / "hashes.json")
    tagged = map(named.tagged, names)
    files: list[Path] = []
    for path in {path.resolve(): path for path in (*(choice.path for choice in request.loras), *tagged)}.values():
        named.check_adapter(path)
        files += adapter_weights(path)
    for file in files:
        if not any("lora" in name for name in read_header(file).tensors):
            raise refused(f"{file}: belongs to no LoRA format that is read (diffusers, PEFT, kohya); name a LoRA file")
    return files
