"""Muon against torch's own for matrices, torch's AdamW for the rest, and the singular values that it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from src.scratch import muon
from src.scratch.muon import Muon, orthogonal, parameter_groups
from src.training.optimizers import pack_state, unpack_state


def steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int = 4) -> Tensor:
    for number in range(count):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_matrix_moves_as_by_torchs_own(shape: tuple[int, int]) -> None:
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([{"params": [ours], "is_matrix": True, "weight_decay": 0.1}], lr=0.01)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    moved, expected = steps(ours, own) - start, steps(theirs, other) - start
    assert float((moved - expected).norm() / expected.norm()) < 0.05  # products in bf16


def test_a_convolution_moves_as_the_matrix_that_it_is() -> None:
    """Rows are outputs; in which order the columns stand changes nothing."""
    kernel = nn.Parameter(torch.randn(16, 6, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    moved = steps(kernel, Muon([{"params": [kernel], "is_matrix": True}], lr=0.01))
    optimizer = Muon([{"params": [matrix], "is_matrix": True}], lr=0.01)
    for number in range(4):
        matrix.grad = torch.randn(16, 6, 3, 3, generator=torch.Generator().manual_seed(number)).flatten(1)
        optimizer.step()
    assert torch.allclose(moved.flatten(1), matrix, atol=1e-3)
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_all_else_moves_as_by_adamw() -> None:
    start = torch.randn(7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([{"params": [ours], "is_matrix": False, "weight_decay": 0.1}], lr=0.01)
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    assert torch.allclose(steps(ours, own), steps(theirs, other), atol=1e-6)


def test_singular_values_become_alike_and_directions_stay() -> None:
    left, _ = torch.linalg.qr(torch.randn(32, 32))
    right, _ = torch.linalg.qr(torch.randn(48, 48))
    matrix = left @ torch.diag(torch.logspace(-1.5, 0, 32)) @ right[:32]
    found = orthogonal(matrix[None])[0].float()
    inner = left.T @ found @ right[:32].T  # near the identity
    assert float(inner.diagonal().min()) > 0.6
    assert float(inner.diagonal().max()) < 1.3
    assert float((inner - torch.diag(inner.diagonal())).abs().max()) < 0.1


@pytest.mark.parametrize("shape", [(16, 32), (24, 216), (216, 24)])
def test_wide_matrices_take_the_short_way_to_the_same_place(shape: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -3, shape[1]))
    iterated = muon._iterated
    with monkeypatch.context() as patch:
        patch.setattr(muon, "_iterated", lambda x: pytest.fail("took the long way"))
        short = muon.orthogonal(matrix[None])[0]
    x = (matrix.T if shape[0] > shape[1] else matrix).double()
    x = iterated((x / x.norm())[None])[0]
    assert torch.allclose(short, (x.T if shape[0] > shape[1] else x).float(), atol=1e-4)


def test_matrices_that_move_together_move_as_each_alone() -> None:
    """Of three shapes, two of them twice and of different size: what one does is not the others' matter."""
    shapes = [(24, 40), (40, 24), (24, 40), (16, 24, 3, 3), (16, 24, 3, 3)]
    starts = [torch.randn(shape) for shape in shapes]

    def moved(*which: int) -> list[Tensor]:
        parameters = [nn.Parameter(starts[index].clone()) for index in which]
        optimizer = Muon([{"params": parameters, "is_matrix": True, "weight_decay": 0.1}], lr=0.01)
        for number in range(3):
            for index, parameter in zip(which, parameters):
                parameter.grad = 10**index * torch.randn(
                    shapes[index], generator=torch.Generator().manual_seed(9 * number + index)
                )
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    together = moved(0, 1, 2, 3, 4)
    for index, found in enumerate(together):
        assert torch.allclose(found, moved(index)[0], atol=1e-6)


def test_groups_hold_every_parameter_once_and_first_layers_are_adamws() -> None:
    model = nn.ModuleDict(
        {"conv_in": nn.Conv2d(3, 32, 3), "words": nn.Embedding(99, 32), "inner": nn.Conv2d(32, 32, 3), "out": nn.Linear(32, 4)}
    )
    matrices, others, vectors = parameter_groups(model, 0.5)
    assert [item.shape for item in matrices["params"]] == [(32, 32, 3, 3)]
    assert {tuple(item.shape) for item in others["params"]} == {(32, 3, 3, 3), (99, 32), (4, 32)}
    assert [item.ndim for item in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], others["weight_decay"], vectors["weight_decay"]) == (0.5, 0.5, 0.0)
    assert [group["is_matrix"] for group in (matrices, others, vectors)] == [True, False, False]


def test_its_state_comes_back() -> None:
    def new() -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
        return model, Muon(parameter_groups(model, 0.01), lr=0.01)

    def learn(model: nn.Module, optimizer: Muon, first: int, last: int) -> None:
        for number in range(first, last):
            model(torch.randn(8, 20, generator=torch.Generator().manual_seed(number))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = new()
    learn(whole, optimizer, 0, 6)
    cut, optimizer = new()
    learn(cut, optimizer, 0, 3)
    state, tensors = {name: item.clone() for name, item in cut.state_dict().items()}, pack_state(optimizer)
    resumed, optimizer = new()
    resumed.load_state_dict(state)
    unpack_state(optimizer, {name: item.clone() for name, item in tensors[0].items()}, tensors[1])
    learn(resumed, optimizer, 3, 6)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters()))
