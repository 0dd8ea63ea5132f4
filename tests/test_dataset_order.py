"""The order in which examples are drawn: counts and statistics worked out by hand."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.dataset import Order

SIZES = st.integers(1, 6)


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, list[object], list[int], list[bool], int]:
    count = draw(st.integers(1, 12))
    groups = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    repeats = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    priors = [False, *draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1))]
    batch_size = draw(SIZES)
    order = Order(
        groups, repeats, [3] * count, batch_size=batch_size, seed=draw(st.integers(0, 2**63 - 1)),
        caption_dropout=0.3, flip=True, priors=priors,
    )  # fmt: skip
    return order, groups, repeats, priors, batch_size


@settings(deadline=None, max_examples=150, derandomize=True)
@given(orders(), st.integers(0, 5))
def test_an_epoch_holds_what_it_should(built: tuple, epoch: int) -> None:
    order, groups, repeats, priors, batch_size = built
    count = order.batches_per_epoch
    batches = [order.batch(index) for index in range(epoch * count, (epoch + 1) * count)]
    draws = [draw for batch in batches for draw in batch]
    assert all(len(batch) == batch_size for batch in batches)
    assert all(len({groups[draw.example] for draw in batch}) == 1 for batch in batches)
    assert len({draw.key for draw in draws}) == len(draws)
    visits = Counter(draw.example for draw in draws)
    subjects = [index for index, prior in enumerate(priors) if not prior]
    wanted = sum(repeats[index] for index in subjects)
    prior_visits = wanted if any(priors) else 0
    assert all(visits[index] >= repeats[index] for index in subjects)
    assert len(draws) - wanted - prior_visits == order.fill_ups
    assert order.fill_ups < batch_size * len(set(groups))
    assert len({draw.key for draw in draws} & {draw.key for draw in order.batch((epoch + 1) * count)}) == 0


@settings(deadline=None, max_examples=50, derandomize=True)
@given(orders(), st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_batch_does_not_depend_on_what_was_asked_before(built: tuple, indices: list[int]) -> None:
    order = built[0]
    backwards = {index: order.batch(index) for index in sorted(indices, reverse=True)}
    assert all(order.batch(index) == backwards[index] for index in indices)


def make(groups: list[object], batch_size: int = 1, repeats: list[int] | None = None, **changes: object) -> Order:
    settings = {"seed": 0, "caption_dropout": 0.0, "flip": False} | changes
    return Order(groups, repeats or [1] * len(groups), [2] * len(groups), batch_size=batch_size, **settings)


def test_every_example_is_drawn_exactly_repeats_times() -> None:
    repeats = [1, 5, 2, 4]
    order = make(["a", "a", "b", "b"], 3, repeats)
    assert order.fill_ups == 0
    for epoch in range(3):
        draws = [draw for index in range(4) for draw in order.batch(4 * epoch + index)]
        assert Counter(draw.example for draw in draws) == Counter(dict(enumerate(repeats)))


def test_fill_ups_are_other_pictures_of_the_group_where_there_are_others() -> None:
    order = make(["a"] * 5, 4)
    for epoch in range(20):
        visits = Counter(draw.example for index in (0, 1) for draw in order.batch(2 * epoch + index))
        assert sorted(visits.values()) == [1, 1, 2, 2, 2]


def test_epochs_and_seeds_shuffle_differently() -> None:
    def first(order: Order, epoch: int) -> list[int]:
        return [order.batch(10 * epoch + index)[0].example for index in range(10)]

    order = make([0] * 10)
    assert len({tuple(first(order, epoch)) for epoch in range(20)}) == 20
    assert first(order, 0) != first(make([0] * 10, seed=1), 0)
    assert first(order, 7) == first(make([0] * 10), 7)


def test_priors_come_as_often_as_subjects_and_in_turn() -> None:
    order = make([0] * 10, 2, [2, 1, *[1] * 8], priors=[False] * 2 + [True] * 8)
    assert order.batches_per_epoch == 3
    visits = Counter(draw.example for index in range(3 * 8) for draw in order.batch(index))  # 8 epochs of 3 + 3
    assert visits == Counter({0: 16, 1: 8} | dict.fromkeys(range(2, 10), 3))


def test_priors_of_several_sizes_keep_their_proportions() -> None:
    order = make(["a"] * 12 + ["b"] * 6 + ["c"] * 3, priors=[False] * 7 + [True] * 14)  # priors: 5 a, 6 b, 3 c
    draws = [order.batch(index)[0] for index in range(order.batches_per_epoch)]
    assert sum(draw.example < 7 for draw in draws) == sum(draw.example >= 7 for draw in draws) == 7
    shares = Counter("aaaaaaaaaaaabbbbbbccc"[draw.example] for draw in draws if draw.example >= 7)
    assert all(abs(shares[group] - 7 * count / 14) <= 0.5 for group, count in {"a": 5, "b": 6, "c": 3}.items())


def test_keys_do_not_depend_on_the_batch_size() -> None:
    """The same visits, each with its own noise, caption and mirroring, however they are batched."""

    def all_draws(batch_size: int) -> set[object]:
        order = make([0] * 12, batch_size, [2] * 12, flip=True, caption_dropout=0.2)
        assert order.fill_ups == 0
        return {draw for index in range(2 * order.batches_per_epoch) for draw in order.batch(index)}

    assert all_draws(1) == all_draws(2) == all_draws(8)


def test_captions_dropout_and_mirroring_have_their_shares() -> None:
    """20,000 draws: four standard deviations are 0.3 to 0.9 %."""
    order = make([0] * 100, 10, caption_dropout=0.1, flip=True)
    draws = [draw for index in range(2000) for draw in order.batch(index)]
    dropped = sum(draw.caption == -1 for draw in draws)
    assert dropped / len(draws) == pytest.approx(0.1, abs=0.009)
    assert sum(draw.caption == 1 for draw in draws) / (len(draws) - dropped) == pytest.approx(0.5, abs=0.015)
    assert sum(draw.flip for draw in draws) / len(draws) == pytest.approx(0.5, abs=0.015)
    both = sum(draw.flip and draw.caption == -1 for draw in draws)
    assert both / len(draws) == pytest.approx(0.05, abs=0.007)
    assert not any(draw.flip or draw.caption < 0 for index in range(100) for draw in make([0] * 100).batch(index))
    assert all(draw.caption < 0 for draw in make([0] * 10, 10, caption_dropout=1.0).batch(0))
