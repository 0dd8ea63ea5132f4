"""Sums and truncations of adapters against full matrices."""

import math

import pytest
import torch

from src.errors import ExitCode, UserError
from src.lora.arithmetic import added, norm, resized, total_kept
from src.lora.formats import LoraLayer

LINEAR, CONV = (24,), (6, 3, 3)


def layer(rank, shape=LINEAR, alpha=3.0, out=20, seed=0, decay=0.0):
    dice = torch.Generator().manual_seed(seed)
    strength = torch.exp(-decay * torch.arange(rank))
    up = (torch.randn(out, rank, generator=dice) * strength).reshape(out, rank, *[1] * (len(shape) - 1))
    return LoraLayer(torch.randn(rank, *shape, generator=dice), up, alpha, alpha / math.sqrt(rank))


def change(item):
    """scale * up @ down, as a whole matrix."""
    return item.scale * (item.up.double().flatten(1) @ item.down.double().flatten(1))


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_a_sum_is_exact_and_names_meet_across_forms(shape):
    one, two, three = layer(4, shape, seed=1), layer(2, shape, seed=2), layer(3, shape, seed=3)
    total = added([
        ("a", {("unet", "mid_block.attentions.0.proj_in"): one}, 0.7),
        ("b", {("unet", "middle_block_1_proj_in"): two, ("text_encoder", "encoder_layers_0_mlp_fc1"): three}, -1.5),
    ])  # fmt: skip
    assert set(total) == {("unet", "mid_block.attentions.0.proj_in"), ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")}
    both, alone = total.values()
    torch.testing.assert_close(change(both), 0.7 * change(one) - 1.5 * change(two), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(change(alone), -1.5 * change(three), atol=1e-5, rtol=1e-5)
    assert (both.rank, both.alpha, both.scale, both.down.shape[1:]) == (6, 6.0, 1.0, one.down.shape[1:])


def test_a_linear_and_a_1x1_convolution_are_added():
    flat, conv = layer(2, (6,), seed=1), layer(2, (6, 1, 1), seed=2)
    [(_, both)] = added([("a", {("unet", "conv_in"): flat}, 1.0), ("b", {("unet", "conv_in"): conv}, 1.0)]).items()
    torch.testing.assert_close(change(both), change(flat) + change(conv), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_resizing_is_the_truncated_svd_of_the_whole_matrix(shape):
    layers = {
        ("unet", "a"): layer(8, shape, decay=0.3, seed=1),
        ("unet", "b"): layer(8, shape, seed=2),
        ("unet", "c"): layer(3, shape),
    }
    small, kept = resized("x", layers, 3)
    energies = {}
    for where, item in layers.items():
        left, values, right = torch.linalg.svd(change(item), full_matrices=False)
        best = (left[:, :3] * values[:3]) @ right[:3]
        torch.testing.assert_close(change(small[where]), best, atol=1e-4, rtol=1e-4)
        assert kept[where] == pytest.approx(float(values[:3].square().sum() / values.square().sum()), abs=1e-9)
        assert norm(item) == pytest.approx(float(values.norm()), rel=1e-9)
        assert small[where].down.shape == (3, *shape)
        energies[where] = (float(values[:3].square().sum()), float(values.square().sum()))
    assert small["unet", "c"] is layers["unet", "c"]
    kept_in_all = sum(a for a, _ in energies.values()) / sum(b for _, b in energies.values())
    assert total_kept(layers, kept) == pytest.approx(kept_in_all, abs=1e-9)
    assert 0.1 < kept_in_all < 0.99


def test_an_untrained_layer_stays_nothing():
    fresh = LoraLayer(torch.randn(4, 8), torch.zeros(5, 4), 4.0, 1.0)
    small, kept = resized("x", {("unet", "a"): fresh}, 2)
    assert not change(small["unet", "a"]).any()
    assert kept == {("unet", "a"): 1.0}
    assert total_kept({("unet", "a"): fresh}, kept) == 1.0


def test_doras_and_other_shapes_are_refused():
    dora = LoraLayer(torch.randn(4, 8), torch.randn(5, 4), 4.0, 1.0, torch.ones(5))
    plain = LoraLayer(torch.randn(4, 9), torch.randn(5, 4), 4.0, 1.0)
    where = ("unet", "conv_in")
    for act, says in (
        (lambda: resized("x", {where: dora}, 2), "x: is a DoRA"),
        (lambda: added([("x", {where: dora}, 1.0)]), "x: is a DoRA"),
        (
            lambda: added([("x", {where: plain}, 1.0), ("y", {where: layer(2)}, 1.0)]),
            "x and y: layer 'conv_in' has another shape",
        ),
    ):
        with pytest.raises(UserError, match=says) as caught:
            act()
        assert caught.value.exit_code is ExitCode.REFUSED
