"""Token merging against loops over single tokens, and around attentions of every kind."""

from __future__ import annotations

import numpy
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from src import cpu_layers, token_merging
from src.errors import UserError
from src.token_merging import find_places, merge, merge_tokens
from tests.tiny import pipelines


def tokens(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def naive_groups(x: numpy.ndarray, height: int, width: int, ratio: float) -> list[set[int]]:
    """Which tokens are taken together: the paper's bipartite soft matching, one token at a time."""
    targets = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    others = [index for index in range(height * width) if index not in targets]

    def cosine(one: int, other: int) -> float:
        return float(x[one] @ x[other] / numpy.linalg.norm(x[one]) / numpy.linalg.norm(x[other]))

    nearest = {index: max(targets, key=lambda target: cosine(index, target)) for index in others}
    alike = sorted(others, key=lambda index: -cosine(index, nearest[index]))[: int(ratio * height * width)]
    groups = {target: {target} for target in targets}
    for index in alike:
        groups[nearest[index]].add(index)
    return [*groups.values(), *({index} for index in others if index not in alike)]


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 8)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_matching_and_means_are_those_of_the_loops(grid, ratio, monkeypatch) -> None:
    height, width = grid
    x = tokens(height * width)
    groups = naive_groups(x.double().numpy(), height, width, ratio)
    for scores in (token_merging._SCORES, 13):  # all at once, and a row or so at a time
        monkeypatch.setattr(token_merging, "_SCORES", scores)
        places, count = find_places(x, grid, ratio)
        found = [set(torch.nonzero(places == place).flatten().tolist()) for place in range(count)]
        assert sorted(map(sorted, found)) == sorted(map(sorted, groups))
    means = merge(x, places, count)
    for place, group in enumerate(found):
        torch.testing.assert_close(means[place], x[sorted(group)].mean(0))
        assert all(torch.equal(means[places[index]], means[place]) for index in group)


def test_three_quarters_leave_one_token_a_cell() -> None:
    assert find_places(tokens(64), (8, 8), 0.75)[1] == 16
    assert find_places(tokens(35), (5, 7), 0.75)[1] == 12  # 3 x 4 cells, those at the edge with fewer


def attentions(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn1")}


@pytest.mark.parametrize(
    ("unet", "where"),
    [
        (pipelines.sd1().unet, ("down_blocks.0.", "up_blocks.1.")),
        (pipelines.sdxl().unet, ("down_blocks.1.", "up_blocks.0.")),  # its highest resolution has no attention
    ],
    ids=["sd1", "sdxl"],
)
def test_only_the_highest_resolution_with_attention_is_touched(unet, where) -> None:
    handles = merge_tokens(unet, 0.5)
    touched = {name for name, module in attentions(unet).items() if module._forward_pre_hooks}
    assert touched == {name for name in attentions(unet) if name.startswith(where)}
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())
    assert merge_tokens(unet, 0.0) == []


def with_torchs_attention(unet: torch.nn.Module) -> None:
    pass


def with_the_first_processor(unet: torch.nn.Module) -> None:
    unet.set_attn_processor(AttnProcessor())


def with_cpu_layers(unet: torch.nn.Module) -> None:
    cpu_layers.prepare_for_drawing(unet)


def with_an_adapter(unet: torch.nn.Module) -> None:
    for module in attentions(unet).values():
        module.to_q.register_forward_hook(lambda _, args, output: output + 0.3 * args[0].roll(1, -1))


@pytest.mark.parametrize("prepare", [with_torchs_attention, with_the_first_processor, with_cpu_layers, with_an_adapter])
def test_attention_is_asked_about_the_means_and_its_answers_are_spread(prepare) -> None:
    """Each hooked attention, in a run of the U-Net, against itself without hooks on tokens merged by the loops."""
    unet = pipelines.sd1().unet
    prepare(unet)
    sample, text = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1)), tokens(3 * 7, 32).view(3, 7, 32)
    seen = {}
    for name, module in attentions(unet).items():  # before our hooks: they see what comes in; the last hook what goes out
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: [args[0]]}))
    handles = merge_tokens(unet, 0.5)
    for name, module in attentions(unet).items():
        handles.append(module.register_forward_hook(lambda _, args, output, name=name: seen[name].append(output)))
    with torch.no_grad():
        unet(sample, 500, text)
    for handle in handles:
        handle.remove()
    hooked = [name for name in seen if name.startswith(("down_blocks.0.", "up_blocks.1."))]
    assert len(hooked) == 5
    for name in hooked:
        before, after = seen[name]
        for x, output in zip(before, after):
            groups = [sorted(group) for group in naive_groups(x.double().numpy(), 6, 8, 0.5)]
            with torch.no_grad():
                answers = attentions(unet)[name](torch.stack([x[group].mean(0) for group in groups])[None])[0]
            for group, answer in zip(groups, answers):
                torch.testing.assert_close(output[group], answer.expand(len(group), -1), atol=1e-5, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    unet = pipelines.sd1().unet
    merge_tokens(unet, 0.5)
    sample, text = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), tokens(3 * 7, 32).view(3, 7, 32)
    with torch.no_grad():
        together = unet(sample, 500, text).sample
        alone = torch.cat([unet(sample[i : i + 1], 500, text[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_compiled_unet_is_refused() -> None:
    unet = pipelines.sd1().unet
    unet.mid_block.compile()
    with pytest.raises(UserError, match="--torch-compile"):
        merge_tokens(unet, 0.5)
