"""Makes a U-Net that only draws faster on a CPU: weights lie as oneDNN reads them, the feed-forward's gate is one with its
products. Layers are exchanged in place by their class, so that adapters find them under their names. Results are the same to
the precision: 2e-5 in fp32, 1 to 3 % in bf16, where both are so far from fp32.

Seconds of one step of SD v1.5 at 512x512 with guidance, two threads of an AMD EPYC (Zen 5), torch 2.13:

                                       fp32    bf16
    the library's layers                9.9     4.6
    these, with src/cpu_kernels.py      5.5     2.7
    and with src/native.cpp             4.6     2.3
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from src import cpu_memory, native
from src.cpu_kernels import HAS_ONEDNN, CpuAttention, is_plain, packs_in

# Torch's compiler uses these operators for the same purpose; on other processors they have not been measured.
CAN_PACK = HAS_ONEDNN and platform.machine().lower() in ("x86_64", "amd64")

LARGE_BYTES = 1 << 19
SMALL_UNET_BYTES = 64 << 20  # up to so many its weights are kept in two orders: guidance that ends half-way asks for both

_linear = torch.ops.mkldnn._linear_pointwise if CAN_PACK else None
_convolution = torch.ops.mkldnn._convolution_pointwise if CAN_PACK else None
_convolution_in_place = torch.ops.mkldnn._convolution_pointwise_ if CAN_PACK else None


def prepare_for_drawing(unet: UNet2DConditionModel, exchange_attention: bool = True) -> None:
    """Exchange the layers of a U-Net that lies on the CPU; once more does no harm. Gradients still go through it."""
    if not _can_work(unet):
        return
    for module in list(unet.modules()):
        if exchange_attention and isinstance(module, Attention) and is_plain(module):
            module.set_processor(CpuAttention())
        elif type(module) is GEGLU and type(module.proj) is nn.Linear and module.proj.bias is not None:
            module.__class__, module.proj.__class__ = FusedGeglu, GatedLinear
        elif type(module) is nn.Linear:
            module.__class__ = PackedLinear
    _exchange_blocks(unet)
    packed = [module for module in unet.modules() if isinstance(module, _Packed)]
    lying = [*unet.parameters(), *(part for module in packed for part in module._parts)]
    for module in packed:
        module.keeps_two = sum(part.nbytes for part in lying) <= SMALL_UNET_BYTES


def prepare_decoding(vae: AutoencoderKL) -> None:
    """Let a VAE on the CPU work with channels last, twice as fast in bf16, and overwrite what it needs no more."""
    vae.to(memory_format=torch.channels_last)
    for module in vae.modules():
        if type(module) is nn.SiLU:  # always of what a norm has just made; in a U-Net some are of what is needed again
            module.inplace = True
    if _can_work(vae):
        _exchange_blocks(vae)
        for module in vae.modules():
            if isinstance(module, FusedResnetBlock2D):
                module.may_overwrite_input = True  # a U-Net's is a skip connection, too


def _can_work(model: nn.Module) -> bool:
    return CAN_PACK and packs_in(model.dtype)


def _exchange_blocks(model: nn.Module) -> None:
    for module in list(model.modules()):
        if type(module) is nn.Conv2d and _can_pack(module):
            module.__class__ = PackedConv2d
        elif type(module) is nn.GroupNorm:
            module.__class__ = FastGroupNorm
    for module in list(model.modules()):  # after its parts
        if type(module) is ResnetBlock2D and _can_fuse(module):
            module.__class__ = FusedResnetBlock2D


class _Packed:
    """A layer whose weight is packed for the shape of its input, in place of the weight itself; for another one, anew.

    An order that suits one size makes another up to five times as slow; packing a U-Net takes less time than a step, so that
    even a last batch of fewer pictures is worth it. A small U-Net ``keeps_two``: the order before comes back at once.
    """

    keeps_two = False
    _parts: tuple[Tensor, ...] = ()  # of the weight, along its outputs, in oneDNN's order
    _packed_for: torch.Size | None = None
    _before: tuple[torch.Size | None, tuple[Tensor, ...]] = (None, ())  # what both were for the shape before
    _parameters: dict[str, nn.Parameter]

    @property
    def weight(self) -> Tensor:
        """As it was loaded; once it is packed, a copy of that."""
        return torch.cat([part.to_dense() for part in self._parts]) if self._parts else self._parameters["weight"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._parts:
            destination[f"{prefix}weight"] = self.weight.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """To another device or precision: as an ordinary weight."""
        if self._parts:
            weight = self.weight.detach()
            self._parts, self._packed_for, self._before = (), None, (None, ())
            self._parameters["weight"] = nn.Parameter(weight)
        return super()._apply(fn, recurse)

    def _can_take(self, x: Tensor) -> bool:
        """Whether the operators do: they know no gradients, and cast nothing."""
        weight = self._parts[0] if self._parts else self._parameters["weight"]
        return x.dtype == weight.dtype and packs_in(x.dtype) and not (torch.is_grad_enabled() and x.requires_grad)

    def _packed(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape == self._before[0]:
            (self._packed_for, self._parts), self._before = self._before, (self._packed_for, self._parts)
        elif x.shape != self._packed_for:
            if self.keeps_two and self._parts:
                self._before = self._packed_for, self._parts
            with cpu_memory.for_weights():
                self._parts = self._pack(self.weight.detach(), x)
            self._packed_for = x.shape
            if self._parameters.pop("weight", None) is not None and self._parts[0].nbytes > LARGE_BYTES:
                cpu_memory.give_back()  # at once: what is drawn between would settle in the holes
        return self._parts

    def _pack(self, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


class PackedLinear(_Packed, nn.Linear):
    """A linear layer: (..., inputs) -> (..., outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_take(x):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        (weight,) = self._packed(rows)
        return _linear(rows, weight, self.bias, "none", [], "").view(*x.shape[:-1], -1)

    def _pack(self, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), len(x)),)


class GatedLinear(PackedLinear):
    """The projection of a `FusedGeglu`: its outputs are values and, after them, as many gates."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_take(x):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        halves = zip(self._packed(rows), self.bias.chunk(2))
        return torch.cat([_linear(rows, weight, bias, "none", [], "") for weight, bias in halves], -1).view(*x.shape[:-1], -1)

    def gated(self, x: Tensor) -> Tensor:
        """Values times GELU of the gates: (..., inputs) -> (..., outputs / 2)."""
        rows = x.reshape(-1, x.shape[-1])
        (values, gates), (value_bias, gate_bias) = self._packed(rows), self.bias.chunk(2)
        gate = _linear(rows, gates, gate_bias, "gelu", [], "none")
        return _linear.binary(rows, gate, values, value_bias, "mul").view(*x.shape[:-1], -1)

    def _pack(self, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.mkldnn._reorder_linear_weight(half.contiguous(), len(x)) for half in weight.chunk(2))


class FusedGeglu(GEGLU):
    """Two products in place of a product, two halves of it, a GELU and a multiplication; an adapter wants the product whole."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.proj._forward_hooks or not self.proj._can_take(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self.proj.gated(hidden_states)


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution of one group, without dilation: (B, C, h, w), channels last."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_take(x):
            return self._conv_forward(x, self.weight, self.bias)
        x = x.contiguous(memory_format=torch.channels_last)
        (weight,) = self._packed(x)
        return _convolution(x, weight, self.bias, self.padding, self.stride, self.dilation, 1, "none", [], "")

    def added_to(self, other: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """``other + self(x)`` in one pass; ``in_place``: over ``other``. What an adapter adds in a hook is in it."""
        other = other.contiguous(memory_format=torch.channels_last)
        if self._forward_hooks or self._forward_pre_hooks or not self._can_take(x) or other.dtype != x.dtype:
            return other + self(x)
        x = x.contiguous(memory_format=torch.channels_last)
        (weight,) = self._packed(x)
        options = self.padding, self.stride, self.dilation, 1, "add", None, None, [], None
        if in_place:
            return _convolution_in_place.binary(other, x, weight, self.bias, *options)
        return _convolution.binary(x, other, weight, self.bias, *options)

    def _pack(self, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        options = list(self.padding), list(self.stride), list(self.dilation), 1, list(x.shape)
        return (torch._C._nn.mkldnn_reorder_conv2d_weight(weight.contiguous().to_mkldnn(), *options),)


def _can_pack(layer: nn.Conv2d) -> bool:
    is_plain_kind = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return is_plain_kind and not isinstance(layer.padding, str)


class FastGroupNorm(nn.GroupNorm):
    """A group normalisation, and what mostly comes with it, in two passes over the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return native.group_norm(x, self) if self._takes(x) else super().forward(x)

    def activated(
        self, x: Tensor, shift: Tensor | None = None, modulation: Tensor | None = None, *, in_place: bool = False
    ) -> Tensor:
        """``SiLU(norm(x + shift) * (1 + m) + n)``: x (B, C, h, w), ``shift`` (B, C), ``modulation`` m and after it n (B, 2 C).

        ``in_place``: over x, where that is possible.
        """
        if not (self._forward_hooks or self._forward_pre_hooks) and self._takes(x, shift, modulation):
            return native.group_norm(x, self, shift=shift, modulation=modulation, with_silu=True, out=x if in_place else None)
        y = self(x if shift is None else x + shift[:, :, None, None])
        if modulation is not None:
            scale, after = modulation[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + after
        return F.silu(y)

    def _takes(self, x: Tensor, shift: Tensor | None = None, modulation: Tensor | None = None) -> bool:
        """Whether the kernel does: it knows no gradients."""
        parts = (x, shift, modulation, self.weight, self.bias)
        learns = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
        return not learns and native.can_normalize(x, self, shift, modulation)


class FusedResnetBlock2D(ResnetBlock2D):
    """Two normalisations and two convolutions whose activations and sums take no passes of their own."""

    may_overwrite_input = False

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        x = self.conv1(self.norm1.activated(input_tensor))
        of_time = None if self.time_emb_proj is None else self.time_emb_proj(self.nonlinearity(temb))
        is_modulated = self.time_embedding_norm == "scale_shift"  # after the norm, in place of a shift before it
        x = self.norm2.activated(x, *((None, of_time) if is_modulated else (of_time, None)), in_place=True)
        other = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self.conv2.added_to(other, x, in_place=self.may_overwrite_input or other is not input_tensor)


def _can_fuse(block: ResnetBlock2D) -> bool:
    """Whether it is the plain block of Stable Diffusion's U-Nets and VAEs, or that of the embedded model."""
    parts = (block.norm1, block.norm2, block.conv1, block.conv2)
    known = ["default", "scale_shift"] if block.time_emb_proj is not None else ["default", "group"]
    is_plain_kind = block.upsample is None and block.downsample is None and block.time_embedding_norm in known
    return (
        is_plain_kind and isinstance(block.nonlinearity, nn.SiLU) and not block.skip_time_act and block.dropout.p == 0
        and block.output_scale_factor == 1 and [type(part) for part in parts] == [FastGroupNorm] * 2 + [PackedConv2d] * 2
    )  # fmt: skip
