"""Offload groups and quantised bytes, counted in the real networks and in diffusers' own hooks."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.hooks import group_offloading

from src import optimizations
from src.model_shapes import bundled_shapes, read_shapes
from src.unet_weights import largest_matrix, offload_groups
from tests.tiny import pipelines


class Stream:
    """Stands for a CUDA stream where there is no card: everything is there at once."""

    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let U-Nets be offloaded in groups with a stream that fetches the next group, on the CPU."""

    class Backend:
        stream = staticmethod(lambda stream: stream)
        current_stream = staticmethod(Stream)

    def apply(module: torch.nn.Module, onload_device, offload_device, offload_type, **options) -> None:
        stream = Stream() if isinstance(module, UNet2DConditionModel) else None
        kind = group_offloading.GroupOffloadingType(offload_type)
        config = group_offloading.GroupOffloadingConfig(
            onload_device, offload_device, kind, non_blocking=False, record_stream=False, low_cpu_mem_usage=False,
            stream=stream, **options,
        )  # fmt: skip
        group_offloading._apply_group_offloading(module, config)

    monkeypatch.setattr(optimizations, "apply_group_offloading", apply)
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: Backend)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, int]]:
    """What lies on the card after each change: group -> parameters."""
    there: dict[int, int] = {}
    history: list[dict[int, int]] = [there]
    onload, offload = group_offloading.ModuleGroup.onload_, group_offloading.ModuleGroup.offload_

    def parameters(group: group_offloading.ModuleGroup) -> set[torch.nn.Parameter]:
        """Some are in a group by themselves and by their module."""
        return {*group.parameters, *(item for module in group.modules for item in module.parameters())}

    def fetch(group: group_offloading.ModuleGroup) -> None:
        history.append({**history[-1], id(group): sum(item.numel() for item in parameters(group))})
        onload(group)

    def send_back(group: group_offloading.ModuleGroup) -> None:
        history.append({key: size for key, size in history[-1].items() if key != id(group)})
        offload(group)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", fetch)
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", send_back)
    return history


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_with_a_stream_two_groups_and_the_rest_lie_on_the_card(family, tmp_path, streams, resident) -> None:
    """diffusers' hooks, watched: what is fetched when, in the first pass, which learns the order, and in those after it."""
    pipeline = getattr(pipelines, family)()
    groups = offload_groups(read_shapes(pipelines.save(pipeline, tmp_path / "model")))
    unet = pipeline.unet
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), torch.randn(2, 77, 64 if family == "sdxl" else 32)
    named = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 40), "time_ids": torch.zeros(2, 6)}, "return_dict": False}
    with torch.no_grad():
        expected = unet(*inputs, **named)[0]
        optimizations._offload_groups(pipeline, torch.device("cpu"))
        for is_first in (True, False, False):
            del resident[1:]
            assert torch.equal(unet(*inputs, **named)[0], expected)
            fetched = {key: size for state in resident for key, size in state.items()}
            assert max(fetched.values()) == groups.largest
            assert groups.resident in fetched.values()
            assert sum(fetched.values()) == sum(item.numel() for item in unet.parameters())
            assert max(map(len, resident)) == (2 if is_first else 3)
            most = max(sum(state.values()) for state in resident)
            assert groups.resident + groups.largest <= most <= groups.resident + 2 * groups.largest
            assert len(resident[-1]) == 0, "nothing stays behind a pass"


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "small-sd", "ofa-small"])
def test_groups_are_those_of_the_network(name: str) -> None:
    shapes = bundled_shapes(name)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(shapes.unet)
    levels = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block else []), *unet.up_blocks]
    lists = [part for level in levels for part in level.children() if isinstance(part, torch.nn.ModuleList)]
    sizes = [sum(item.numel() for item in module.parameters()) for part in lists for module in part]
    groups = offload_groups(shapes)
    assert groups.largest == max(sizes)
    assert groups.resident == shapes.parameters["unet"] - sum(sizes)
    matrices = [module.weight.numel() for module in unet.modules() if isinstance(module, torch.nn.Linear)]
    assert largest_matrix(shapes.unet) == max(matrices)
