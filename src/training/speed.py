"""Makes a training step faster and smaller at equal results: what frozen layers need not do, and kernels that suit the CPU.

Layers are exchanged in place by their class: names, weights and `isinstance` stay as they are, so that adapters, merges and
checkpoints do not notice. What a layer here cannot do (DoRA, dropout, quantised weights) stays with the library.

CPU seconds of one step (forward, backward), one thread of an AMD EPYC (Zen 5) that others used too, torch 2.13, attention
layers of rank 4; peft's and diffusers' own layers with autocast, then these, and what torch's fused attention costs:

                                     fp32            bf16
    SD 1.5     512 px, batch 1   18.0    13.9    11.0     7.2
    SD 1.5     256 px, batch 1    4.35    3.50    2.08    1.87
    embedded   128 px, batch 4    0.114   0.093   0.117   0.083
    attention  4096 x 4096, 8 heads of 40, both passes: fused 1.08, these 0.67; bf16 0.89, 0.51
    attention  256 x 256, 16 heads of 16: fused kernel 4.6 ms (kept in fp32); bf16 9.8, these 3.8 ms
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from src.cpu_kernels import HAS_ONEDNN, CpuAttention, is_plain, packs_in, product

PACKED_BYTES = 1 << 28  # convolutions of up to so many bytes are held three times: as they are, and packed for both directions
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def prepare_for_speed(unet: nn.Module, computes_in: torch.dtype | None = None) -> None:
    """Exchange the frozen layers of a U-Net that lies on its device, with its adapter. Weights and results stay equal.

    ``computes_in``: None stands for the precision that it is in.

    A U-Net in half precision then computes in it without autocast, as the generator does: autocast would make float32
    copies of every norm, and keep them.
    """
    device, dtype = unet.conv_in.weight.device, computes_in or unet.conv_in.weight.dtype
    exchange_layers(unet, device, dtype)
    if dtype != torch.float32:
        unet.forward = _without_autocast(unet.forward, device.type, dtype)
    if device.type == "cpu":
        keep_freed_memory()


def exchange_layers(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """The first part of `prepare_for_speed`: the classes of the layers."""
    convolutions = [module.weight for module in unet.modules() if isinstance(module, nn.Conv2d)]
    packs = device.type == "cpu" and sum(weight.nbytes for weight in convolutions) <= PACKED_BYTES
    for module in list(unet.modules()):
        if isinstance(module, LoraLayer):
            _exchange_adapter(module, device, dtype)
        elif type(module) is nn.Conv2d and not module.weight.requires_grad:
            module.__class__ = FrozenConv2d
            if device.type == "cpu":
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
            if packs and _can_pack(module):
                module.packed = {}
        elif type(module) is nn.Linear and not module.weight.requires_grad and device.type == "cpu":
            module.__class__ = FrozenLinear
        elif device.type == "cpu" and isinstance(module, Attention) and is_plain(module):
            module.set_processor(CpuAttention())


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: a training asks for the same sizes at each step.

    By default each tensor above 32 MiB is mapped anew and its pages are cleared one by one, which takes longer than many an
    operation on it. Elsewhere than with glibc this does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class FrozenLinear(nn.Linear):
    """A linear layer that does not learn, on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, self.weight) or x.dtype != torch.float32:
            return super().forward(x)
        return _FrozenProduct.apply(x, self.weight, self.bias)


class FrozenConv2d(nn.Conv2d):
    """A convolution that does not learn. Unlike autograd's own it keeps no copy of its input."""

    packed: dict[str, Tensor] | None = None  # weights in the order oneDNN wants them, for both directions; None: never

    def forward(self, x: Tensor) -> Tensor:
        if not (_takes(x, self.weight) and torch.is_grad_enabled() and x.requires_grad and self.padding_mode == "zeros"):
            return super().forward(x)
        return _FrozenConvolution.apply(x, self)

    def convolve(self, x: Tensor) -> Tensor:
        """The layer's output, (B, C, h, w) as its input."""
        if self.packed is None or not packs_in(x.dtype):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return _packed_convolution(self, "forward", x, self.bias)

    def gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of ``shape``, from that of the output."""
        if self.packed is None or self.stride != (1, 1) or not packs_in(grad.dtype):
            return torch.nn.grad.conv2d_input(shape, self.weight, grad, self.stride, self.padding, self.dilation, self.groups)
        return _packed_convolution(self, "backward", grad, None)


class AdaptedLinear(PeftLinear):
    """peft's layer, of one adapter, in the precision of its input; the input is kept once for all layers that read it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if self.disable_adapters or self.merged or _is_autocast(x):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if base.weight.dtype != x.dtype or base._forward_hooks:  # quantised
            return base(x) + F.linear(F.linear(x, down.to(x.dtype)) * self.scaling[name], up.to(x.dtype))
        return _AdaptedProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name])


class AdaptedConv2d(PeftConv2d):
    """The same for a convolution: ``up`` is one of a single pixel."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if not _takes(x, base.weight) or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        down, up = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
        narrow = F.conv2d(x, down, None, base.stride, base.padding, base.dilation, base.groups)
        return base(x) + F.conv2d(narrow * self.scaling[name], up)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return product(grad.reshape(-1, grad.shape[-1]), weight.t()).view(*grad.shape[:-1], -1), None, None


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:
        ctx.shape, ctx.layer = x.shape, layer
        return layer.convolve(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.gradient(grad, ctx.shape), None


class _AdaptedProduct(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T`` with frozen W and b (Hu et al. 2021, eq. 3), A and B rounded to the precision of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows @ down.to(x.dtype).t()  # (N, rank)
        result = product(rows, weight, bias).addmm_(narrow, up.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, narrow)
        ctx.scale = scale
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, narrow = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_narrow = rows @ up.to(x.dtype) * ctx.scale
        grad_down = (grad_narrow.t() @ x.reshape(-1, x.shape[-1])).to(down.dtype)
        grad_up = (rows.t() @ narrow).to(up.dtype) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(rows, weight.t()).addmm_(grad_narrow, down.to(x.dtype)).view_as(x)
        return grad_x, None, None, grad_down, grad_up, None


def _packed_convolution(layer: FrozenConv2d, way: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's convolution, or the one of stride 1 that is its gradient; weights are put in oneDNN's order once."""
    assert layer.packed is not None
    stride = layer.stride if way == "forward" else (1, 1)
    if way not in layer.packed:
        weight = layer.weight if way == "forward" else layer.weight.flip(2, 3).transpose(0, 1)
        options = list(layer.padding), list(stride), [1, 1], 1, list(x.shape)
        layer.packed[way] = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.contiguous().to_mkldnn(), *options)
    return torch.ops.mkldnn._convolution_pointwise(x, layer.packed[way], bias, layer.padding, stride, [1, 1], 1, "none", [], "")


def _can_pack(layer: nn.Conv2d) -> bool:
    """Whether both directions are convolutions that keep the size, or the forward one at least: no groups, no dilation."""
    same = all(2 * padding == size - 1 for padding, size in zip(layer.padding, layer.kernel_size))
    return HAS_ONEDNN and same and layer.groups == 1 and layer.dilation == (1, 1)


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing has to be cast: the layers here leave autocast to the library's."""
    return x.dtype == weight.dtype and not _is_autocast(x)


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _exchange_adapter(module: LoraLayer, device: torch.device, dtype: torch.dtype) -> None:
    is_plain = not module.lora_variant and all(isinstance(item, nn.Identity) for item in module.lora_dropout.values())
    if type(module) is PeftLinear and is_plain:
        module.__class__ = AdaptedLinear
    elif type(module) is PeftConv2d and is_plain:
        module.__class__ = AdaptedConv2d
    elif dtype != torch.float32:
        module.forward = torch.autocast(device.type, dtype)(module.forward)


def _without_autocast(forward: Any, device_type: str, dtype: torch.dtype) -> Any:
    """``forward`` in ``dtype`` alone; its floating-point inputs are cast, timesteps are not."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    @functools.wraps(forward)
    def run(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        if named.get("added_cond_kwargs"):
            # Not the time ids: half precision knows no 1333 px, and their sinusoids are made in float32.
            added = named["added_cond_kwargs"]
            named["added_cond_kwargs"] = added | {"text_embeds": cast(added["text_embeds"])}
        with torch.autocast(device_type, enabled=False):
            return forward(cast(sample), timestep, cast(encoder_hidden_states), *rest, **named)

    return run
