"""An adapter's layers as files in the three forms, in memory: bytes by file name. ``src/files.py`` puts them on the disk.

    diffusers  pytorch_lora_weights.safetensors      plain diffusers, ComfyUI, SD.Next, this program
    peft       unet_lora/, text_encoder_one_lora/, text_encoder_two_lora/: PeftModel.from_pretrained
    kohya      NAME.safetensors                      A1111, Forge, ComfyUI, kohya's own tools

Strength. Only kohya's form has a tensor for alpha, and only diffusers since 0.33 reads alpha from the header; ComfyUI and
older diffusers take the scale as 1. So the diffusers form has the scale multiplied into ``up``, and alpha = rank in its
header: every reader, told or not, computes the same. Where alpha = rank already, nothing is rounded.

Names. ComfyUI knows the attention of a U-Net by its name of 2023 alone (``attn1.processor.to_q_lora.down.weight``) and
skips today's (``attn1.to_q.lora.down.weight``) with a warning; every diffusers reads both. So the old one is written.

DoRA. PEFT and diffusers know a length for each output (row of the weight), which is what ``magnitude`` (out,) is; a length
for each input, which LyCORIS can have, stays with kohya's form. Read elsewhere, kohya's form of such a DoRA is not the same:
A1111 takes all lengths as the inputs', and ComfyUI divides by the length of the base weight's rows, not the adapted one's.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from src.errors import UserError, refused
from src.files import is_device_name
from src.lora.formats import LoraLayer, Where, effective_alpha
from src.lora.headers import AdapterFacts, describe, hashes
from src.lora.names import canonical, kohya_name
from src.tensor_files import quoted

__all__ = ["FORMATS", "AdapterFacts", "adapter_files", "diffusers_file", "kohya_file", "kohya_file_name", "peft_folders"]

FORMATS = ("diffusers", "peft", "kohya")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FOLDERS = {"unet": "unet_lora", "text_encoder": "text_encoder_one_lora", "text_encoder_2": "text_encoder_two_lora"}
_PEFT_CLASSES = {
    "unet": ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    "text_encoder": ("CLIPTextModel", "transformers.models.clip.modeling_clip"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "transformers.models.clip.modeling_clip"),
}
_ATTENTION = re.compile(r"(?P<block>.+\.attn[12])\.(?P<leaf>to_[qkv]|to_out)(\.0)?")


def adapter_files(
    layers: Mapping[Where, LoraLayer], facts: AdapterFacts, formats: Collection[str], dtype: torch.dtype | None = None
) -> dict[str, bytes]:
    """The files of all wanted ``formats`` (of FORMATS) by relative name; PEFT's have one folder in front.

    ``layers`` by (component, module), the module named as in the model or in any file; ``dtype`` None keeps each tensor's.
    Raises UserError: refused for a layer that the form has no name for, failure for a number that is not finite.
    """
    files: dict[str, bytes] = {}
    if "diffusers" in formats:
        files[DIFFUSERS_FILE] = diffusers_file(layers, facts, dtype)
    if "peft" in formats:
        files |= peft_folders(layers, facts, dtype)
    if "kohya" in formats:
        files[kohya_file_name(facts.name)] = kohya_file(layers, facts, dtype)
    return files


def kohya_file_name(name: str) -> str:
    """``sks dog`` -> ``sks_dog.safetensors``: safe on every system, and no name that another form has."""
    stem = re.sub(r"[^\w-]+", "_", name).strip("_").encode()[:80].decode(errors="ignore") or "lora"
    stem += "_lora" if is_device_name(stem) else ""
    return f"{stem}_kohya.safetensors" if f"{stem}.safetensors" == DIFFUSERS_FILE else f"{stem}.safetensors"


def diffusers_file(layers: Mapping[Where, LoraLayer], facts: AdapterFacts, dtype: torch.dtype | None = None) -> bytes:
    """``pytorch_lora_weights.safetensors``: scale folded into ``up``, names that diffusers and ComfyUI both know."""
    folded = {where: _with_alpha(layer, layer.rank, where) for where, layer in _canonical(layers).items()}
    tensors: dict[str, Tensor] = {}
    for (component, module), layer in folded.items():
        stem, joint = f"{component}.{module}", ".lora." if component == "unet" else ".lora_linear_layer."
        if component == "unet" and (match := _ATTENTION.fullmatch(module)):
            stem, joint = f"unet.{match['block']}.processor.{match['leaf']}", "_lora."
        tensors[f"{stem}{joint}down.weight"] = layer.down
        tensors[f"{stem}{joint}up.weight"] = layer.up
        if layer.magnitude is not None:
            # transformers 5 finds the lengths with ".weight" alone, and else draws without them, with a warning
            suffix = "" if component == "unet" else ".weight"
            tensors[f"{component}.{module}.lora_magnitude_vector{suffix}"] = _peft_magnitude(layer, module)
    settings: dict[str, Any] = {}
    for component, mine in _by_component(folded).items():
        # diffusers makes a LoraConfig of these: keys that every PEFT has, and modules by an end of their name that fits
        # the text encoders of transformers 4 (text_model.encoder...) and 5 (encoder...) alike.
        shortened = {module.removeprefix("text_model."): layer for module, layer in mine.items()}
        settings |= {f"{component}.{key}": value for key, value in _peft_settings(shortened).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True), **describe(folded, facts)}
    return _serialise(_cast(tensors, dtype), metadata)


def peft_folders(layers: Mapping[Where, LoraLayer], facts: AdapterFacts, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """One folder for each component, with true ranks and alphas, for the models of the installed transformers."""
    files: dict[str, bytes] = {}
    every = _canonical(layers)
    for component, mine in _by_component(every).items():
        named = {_name_in_model(component, module): layer for module, layer in mine.items()}
        tensors: dict[str, Tensor] = {}
        for module, layer in named.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = layer.down
            tensors[f"base_model.model.{module}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                tensors[f"base_model.model.{module}.lora_magnitude_vector"] = _peft_magnitude(layer, module)
        model_class, library = _PEFT_CLASSES[component]
        settings = {
            "peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": facts.base_model or None,
            "auto_mapping": {"base_model_class": model_class, "parent_library": library}, **_peft_settings(named),
        }  # fmt: skip
        folder = PEFT_FOLDERS[component]
        files[f"{folder}/adapter_config.json"] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
        files[f"{folder}/adapter_model.safetensors"] = _serialise(
            _cast(tensors, dtype), {"format": "pt", **describe(every, facts)}
        )
    return files


def kohya_file(layers: Mapping[Where, LoraLayer], facts: AdapterFacts, dtype: torch.dtype | None = None) -> bytes:
    """kohya's form: flat names, an alpha in a float32 tensor beside each layer, its hashes in the header.

    The alpha is scale * rank: what the layer was trained with, and for rank-stabilised LoRA, of which kohya's form knows
    nothing, the one that gives the same strength. Where layers differ, all are given the commonest: diffusers, and what is
    built on it, looks for the alphas that differ under names of 2023 and takes the commonest when it does not find them.
    """
    named = _canonical(layers)
    [(common, _)] = Counter(map(effective_alpha, named.values())).most_common(1)
    if any(effective_alpha(layer) != common for layer in named.values()):
        named = {where: _with_alpha(layer, common, where) for where, layer in named.items()}
    tensors: dict[str, Tensor] = {}
    for (component, module), layer in named.items():
        stem = kohya_name(component, module, facts.family)
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up
        if layer.magnitude is not None:
            lengths = layer.magnitude
            tensors[f"{stem}.dora_scale"] = lengths if lengths.ndim > 1 else lengths.reshape(-1, *[1] * (layer.down.ndim - 1))
    cast = _cast(tensors, dtype)
    for (component, module), layer in named.items():
        cast[f"{kohya_name(component, module, facts.family)}.alpha"] = torch.tensor(effective_alpha(layer))
    metadata = describe(named, facts)
    data = _serialise(cast, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    return _serialise(cast, metadata | hashes(data))


def _canonical(layers: Mapping[Where, LoraLayer]) -> dict[Where, LoraLayer]:
    if not layers:
        raise refused("the adapter has no layers; nothing is written")
    for component, module in layers:
        if component not in PEFT_FOLDERS:
            raise refused(f"layer {quoted(module)} is of the {component}, which no SD model has; nothing is written")
    return {(component, canonical(component, module)): layer for (component, module), layer in sorted(layers.items())}


def _by_component(layers: Mapping[Where, LoraLayer]) -> dict[str, dict[str, LoraLayer]]:
    parts: dict[str, dict[str, LoraLayer]] = {}
    for (component, module), layer in layers.items():
        if component not in PEFT_FOLDERS:
            raise refused(
                f"layer {quoted(module)} is of the {component}, which no SD1, SD2 or SDXL model has; nothing is written"
            )
        parts.setdefault(component, {})[module] = layer
    return parts


def _with_alpha(layer: LoraLayer, alpha: float, where: Where) -> LoraLayer:
    """The same layer with another alpha, what differs multiplied into ``up`` in float32 and rounded once."""
    factor = layer.scale * layer.rank / alpha
    up = layer.up if math.isclose(factor, 1, rel_tol=1e-9) else (layer.up.float() * factor).to(layer.up.dtype)
    if not torch.isfinite(up).all():
        raise _not_finite(where[1], layer.up.dtype)
    return LoraLayer(layer.down, up, float(alpha), alpha / layer.rank, layer.magnitude)


def _peft_magnitude(layer: LoraLayer, module: str) -> Tensor:
    """PEFT's shape of DoRA's lengths: (out,) for a Linear, (1, out, 1, 1) for a convolution."""
    assert layer.magnitude is not None
    if layer.magnitude.ndim != 1:
        raise refused(f"layer {quoted(module)} is a DoRA with a length for each input, which only kohya's form can hold")
    return layer.magnitude if layer.down.ndim == 2 else layer.magnitude.reshape(1, -1, 1, 1)


def _peft_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """A LoraConfig of one component's layers, as JSON: the commonest rank and alpha, and patterns for the others.

    PEFT has one rule of scaling for a whole component, so layers of mixed rules are given the alphas of the plain one.
    """
    stabilised = all(math.isclose(layer.scale, layer.alpha / math.sqrt(layer.rank), rel_tol=1e-9) for layer in layers.values())
    stabilised = stabilised and any(layer.rank > 1 for layer in layers.values())
    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: layer.alpha if stabilised else effective_alpha(layer) for module, layer in layers.items()}
    [(rank, _)], [(alpha, _)] = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    doras = {layer.magnitude is not None for layer in layers.values()}
    if len(doras) > 1:
        raise refused("some layers of a component are DoRA and some are not, which only kohya's form can hold; choose that")
    return {
        "r": rank, "lora_alpha": _whole(alpha), "target_modules": sorted(layers), "bias": "none",
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _whole(value) for module, value in alphas.items() if value != alpha},
        "use_rslora": stabilised, "use_dora": doras == {True},
    }  # fmt: skip


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


@functools.cache
def _text_encoder_is_flat(class_name: str) -> bool:
    """Whether the installed transformers has lost the ``text_model.`` of this class; PEFT wants its exact names."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, class_name)(
            transformers.CLIPTextConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
            )
        )
    return not hasattr(model, "text_model")


def _name_in_model(component: str, module: str) -> str:
    if component != "unet" and _text_encoder_is_flat(_PEFT_CLASSES[component][0]):
        return module.removeprefix("text_model.")
    return module


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Detached copies on the CPU, every number finite. Raises UserError (failure)."""
    cast: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        cast[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not torch.isfinite(cast[name]).all():
            raise _not_finite(name, cast[name].dtype)
    return cast


def _not_finite(name: str, dtype: torch.dtype) -> UserError:
    return UserError(
        f"{quoted(name)} holds NaN, infinity or more than {str(dtype).removeprefix('torch.')} can hold; nothing is written; "
        "save it in fp32, or train again with a lower learning rate"
    )


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A .safetensors file. The library writes metadata in a new order each time; here, equal adapters are equal files."""
    data = save(dict(tensors))
    end = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(data[8:end])}
    # "replace": a name may come from a folder's, which need not be text
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]
