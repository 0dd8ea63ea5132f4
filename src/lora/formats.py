"""What the adapter formats look like: which tensor names make a LoRA layer, at which scale, for which model family.

Pure names and tensors; no file is opened here and no model is known. A LoRA layer is a pair (down, up) that adds
``scale * up(down(x))`` to what a Linear or Conv2d puts out. r is the rank:

    Linear   down (r, in)         up (out, r)
    Conv2d   down (r, in, h, w)   up (out, r, 1, 1)

Three dialects name them:

    diffusers  unet.down_blocks.0.attentions.0.proj_in.lora.down.weight  (or .lora_A.weight; alpha in the header, or none)
    peft       base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight        (alpha in adapter_config.json)
    kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight            (alpha in a tensor beside it)

A DoRA also has lengths, in ``.lora_magnitude_vector`` or, in kohya's dialect, ``.dora_scale``.

kohya's flat names cannot be split back into modules with certainty, so it is done the other way round: `module_aliases`
gives every module of a model all the names that adapters call it by.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from src.errors import UserError, refused
from src.lora.names import RESNET_PARTS, ROOTS
from src.tensor_files import quoted

if TYPE_CHECKING:
    from torch import Tensor  # names and shapes are told without it

Where = tuple[str, str]  # (component, module as the file calls it)

# What stands before the module's name -> the pipeline component. Longer prefixes first.
_PREFIXES = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "lora_te3_": "text_encoder_3", "lora_transformer_": "transformer", "unet.": "unet", "diffusion_model.": "unet",
    "text_encoder_2.": "text_encoder_2", "text_encoder_3.": "text_encoder_3", "text_encoder.": "text_encoder",
    "transformer.": "transformer",
}  # fmt: skip
_UNET_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.")  # diffusers files of early 2023 have no prefix at all

_WEIGHT_NAME = re.compile(
    r"(?P<module>.+?)(?P<joint>\.lora\.|\.lora_linear_layer\.|_lora\.|\.lora_)(?P<role>down|up|mid|A|B)(?:\.default)?\.weight"
)
_ALPHA_NAME = re.compile(r"(?P<module>.+?)(?P<joint>_lora|\.lora|)\.alpha")
_MAGNITUDE_NAME = re.compile(
    r"(?P<module>.+?)(?P<joint>\.)(?P<role>lora_magnitude_vector|dora_scale)(?:\.default)?(?:\.weight)?"
)
_ROLES = {"A": "down", "B": "up"}
# Attention processors of early diffusers: attn1.processor.to_out_lora, self_attn.to_q_lora.
_PROCESSOR_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

# Other adapter kinds, recognised by a piece of a tensor's name.
_OTHER_KINDS = (
    ("LoHa", re.compile(r"\.hada_")),
    ("LoKr", re.compile(r"\.lokr_")),
    ("BOFT", re.compile(r"\.boft_")),
    ("OFT", re.compile(r"\.oft_|^oft_")),
    ("(IA)³", re.compile(r"\.on_input$|\.ia3_l")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("VeRA", re.compile(r"vera_(lambda|A|B)")),
    ("full difference", re.compile(r"\.diff(_b)?$|\.set_weight$|\.[wb]_norm$")),
    ("textual inversion bundle", re.compile(r"^bundle_emb")),
    ("textual inversion", re.compile(r"^(emb_params|string_to_param|clip_[lg]$)")),
    ("whole model", re.compile(r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\.")),
)
_WAY_OUT = {
    "textual inversion bundle": "take the LoRA without its embeddings",
    "textual inversion": "it is an embedding for a prompt, not a LoRA",
    "whole model": "load it as the model itself",
}
# PEFT initialisations that change the base weights as well: the adapter alone is not what was trained.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_CROSS_ATTENTION_KEY = re.compile(r"attn2[._]to_[kv]$")
_FAMILY_BY_CONTEXT_WIDTH = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # text features that cross-attention reads
_FAMILY_BY_NAME = (
    ("Flux", re.compile(r"double_blocks[._]|single_blocks[._]|single_transformer_blocks[._]")),
    ("SD3", re.compile(r"joint_blocks[._]")),
)
_DEEP_TRANSFORMER = re.compile(r"transformer_blocks[._][1-9]")  # in a UNet: SDXL has up to ten a layer, SD1 and SD2 one
_SDXL_WIDTHS = {640, 1280, 2560, 5120}  # of states there, and within their feed-forward; small models may be deep, too
_SD3_WIDTHS = {1536, 2432}  # medium, large
_MAX_KERNEL = 15  # a hostile mid could otherwise unfold to any size
_FAMILY_BY_METADATA = (
    ("SDXL", re.compile(r"^(sdxl|stable-diffusion-xl)")),
    ("SD3", re.compile(r"^(sd3|stable-diffusion-v?3)")),
    ("SD2", re.compile(r"^(sd_v2|stable-diffusion-v2)")),
    ("SD1", re.compile(r"^(sd_v1|stable-diffusion-v1)")),
    ("Flux", re.compile(r"^flux")),
)


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """One adapted module: ``scale * up(down(x))`` is added to its output.

    With a ``magnitude`` it is a DoRA (Liu et al. 2024, arXiv 2402.09353): the weight W becomes V = W + scale * up @ down with
    the length of each of its rows set to magnitude, V * magnitude / ||V||; or, as LyCORIS also has it, of each column.
    """

    down: Tensor  # (r, in) or (r, in, h, w)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float
    scale: float  # alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA
    magnitude: Tensor | None = None  # (out,) for rows; (1, in) or (1, in, 1, 1) for columns

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def effective_alpha(layer: LoraLayer) -> float:
    """The alpha that gives the layer's scale as alpha / rank."""
    alpha = layer.scale * layer.rank
    return layer.alpha if math.isclose(alpha, layer.alpha, rel_tol=1e-9) else alpha


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """How PEFT's settings of one component turn a layer's rank into its scale. Empty: alpha = rank, scale 1."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    dora: bool = False

    @classmethod
    def from_peft(cls, settings: Mapping[str, Any], label: str) -> ScaleRule:
        """Take what matters from a LoraConfig's JSON; ``rank_pattern`` does not, for the tensors tell each layer's rank.

        Raises UserError (refused) for an adapter that is not a plain LoRA, or an alpha that is not a positive number.
        """
        kind = settings.get("peft_type", "LORA")
        if kind != "LORA":
            raise _other_kind(label, quoted(str(kind)))
        init = settings.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
            raise refused(f"{label}: was trained with {quoted(init)}, which changes the base model; convert it to a plain LoRA")
        alpha, pattern = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
        if not isinstance(pattern, dict):
            raise refused(f"{label}: alpha_pattern is no table; the file is damaged")
        for name in pattern:
            if not re.fullmatch(r"\^?[\w.]+", name):
                raise refused(f"{label}: alpha_pattern {quoted(name)} is a regular expression; export it with plain names")
        return cls(
            alpha=None if alpha is None else _positive(alpha, label),
            alpha_pattern={name: _positive(value, label) for name, value in pattern.items()},
            rank_stabilised=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
        )

    def alpha_of(self, module: str, rank: int) -> float:
        for name, alpha in self.alpha_pattern.items():
            if f".{module}".endswith(f".{name}") or name == f"^{module}":
                return alpha
        return rank if self.alpha is None else self.alpha


class TensorName(NamedTuple):
    """A tensor's name, taken apart."""

    component: str
    module: str
    role: str  # down | up | mid | alpha | lora_magnitude_vector | dora_scale


def split_name(name: str, component: str | None = None) -> TensorName | None:
    """Take an adapter's tensor name apart; None if it is none. ``component`` is given where the folder tells it (PEFT)."""
    match = _MAGNITUDE_NAME.fullmatch(name) or _WEIGHT_NAME.fullmatch(name) or _ALPHA_NAME.fullmatch(name)
    if match is None:
        return None
    module, role = match["module"], match.groupdict().get("role", "alpha")
    if component is None:
        prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
        if not prefix and not module.startswith(_UNET_ROOTS):
            return None
        component, module = _PREFIXES.get(prefix, "unet"), module.removeprefix(prefix)
    module = module.removeprefix("base_model.model.").replace(".processor.", ".")
    if match["joint"].startswith("_lora"):
        head, _, leaf = module.rpartition(".")
        in_text_encoder = component.startswith("text_encoder")
        leaf = _PROCESSOR_NAMES.get(leaf, leaf) if in_text_encoder else leaf + ".0" * (leaf == "to_out")
        module = f"{head}.{leaf}"
    elif role == "lora_magnitude_vector" and module.endswith(".to_out"):
        module += ".0"
    return TensorName(component, module, _ROLES.get(role, role))


def refuse_other_kinds(names: Iterable[str], label: str) -> None:
    """Raise UserError (refused), naming the kind, for an adapter that is neither a LoRA nor a DoRA."""
    for name in names:
        for kind, pattern in _OTHER_KINDS:
            if pattern.search(name):
                raise _other_kind(label, kind)


def split_names(names: Iterable[str], label: str, component: str | None = None) -> dict[str, TensorName]:
    """Take all names of a file apart. Raises UserError (refused) for a name of no known format, or two that mean the same."""
    split: dict[str, TensorName] = {}
    for name in names:
        parts = split_name(name, component)
        if parts is None:
            raise refused(f"{label}: tensor {quoted(name)} belongs to no LoRA format that is read (diffusers, PEFT, kohya)")
        split[name] = parts
    if len(set(split.values())) < len(split):
        raise refused(f"{label}: has the same tensor under two names; the file is damaged")
    return split


def assemble(
    tensors: Mapping[str, Tensor], names: Mapping[str, TensorName], rules: Mapping[str, ScaleRule], label: str
) -> dict[Where, LoraLayer]:
    """Build the layers out of a file's tensors. ``rules`` by component; a layer's own alpha tensor goes before its rule.

    Raises UserError (refused), naming the tensor or the layer: down without up, ranks that disagree, NaN or infinity, an
    alpha that is not positive.
    """
    import torch

    parts: dict[Where, dict[str, Tensor]] = {}
    for name, (component, module, role) in names.items():
        if not torch.isfinite(tensors[name]).all():
            raise refused(f"{label}: tensor {quoted(name)} holds NaN or infinity: the training failed; take another file")
        parts.setdefault((component, module), {})[role] = tensors[name]
    return {where: _layer(where, roles, rules.get(where[0], ScaleRule()), label) for where, roles in parts.items()}


def guess_family(layers: Mapping[Where, LoraLayer], metadata: Mapping[str, str]) -> str | None:
    """SD1, SD2, SDXL, Flux, SD3, or None when nothing tells. Shapes and names go before the header, which is often wrong."""
    for family, pattern in _FAMILY_BY_NAME:
        if any(pattern.search(module) for _, module in layers):
            return family
    for (component, module), layer in layers.items():
        if component == "unet" and _CROSS_ATTENTION_KEY.search(module) and layer.down.shape[1] in _FAMILY_BY_CONTEXT_WIDTH:
            return _FAMILY_BY_CONTEXT_WIDTH[layer.down.shape[1]]
        if component == "unet" and _DEEP_TRANSFORMER.search(module) and layer.down.shape[1] in _SDXL_WIDTHS:
            return "SDXL"
        if component == "transformer" and module.endswith("attn.to_q") and layer.down.shape[1] in _SD3_WIDTHS:
            return "SD3"
    parts = {component for component, _ in layers}
    if "text_encoder_2" in parts and "transformer" not in parts:  # SD3 has a second text encoder, but no UNet
        return "SDXL"
    for key in ("ss_base_model_version", "modelspec.architecture"):
        for family, pattern in _FAMILY_BY_METADATA:
            if pattern.search(metadata.get(key, "").lower()):
                return family
    return None


def module_aliases(component: str, names: Iterable[str]) -> dict[str, str]:
    """Map every name that an adapter may use to the module of ``component`` that it means.

    ``names`` are the module's own dotted names. CLIP's ``text_model.`` comes and goes between transformers' versions
    and classes, so it is optional; a UNet also has the names of the original code, which kohya uses for SDXL.
    """
    names = list(names)
    if component == "unet":
        others = original_unet_names(names)
    else:
        others = {name: name.removeprefix("text_model.") for name in names}
        others |= {name: f"text_model.{name}" for name in names if not name.startswith("text_model.")}
    aliases = {}
    for name in names:
        for alias in (name, others.get(name, name)):
            aliases[alias] = aliases[alias.replace(".", "_")] = name
    return aliases


def original_unet_names(names: Iterable[str]) -> dict[str, str]:
    """Map diffusers' UNet module names to those of the original code (CompVis ldm, Stability sgm).

    The original counts every layer of all down blocks in one row, ``input_blocks.0`` being conv_in, and likewise
    ``output_blocks``; in each, 0 is the resnet, 1 the attention, and an upsampler comes last.
    """
    names = list(names)
    heads = {match[0] for name in names if (match := re.match(r"(down|up)_blocks\.\d+\.\w+\.\d+", name))}
    counts = {side: 1 + max((int(h.split(".")[1]) for h in heads if h.startswith(side)), default=-1) for side in ("down", "up")}
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for side, original, number in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for index in range(counts[side]):
            block = f"{side}_blocks.{index}"
            for layer in range(sum(head.startswith(f"{block}.resnets.") for head in heads)):
                blocks[f"{block}.resnets.{layer}"] = f"{original}.{number}.0"
                blocks[f"{block}.attentions.{layer}"] = f"{original}.{number}.1"
                number += 1
            blocks[f"{block}.upsamplers.0"] = f"{original}.{number - 1}.{2 if f'{block}.attentions.0' in heads else 1}"
            if f"{block}.downsamplers.0" in heads:
                blocks[f"{block}.downsamplers.0"] = f"{original}.{number}.0"
                number += 1
    return {name: original for name in names if (original := _original_name(name, blocks))}


def _original_name(name: str, blocks: Mapping[str, str]) -> str | None:
    if name in ROOTS:
        return ROOTS[name]
    match = re.fullmatch(r"((?:(?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.\d+)\.(.+)", name)
    if match is None or match[1] not in blocks:
        return None
    part = "op" if match[2] == "downsamplers" else RESNET_PARTS.get(match[3], match[3])
    return f"{blocks[match[1]]}.{part}"


def _layer(where: Where, roles: Mapping[str, Tensor], rule: ScaleRule, label: str) -> LoraLayer:
    """Check one layer's tensors against each other and put them into the two-tensor form."""
    name = quoted(where[1])
    if "down" not in roles or "up" not in roles:
        raise refused(f"{label}: layer {name} has {' and '.join(roles)} alone, without its counterpart; the file is damaged")
    down, up = roles["down"], roles["up"]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[2:].numel() != 1 or 0 in (*down.shape, *up.shape):
        raise refused(f"{label}: layer {name} has the shapes {tuple(down.shape)} and {tuple(up.shape)}, which no LoRA has")
    if down.shape[0] != up.shape[1]:
        raise refused(f"{label}: layer {name} has rank {down.shape[0]} in down and {up.shape[1]} in up; the file is damaged")
    rank = down.shape[0]
    if "mid" in roles:
        down = _fold_mid(roles["mid"], down, name, label)
    if "alpha" in roles and roles["alpha"].numel() != 1:
        raise refused(f"{label}: the alpha of layer {name} is not one number; the file is damaged")
    alpha = _positive(roles["alpha"].item(), label) if "alpha" in roles else rule.alpha_of(where[1], rank)
    scale = alpha / (math.sqrt(rank) if rule.rank_stabilised else rank)
    return LoraLayer(down, up, alpha, scale, _magnitude(roles, down, up, rule, f"{label}: layer {name}"))


def _magnitude(roles: Mapping[str, Tensor], down: Tensor, up: Tensor, rule: ScaleRule, label: str) -> Tensor | None:
    """DoRA's lengths: of rows as (out,), of columns as (1, in) or (1, in, 1, 1). PEFT has rows alone, LyCORIS both."""
    if "lora_magnitude_vector" not in roles and "dora_scale" not in roles:
        if rule.dora:
            raise refused(f"{label} has no lengths, though its settings say that it is a DoRA; the file is damaged")
        return None
    given = roles.get("lora_magnitude_vector", roles.get("dora_scale"))
    out, columns = up.shape[0], (1, down.shape[1], *[1] * (down.ndim - 2))
    if given.numel() == out and ("lora_magnitude_vector" in roles or given.shape[0] == out):
        return given.flatten()
    if "dora_scale" in roles and given.shape == columns:
        return given
    raise refused(
        f"{label} is a DoRA with lengths of shape {tuple(given.shape)}, which fit no weight of it; the file is damaged"
    )


def _fold_mid(mid: Tensor, down: Tensor, name: str, label: str) -> Tensor:
    """LyCORIS's CP form is 1x1 down, h x w mid, 1x1 up; down and mid in a row are one convolution."""
    import torch

    rank = down.shape[0]
    if mid.ndim != 4 or mid.shape[:2] != (rank, rank) or down.shape[2:].numel() != 1 or max(mid.shape[2:]) > _MAX_KERNEL:
        raise refused(f"{label}: layer {name} has a mid of shape {tuple(mid.shape)}, which does not fit its rank {rank}")
    return torch.einsum("mnhw,ni->mihw", mid.float(), down.float().flatten(1))  # (r, in, h, w)


def _positive(alpha: Any, label: str) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < sys.float_info.max:
        raise refused(f"{label}: has the alpha {quoted(str(alpha))}; it must be a positive number")
    return float(alpha)


def _other_kind(label: str, kind: str) -> UserError:
    way_out = _WAY_OUT.get(kind, "convert or train it as a plain LoRA")
    return refused(f"{label}: is of the kind {kind}, which is not read; {way_out}")
