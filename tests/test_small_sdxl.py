"""U-Nets of small SDXL models (SSD-1B, Segmind-Vega): transformers of unequal depth, and a middle without attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from src import model_shapes
from src.model_shapes import Config, ModelShapes, read_shapes, unet_activation_bytes
from src.train_config import TrainConfig
from src.training_memory import TrainingNeed, adapter_numbers
from src.unet_parts import LAST_BLOCKS, OUTPUT, convolution_numbers, is_in_part, part_numbers
from src.unet_weights import largest_matrix, matrices, offload_groups
from tests.test_model_shapes import count, largest, trace_unet
from tests.test_training_memory import build
from tests.tiny import pipelines

MIDDLES = ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]


def small(middle: str | None = "UNetMidBlock2D") -> Config:
    """As SSD-1B is built, in small."""
    return {
        "block_out_channels": [32, 64, 128], "cross_attention_dim": 48, "layers_per_block": 2, "attention_head_dim": [4, 8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [0, [2, 2], [4, 3]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": middle, "use_linear_projection": True, "sample_size": 8,
    }  # fmt: skip


def network(config: Config) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def shapes_of(config: Config, tmp_path: Path) -> ModelShapes:
    folder = pipelines.save(pipelines.sd1(), tmp_path / "model")
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return read_shapes(folder)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reverse_transformer_layers_per_block": None, "transformer_layers_per_block": [1, 2, 3]},
        {"use_linear_projection": False},
    ],
)
@pytest.mark.parametrize("middle", MIDDLES)
def test_its_numbers_are_those_of_the_network(middle: str | None, change: Config, tmp_path: Path) -> None:
    config = small(middle) | change
    unet, shapes = network(config), shapes_of(config, tmp_path)
    assert (shapes.parameters["unet"], shapes.largest_layer["unet"]) == (count(unet), largest(unet))
    linear = [item.weight.numel() for item in unet.modules() if isinstance(item, nn.Linear)]
    assert sorted(inputs * outputs for inputs, outputs in matrices(config)) == sorted(linear)
    assert largest_matrix(config) == max(linear)


@pytest.mark.parametrize("middle", MIDDLES)
def test_its_offload_groups_are_those_of_the_network(middle: str | None, tmp_path: Path) -> None:
    unet, groups = network(small(middle)), offload_groups(shapes_of(small(middle), tmp_path))
    levels = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block else []), *unet.up_blocks]
    lists = [part for level in levels for part in level.children() if isinstance(part, nn.ModuleList)]
    sizes = [count(module) for part in lists for module in part]
    assert (groups.largest, groups.resident) == (max(sizes), count(unet) - sum(sizes))


@pytest.mark.parametrize("middle", MIDDLES)
def test_its_parts_and_adapters_are_those_of_the_network(middle: str | None, tmp_path: Path) -> None:
    unet, shapes = network(small(middle)), shapes_of(small(middle), tmp_path)
    for part in ("all", "cross-attention", "mid", "last-blocks"):
        learning = {name: item for name, item in unet.named_parameters() if is_in_part(name, part, len(unet.up_blocks))}
        assert part_numbers(shapes, part) == sum(item.numel() for item in learning.values()), part
        kernels = [
            item for name, item in learning.items() if item.ndim == 4 and not name.startswith(("conv_in", *OUTPUT))
        ] if part != "cross-attention" else []  # fmt: skip
        assert convolution_numbers(shapes, part) == tuple(
            sum(item.numel() for item in kernels if item.shape[-1] == side) for side in (3, 1)
        ), part
    assert len(unet.up_blocks) > LAST_BLOCKS, "or all of them would be the last"
    for targets in ("attention", "kohya", "conv"):
        _, adapter = build(small(middle), TrainConfig(targets=targets, rank=4))
        need = TrainingNeed(64, rank=4, targets=targets)
        assert adapter_numbers(shapes, need) == sum(item.numel() for item in adapter.trainable().values()), targets


@pytest.mark.parametrize("middle", MIDDLES)
def test_its_activations_are_as_traced(middle: str | None) -> None:
    traced = trace_unet(small(middle), (32, 32), 2, "meta", torch.float16)
    assert unet_activation_bytes(small(middle), (32, 32), 2, 2, workspace=False) == pytest.approx(traced, rel=0.05)


@pytest.mark.parametrize(
    "change", [{"transformer_layers_per_block": [1, [2], [4, 4]]}, {"reverse_transformer_layers_per_block": [1, 1]}]
)
def test_lists_that_are_too_short_describe_no_network(change: Config) -> None:
    with pytest.raises(ValueError, match="does not describe"):
        model_shapes.unet_blocks(small() | change)
