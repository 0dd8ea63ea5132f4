"""Optimizers: learning rates against diffusers' schedules, state that goes through bytes and back bit for bit."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler

from src.errors import UserError
from src.train_config import LR_SCHEDULERS, TrainConfig
from src.training.optimizers import COSINE_CYCLES, POLYNOMIAL_POWER, build_optimizer, lr_factor, pack_state, unpack_state

STEPS = 50


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_are_those_of_diffusers(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs_name = "constant_with_warmup" if name == "constant" else name
    options = {"num_warmup_steps": warmup, "num_training_steps": STEPS, "power": POLYNOMIAL_POWER}
    theirs = get_scheduler(theirs_name, optimizer, num_cycles=COSINE_CYCLES, **options)
    if name == "cosine":  # there get_scheduler's cycles are halves, and their default cannot be passed through
        theirs = get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)
    train = TrainConfig(lr_scheduler=name, lr_warmup_steps=warmup)
    for step in range(STEPS):
        assert lr_factor(train, step, STEPS) == pytest.approx(theirs.get_last_lr()[0], abs=2e-7), step
        optimizer.step()
        theirs.step()


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(4, 8))]  # 8 bits begin at 4096 numbers


def groups(mine: list[torch.nn.Parameter], lr: float) -> list[dict]:
    second = lr if lr == 1 else lr / 10  # Prodigy has one for all
    return [{"params": [mine[0]], "lr": lr, "base_lr": lr}, {"params": [mine[1]], "lr": second, "base_lr": second}]


def take_steps(optimizer: torch.optim.Optimizer, mine: list[torch.nn.Parameter], first: int, count: int) -> None:
    for step in range(first, first + count):
        source = torch.Generator().manual_seed(step)
        for parameter in mine:
            parameter.grad = torch.randn(parameter.shape, generator=source)
        optimizer.step()


@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-2), ("adamw8bit", 1e-2), ("adafactor", 1e-2), ("prodigy", 1.0)])
def test_a_state_that_went_through_bytes_goes_on_bit_for_bit(name: str, lr: float) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    train = TrainConfig(optimizer=name)
    whole = parameters()
    optimizer = build_optimizer(groups(whole, lr), train)
    take_steps(optimizer, whole, 0, 10)

    cut = parameters()
    first = build_optimizer(groups(cut, lr), train)
    take_steps(first, cut, 0, 4)
    tensors, text = pack_state(first)
    again = [torch.nn.Parameter(item.detach().clone()) for item in cut]
    second = build_optimizer(groups(again, lr), train)
    unpack_state(second, {key: value.clone() for key, value in tensors.items()}, text)
    take_steps(second, again, 4, 6)

    assert all(torch.equal(one, other) for one, other in zip(whole, again))
    assert not torch.equal(whole[0], cut[0])


def test_the_state_of_other_parameters_is_refused() -> None:
    mine = parameters()
    optimizer = build_optimizer(groups(mine, 1e-2), TrainConfig())
    take_steps(optimizer, mine, 0, 1)
    tensors, text = pack_state(optimizer)
    other = build_optimizer(groups(mine, 1e-2)[:1], TrainConfig())
    with pytest.raises(ValueError, match="other parameters"):
        unpack_state(other, tensors, text)


def test_the_state_of_another_optimizer_is_refused() -> None:
    mine = parameters()
    optimizer = build_optimizer(groups(mine, 1.0), TrainConfig(optimizer="adamw"))
    take_steps(optimizer, mine, 0, 1)
    other = build_optimizer(groups(mine, 1.0), TrainConfig(optimizer="prodigy"))
    with pytest.raises(ValueError, match="was AdamW, not Prodigy"):
        unpack_state(other, *pack_state(optimizer))


def test_rates_and_decay_are_the_run_s_and_the_rest_is_the_state_s() -> None:
    mine = parameters()
    optimizer = build_optimizer(groups(mine, 1e-2), TrainConfig())
    take_steps(optimizer, mine, 0, 2)
    other = build_optimizer(groups(mine, 1e-3), TrainConfig(weight_decay=0.5))
    unpack_state(other, *pack_state(optimizer))
    assert [(group["base_lr"], group["weight_decay"]) for group in other.param_groups] == [(1e-3, 0.5), (1e-4, 0.5)]
    assert torch.equal(other.state[mine[0]]["exp_avg"], optimizer.state[mine[0]]["exp_avg"])


def test_adamw_is_torch_s_with_the_decay_that_was_asked_for() -> None:
    mine, reference = parameters(), parameters()
    ours = build_optimizer([{"params": mine, "lr": 1e-2, "base_lr": 1e-2}], TrainConfig(weight_decay=0.1))
    theirs = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1, foreach=False)
    take_steps(ours, mine, 0, 5)
    take_steps(theirs, reference, 0, 5)
    for one, other in zip(mine, reference):
        torch.testing.assert_close(one, other)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        build_optimizer(groups(parameters(), 1e-2), TrainConfig(optimizer="adamw8bit"))
