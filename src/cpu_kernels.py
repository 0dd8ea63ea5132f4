"""Attention and products for U-Nets on a CPU, where torch's own are slow; drawing and training use them.

The C++ kernels (src/native.py) attend where they can be used; what follows is for elsewhere, and for gradients.

Milliseconds of one attention, two threads of an AMD EPYC (Zen 5), torch 2.13; torch's fused kernel, then these:

                                       fp32           bf16
    4096 x 4096, 2 x 8 heads of 40   386   222     342   173
    1024 x 1024, 2 x 8 heads of 80    33    22      37    18
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from src import native

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CHUNK_BYTES = 1 << 22  # scores at once: they stay in the cache of a CPU core
LONG = {torch.bfloat16: 1 << 21}  # scores of one head, from which on they are not kept for the backward pass
LONG_OTHERWISE = 1 << 18


def packs_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN puts weights of this precision in an order of its own: for bf16 it asks for AVX-512 at least."""
    return HAS_ONEDNN and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


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

    # diffusers asks for it at each call, and Python works it out anew each time.
    __call__.__signature__ = inspect.signature(__call__)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of (B, H, L, d) and (B, H, S, d): as scaled_dot_product_attention, for the CPU."""
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not needs_gradient and native.can_attend(query, key, value):
        return native.attend(query, key, value)
    scores = query.shape[2] * key.shape[2]
    if scores >= LONG.get(query.dtype, LONG_OTHERWISE):
        return _LongAttention.apply(query, key, value)
    if query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
    return weights @ value


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` for x (N, inputs). In float32 on a CPU by oneDNN: torch's own MKL is half as fast on AMD's."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONEDNN and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def is_plain(attn: Attention) -> bool:
    """Whether there is nothing in it beside projections and heads."""
    beside = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.add_k_proj)
    ordinary = isinstance(attn.processor, AttnProcessor2_0) and not attn.residual_connection
    return ordinary and all(part is None or part is False for part in beside) and attn.rescale_output_factor == 1


class _LongAttention(torch.autograd.Function):
    """Some rows of one head at a time; the backward pass computes them again (Rabe and Staats 2021, arXiv 2112.05682)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        if native.can_attend(query, key, value):
            return native.attend(query, key, value)
        result = query.new_empty(query.shape[0], query.shape[2], *query.shape[1::2]).transpose(1, 2)
        for at in _heads(query):
            keys, values = key[at] * query.shape[-1] ** -0.5, value[at].t().contiguous()
            queries = query[at].contiguous()
            for rows in _chunks(query, key):
                result[at][rows] = product(product(queries[rows], keys).softmax(-1), values)
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
                weights = product(part, keys).softmax(-1)
                slopes = torch._softmax_backward_data(product(above, values), weights, -1, weights.dtype)
                grads[0][at][rows] = product(slopes, columns)
                sums[0] += product(part.t().contiguous(), slopes.t())  # the large factor as it lies: nothing is copied
                sums[1] += product(above.t().contiguous(), weights.t())
            grads[1][at], grads[2][at] = sums[0].t() * scale, sums[1].t()
        return tuple(grads)


def _heads(query: Tensor) -> list[tuple[int, int]]:
    return [(example, head) for example in range(query.shape[0]) for head in range(query.shape[1])]


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES // (key.shape[2] * key.element_size()))
    return [slice(start, start + size) for start in range(0, query.shape[2], size)]
