"""The names of one module in the three dialects, computed from the name alone: no model is at hand when a file is converted.

diffusers' dotted name is the one that everything else is made from. kohya writes it flat, and for SDXL's U-Net writes the
flat name of the original code (Stability's sgm), which counts the layers of all blocks in one row. Every SD1, SD2 and SDXL
U-Net has two layers in a block on the way down and three on the way up, so both directions are arithmetic.
"""

from __future__ import annotations

import re

from src.errors import refused
from src.tensor_files import quoted

# Parts of module names that are written as one word, longest first so that conv_in is not taken for conv and in.
_PARTS = sorted(
    (
        "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
        "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
        "proj_out", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "time_embedding",
        "add_embedding", "linear_1", "linear_2", "text_model", "text_projection", "encoder", "layers", "self_attn",
        "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2", "input_blocks", "middle_block", "output_blocks",
        "in_layers", "out_layers", "emb_layers", "skip_connection", "op", "time_embed", "label_emb", "out",
    ),
    key=len, reverse=True,
)  # fmt: skip
_PART = re.compile(rf"({'|'.join(_PARTS)}|\d+)(?:_|$)")

# Diffusers' name -> the original code's, outside the blocks and inside a resnet.
ROOTS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET_PARTS = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_ORIGINAL_ROOTS = {original: name for name, original in ROOTS.items()}
_ORIGINAL_PARTS = {original: name for name, original in RESNET_PARTS.items()}
_ORIGINAL_MIDDLE = {number: name for name, number in _MIDDLE.items()}
_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_KOHYA_PREFIXES_OF_TWO = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya_name(component: str, module: str, family: str) -> str:
    """``lora_unet_...``, ``lora_te_...`` (SD1, SD2) or ``lora_te1_...`` (SDXL), without its suffix; ``module`` is canonical.

    Raises UserError (refused) for a component that the family has not.
    """
    prefixes = _KOHYA_PREFIXES_OF_TWO if family == "SDXL" else _KOHYA_PREFIXES
    if component not in prefixes:
        raise refused(f"layer {quoted(module)} is of the {component}, which no {family} model has; nothing is written")
    if component == "unet" and family == "SDXL":
        module = _to_original(module)
    return prefixes[component] + module.replace(".", "_")


def canonical(component: str, name: str) -> str:
    """diffusers' dotted name of a module, from any name that an adapter file calls it by; text encoders get ``text_model.``.

    Raises UserError (refused) for a name that is not one of an SD1, SD2 or SDXL model.
    """
    dotted = name if "." in name else ".".join(_parts(name))
    if component == "unet":
        return _from_original(dotted)
    return dotted if dotted == "text_projection" else f"text_model.{dotted.removeprefix('text_model.')}"


def _parts(flat: str) -> list[str]:
    parts, at = [], 0
    while at < len(flat):
        match = _PART.match(flat, at)
        if match is None:
            raise refused(f"layer {quoted(flat)} is no layer of an SD1, SD2 or SDXL model; it cannot be given another name")
        parts.append(match[1])
        at = match.end()
    return parts


def _to_original(name: str) -> str:
    """``down_blocks.1.attentions.0.proj_in`` -> ``input_blocks.4.1.proj_in``, as in Stability's SDXL."""
    if name in ROOTS:
        return ROOTS[name]
    if match := re.fullmatch(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)", name):
        return f"middle_block.{_MIDDLE[match[1]]}.{RESNET_PARTS.get(match[2], match[2])}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        block, layer = int(match[2]), int(match[4])
        row, number = ("input_blocks", 1 + 3 * block + layer) if match[1] == "down" else ("output_blocks", 3 * block + layer)
        return f"{row}.{number}.{int(match[3] == 'attentions')}.{RESNET_PARTS.get(match[5], match[5])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name):
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv"  # SDXL has attention in every block that it enlarges
    raise refused(f"layer {quoted(name)} is no layer of an SDXL U-Net; the kohya form has no name for it")


def _from_original(name: str) -> str:
    """The other way round; a name that is diffusers' own stays as it is."""
    if name in _ORIGINAL_ROOTS:
        return _ORIGINAL_ROOTS[name]
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    number = int(match[2])
    if match[1] == "middle_block":
        return f"mid_block.{_ORIGINAL_MIDDLE.get(match[2], 'none')}.{_ORIGINAL_PARTS.get(match[3], match[3])}"
    side, (block, layer) = ("down", divmod(number - 1, 3)) if match[1] == "input_blocks" else ("up", divmod(number, 3))
    index, _, part = match[3].partition(".")
    if part == "op":
        return f"down_blocks.{block}.downsamplers.0.conv"
    if part == "conv" and side == "up":
        return f"up_blocks.{block}.upsamplers.0.conv"
    kind = "attentions" if index == "1" else "resnets"
    return f"{side}_blocks.{block}.{kind}.{layer}.{_ORIGINAL_PARTS.get(part, part)}"
