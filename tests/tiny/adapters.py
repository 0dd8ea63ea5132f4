"""LoRA adapters written by hand in every format, and the model that each of them must be equal to: weights merged by hand.

Nothing here uses the program's own code. A module is called as diffusers calls it, text encoders with ``text_model.``
in front, as almost every file on the net has it.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import pipelines

FAMILIES = {"SD1": pipelines.sd1, "SD2": lambda: pipelines.sd1(cross_attention_dim=48, linear=True), "SDXL": pipelines.sdxl}
ATTENTION = r"(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$"
LINEAR = ATTENTION[:-2] + r"|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|fc1|fc2)$"  # kohya's usual set
EVERYTHING = r"."

# The tiny SDXL's blocks in the original (sgm) code, counted by hand: two resnets a block, three on the way up.
SGM_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0", "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0", "down_blocks.1.attentions.1": "input_blocks.5.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0", "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0", "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
SGM_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip


@dataclass
class Layer:
    component: str
    module: str
    down: Tensor  # (r, in) or (r, in, h, w); with mid (r, in, 1, 1)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float
    mid: Tensor | None = None  # (r, r, h, w)
    magnitude: Tensor | None = None  # DoRA: of the weight's shape, 1 in all axes but that of the outputs, or of the inputs

    def difference(self, scale: float | None = None) -> Tensor:
        """What is added to the weight: up @ down times alpha / r, convolution by convolution."""
        scale = self.alpha / self.down.shape[0] if scale is None else scale
        down, up = self.down.double(), self.up.double()
        if self.mid is not None:
            return scale * torch.einsum("om,mnhw,ni->oihw", up[:, :, 0, 0], self.mid.double(), down[:, :, 0, 0])
        if down.ndim == 4:
            return scale * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        return scale * (up @ down)

    def change(self, base: Tensor, scale: float | None = None) -> Tensor:
        """What the adapter adds to the weight ``base``: a DoRA also brings rows or columns to their lengths."""
        base = base.double()
        adapted = base + self.difference(scale).reshape(base.shape)
        if self.magnitude is not None:
            magnitude = self.magnitude.double().reshape([n if n == m else 1 for n, m in zip(base.shape, self.magnitude.shape)])
            axes = [axis for axis in range(base.ndim) if magnitude.shape[axis] == 1]
            adapted = adapted / adapted.pow(2).sum(axes, keepdim=True).sqrt() * magnitude
        return adapted - base


def components(pipeline: object) -> dict[str, nn.Module]:
    return {name: part for name in ("unet", "text_encoder", "text_encoder_2") if (part := getattr(pipeline, name, None))}


def in_model(model: nn.Module, module: str) -> nn.Module:
    """The module of that name; CLIPTextModel has lost its ``text_model.`` in transformers 5."""
    return model.get_submodule(module if hasattr(model, "text_model") else module.removeprefix("text_model."))


def random_layers(
    pipeline: object, rank: int = 4, alpha: float = 8.0, seed: int = 1, targets: str = LINEAR, mid: bool = False,
    only: Iterable[str] = ("unet", "text_encoder", "text_encoder_2"), dora: int | None = None,
) -> list[Layer]:  # fmt: skip
    """Random layers, strong enough to move the output well away from the base. ``dora``: the axis that has lengths, 0 or 1."""
    dice = torch.Generator().manual_seed(seed)
    layers = []
    for component, model in components(pipeline).items():
        for name, module in model.named_modules() if component in only else ():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or not re.search(targets, name):
                continue
            out, *rest = module.weight.shape
            down = torch.randn(rank, *rest, generator=dice) / math.prod(rest) ** 0.5
            up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=dice) * 0.1
            layer = Layer(component, name, down, up, alpha)
            if component != "unet" and name != "text_projection":
                layer.module = "text_model." + name.removeprefix("text_model.")
            if mid and rest[1:] == [3, 3]:
                layer.down = torch.randn(rank, rest[0], 1, 1, generator=dice) / rest[0] ** 0.5
                layer.mid = torch.randn(rank, rank, 3, 3, generator=dice) / (9 * rank) ** 0.5
            if dora is not None:
                lengths = module.weight.detach().transpose(0, dora).flatten(1).norm(dim=1)
                lengths = lengths * (0.7 + 0.6 * torch.rand(lengths.shape, generator=dice))
                layer.magnitude = lengths.reshape([-1 if axis == dora else 1 for axis in range(module.weight.ndim)])
            layers.append(layer)
    return layers


def merged(pipeline: object, *weighted: tuple[list[Layer], float], scale: float | None = None) -> dict[str, nn.Module]:
    """Copies of the pipeline's components with the adapters added into their weights."""
    models = copy.deepcopy(components(pipeline))
    for layers, weight in weighted:
        for layer in layers:
            parameter = in_model(models[layer.component], layer.module).weight
            with torch.no_grad():
                base = in_model(components(pipeline)[layer.component], layer.module).weight
                parameter.copy_(parameter.double() + weight * layer.change(base, scale))
    return models


@torch.no_grad()
def outputs(models: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One forward pass of each component on fixed inputs."""
    dice = torch.Generator().manual_seed(99)
    unet = models["unet"]
    context = torch.randn(2, 7, unet.config.cross_attention_dim, generator=dice).to(dtype)
    latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=dice).to(dtype)
    extra = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        extra["text_embeds"] = torch.randn(2, pooled, generator=dice).to(dtype)
        extra["time_ids"] = torch.full((2, 6), 64.0, dtype=dtype)
    result = {"unet": unet(latents, torch.tensor([500, 20]), context, added_cond_kwargs=extra).sample}
    tokens = torch.randint(0, 600, (2, 77), generator=dice)
    tokens[:, -1] = pipelines.SPECIAL["eos_token_id"]  # the end token, whose features are the pooled ones
    for name in ("text_encoder", "text_encoder_2"):
        if name in models:
            answer = models[name](tokens)
            result[name] = answer.last_hidden_state
            if hasattr(answer, "text_embeds"):
                result[name + " pooled"] = answer.text_embeds
    return result


@functools.cache
def source(family: str) -> DiffusionPipeline:
    """One tiny pipeline of each family, to look at and to copy; nothing is ever attached to it."""
    return FAMILIES[family]()


@functools.cache
def base_outputs(family: str) -> dict[str, Tensor]:
    """What the family's pipeline puts out without an adapter."""
    return outputs(components(source(family)))


def fresh(family: str = "SD1") -> SimpleNamespace:
    """A copy of the family's components, to attach to."""
    return SimpleNamespace(**copy.deepcopy(components(source(family))))


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str, tolerance: float = 2e-5) -> None:
    """Equal in every component, and far from what the family puts out without an adapter: no vacuous agreement."""
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=tolerance, rtol=tolerance)
    assert max((value - base_outputs(family)[name]).abs().max().item() for name, value in expected.items()) > 1000 * tolerance


def assert_identical(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def kohya_name(layer: Layer, two_encoders: bool, sgm: bool) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two_encoders else "lora_te_", "text_encoder_2": "lora_te2_"}
    module = layer.module
    if sgm and layer.component == "unet":
        block = next(block for block in SGM_BLOCKS if module == block or module.startswith(block + "."))
        rest = module.removeprefix(block)
        module = SGM_BLOCKS[block] + (f".{SGM_RESNET[rest[1:]]}" if rest[1:] in SGM_RESNET else rest)
    return prefix[layer.component] + module.replace(".", "_")


def write_kohya(
    path: Path, layers: list[Layer], sgm: bool = False, metadata: dict[str, str] | None = None, dtype=torch.float32
) -> Path:
    two = sgm or any(layer.component == "text_encoder_2" for layer in layers)
    tensors = {}
    for layer in layers:
        name = kohya_name(layer, two, sgm)
        tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = layer.up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha).to(dtype)
        if layer.mid is not None:
            tensors[f"{name}.lora_mid.weight"] = layer.mid.to(dtype)
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude.to(dtype)
    save_file(tensors, path, metadata=metadata)
    return path


# Suffixes of diffusers' ages: the UNet's, the text encoders'.
DIFFUSERS_STYLES = {
    "new": ((".lora.down.weight", ".lora.up.weight"), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "lora_A": ((".lora_A.weight", ".lora_B.weight"),) * 2,
    "old": (("_lora.down.weight", "_lora.up.weight"),) * 2,
}
OLD_TEXT_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def write_diffusers(folder: Path, layers: list[Layer], style: str = "new", settings: dict | None = None) -> Path:
    """``pytorch_lora_weights.safetensors``, with alpha in the header as ``save_lora_weights`` writes it when told to."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in layers:
        module = layer.module
        if style == "old":
            head, _, leaf = module.removesuffix(".0").rpartition(".")
            module = f"{head}.processor.{leaf}" if layer.component == "unet" else f"{head}.{OLD_TEXT_NAMES[leaf]}"
        down, up = DIFFUSERS_STYLES[style][layer.component != "unet"]
        tensors[f"{layer.component}.{module}{down}"] = layer.down
        tensors[f"{layer.component}.{module}{up}"] = layer.up
        if layer.magnitude is not None:
            end = "" if layer.component == "unet" else ".weight"  # transformers 5 overlooks the name without it
            tensors[f"{layer.component}.{layer.module}.lora_magnitude_vector{end}"] = peft_magnitude(layer)
    if settings is None:
        settings = {}
        for layer in layers:
            settings |= {f"{layer.component}.r": layer.down.shape[0], f"{layer.component}.lora_alpha": layer.alpha}
            # Only diffusers' loader wants these, and by the names of transformers 5, whatever the tensors are called.
            target = layer.module.removeprefix("text_model.") if layer.component == "text_encoder" else layer.module
            settings.setdefault(f"{layer.component}.target_modules", []).append(target)
            settings[f"{layer.component}.use_dora"] = layer.magnitude is not None
    metadata = {"format": "pt", **({"lora_adapter_metadata": json.dumps(settings)} if settings else {})}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=metadata)
    return folder


def peft_magnitude(layer: Layer) -> Tensor:
    """Lengths of rows as peft saves them: (out,) of a Linear, (1, out, 1, 1) of a convolution."""
    return layer.magnitude.flatten() if layer.down.ndim == 2 else layer.magnitude.transpose(0, 1)


PEFT_CLASSES = {
    "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip


def write_peft(folder: Path, pipeline: object, layers: list[Layer], component: str = "unet", **settings: object) -> Path:
    """One component's adapter as ``PeftModel.save_pretrained`` writes it; modules are called as in this very model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = components(pipeline)[component]
    mine = {
        layer.module if hasattr(model, "text_model") else layer.module.removeprefix("text_model."): layer
        for layer in layers
        if layer.component == component
    }
    tensors = {}
    for module, layer in mine.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = layer.down
        tensors[f"base_model.model.{module}.lora_B.weight"] = layer.up
        if layer.magnitude is not None:
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = peft_magnitude(layer)
    first = next(iter(mine.values()))
    config = {
        "peft_type": "LORA", "r": first.down.shape[0], "lora_alpha": first.alpha, "target_modules": sorted(mine),
        "auto_mapping": {"base_model_class": PEFT_CLASSES[component], "parent_library": "diffusers"},
        "base_model_name_or_path": None, "bias": "none", "inference_mode": True, "use_dora": first.magnitude is not None, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
