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
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CHUNK_NUMBERS = 1 << 20  # scores at once: they stay in the cache of a CPU core
LONG = {torch.bfloat16: 1 << 21}  # scores of one head, from which on they are not kept for the backward pass
LONG_OTHERWISE = 1 << 18
PACKED_BYTES = 1 << 28  # convolutions of up to so many bytes are held three times: as they are, and packed for both directions
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def prepare_for_speed(unet: nn.Module) -> None:
    """Exchange the layers of a frozen U-Net that has its adapter and lies on its device. Weights and results stay equal.

    A U-Net in half precision then computes in it without autocast, as the generator does: autocast would make float32
    copies of every norm, and keep them.
    """
    device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
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
        elif device.type == "cpu" and isinstance(module, Attention) and _is_plain(module):
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
        if self.packed is None:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return _packed_convolution(self, "forward", x, self.bias)

    def gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of ``shape``, from that of the output."""
        if self.packed is None or self.stride != (1, 1):
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


class CpuAttention:
    """Attention for U-Nets on a CPU, where torch's fused kernel is slow: small scores are kept, long ones computed again."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Hidden states (B, L, C), and those that are attended to (B, S, D) if they are others -> (B, L, C)."""
        if attention_mask is not None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, **arguments)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (part.view(*part.shape[:2], attn.heads, -1).transpose(1, 2) for part in parts)  # (B, H, L or S, d)
        result = attend(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](result))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of (B, H, L, d) and (B, H, S, d): as scaled_dot_product_attention, for the CPU."""
    scores = query.shape[2] * key.shape[2]
    if scores >= LONG.get(query.dtype, LONG_OTHERWISE):
        return _LongAttention.apply(query, key, value)
    if query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
    return weights @ value


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _product(grad.reshape(-1, grad.shape[-1]), weight.t()).view(*grad.shape[:-1], -1), None, None


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
        result = _product(rows, weight, bias).addmm_(narrow, up.to(x.dtype).t(), alpha=scale)
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
            grad_x = _product(rows, weight.t()).addmm_(grad_narrow, down.to(x.dtype)).view_as(x)
        return grad_x, None, None, grad_down, grad_up, None


class _LongAttention(torch.autograd.Function):
    """Some rows of one head at a time; the backward pass computes them again (Rabe and Staats 2021, arXiv 2112.05682)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        result = query.new_empty(query.shape[0], query.shape[2], *query.shape[1::2]).transpose(1, 2)
        for at in _heads(query):
            keys, values = key[at] * query.shape[-1] ** -0.5, value[at].t().contiguous()
            for rows in _chunks(query, key):
                result[at][rows] = _product(_product(query[at][rows], keys).softmax(-1), values)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        grads = [torch.empty_like(part) for part in (query, key, value)]
        scale = query.shape[-1] ** -0.5
        for at in _heads(query):
            keys, values = key[at] * scale, value[at].contiguous()
            columns, sums = keys.t().contiguous(), torch.zeros(2, key.shape[3], key.shape[2])
            for rows in _chunks(query, key):
                part, above = query[at][rows].contiguous(), grad[at][rows].contiguous()
                weights = _product(part, keys).softmax(-1)
                slopes = torch._softmax_backward_data(_product(above, values), weights, -1, weights.dtype)
                grads[0][at][rows] = _product(slopes, columns)
                sums[0] += _product(part.t().contiguous(), slopes.t())  # the large factor as it lies: nothing is copied
                sums[1] += _product(above.t().contiguous(), weights.t())
            grads[1][at], grads[2][at] = sums[0].t() * scale, sums[1].t()
        return tuple(grads)


def _heads(query: Tensor) -> list[tuple[int, int]]:
    return [(example, head) for example in range(query.shape[0]) for head in range(query.shape[1])]


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    size = max(1, CHUNK_NUMBERS // key.shape[2])
    return [slice(start, start + size) for start in range(0, query.shape[2], size)]


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


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` for x (N, inputs). In float32 on a CPU by oneDNN: torch's own MKL is half as fast on AMD's."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONEDNN and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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


def _is_plain(attn: Attention) -> bool:
    """Whether there is nothing in it beside projections and heads."""
    beside = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.add_k_proj)
    ordinary = isinstance(attn.processor, AttnProcessor2_0) and not attn.residual_connection
    return ordinary and all(part is None or part is False for part in beside) and attn.rescale_output_factor == 1
