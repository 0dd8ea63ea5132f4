"""Our attention against torch's fused kernel: outputs and gradients, short and in chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from src import cpu_kernels

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.04}  # relative, of a whole tensor


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize(("length", "others"), [(48, 48), (50, 77), (1, 7)])
def test_attention_equals_the_fused_kernel(length, others, long, dtype, monkeypatch) -> None:
    if long:  # chunks of a few rows, the last one shorter
        monkeypatch.setattr(cpu_kernels, "LONG", {})
        monkeypatch.setattr(cpu_kernels, "CHUNK_BYTES", 13 * others * dtype.itemsize)
        monkeypatch.setattr(cpu_kernels, "LONG_OTHERWISE", 0)
    parts = [
        torch.randn(2, size, 3, 20, generator=torch.Generator().manual_seed(size)).to(dtype).transpose(1, 2).requires_grad_()
        for size in (length, others, others)
    ]
    results = []
    for function in (F.scaled_dot_product_attention, cpu_kernels.attend):
        output = function(*parts)
        gradients = torch.autograd.grad(output, parts, torch.ones_like(output) * output.detach())
        results.append([tensor.float() for tensor in (output, *gradients)])
    for mine, reference in zip(results[1], results[0]):
        assert mine.shape == reference.shape
        assert (mine - reference).norm() <= TOLERANCE[dtype] * reference.norm() + 1e-6
