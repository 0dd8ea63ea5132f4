"""DeepCache against a forward pass written out by hand; what is called when, and that everything is put back."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module

from src.errors import UserError
from src.step_cache import reuse_deep_features
from tests.tiny import pipelines

KINDS = {"sd1": pipelines.sd1, "sdxl": pipelines.sdxl}


@pytest.fixture(params=KINDS)
def unet(request) -> torch.nn.Module:
    return KINDS[request.param]().unet


def inputs(unet: torch.nn.Module, seed: int, batch: int = 2) -> tuple[tuple, dict]:
    """Arguments as diffusers' pipelines pass them; another seed is another sample at another time, of the same prompt."""
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    named = {
        "encoder_hidden_states": torch.randn(batch, 7, unet.config.cross_attention_dim, generator=fixed),
        "return_dict": False,
    }
    if unet.config.addition_embed_type:
        pooled, sizes = torch.randn(batch, 40, generator=fixed), torch.full((batch, 6), 64.0)
        named["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return (torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor(900 - 100 * seed)), named


@torch.no_grad()
def call(unet: torch.nn.Module, seed: int, batch: int = 2) -> torch.Tensor:
    args, named = inputs(unet, seed, batch)
    return unet(*args, **named)[0]


@torch.no_grad()
def by_hand(unet: torch.nn.Module, whole_seed: int, seed: int) -> torch.Tensor:
    """The outermost layers on a new sample, beside what was below the last one in a whole call on another sample."""
    last = unet.up_blocks[-1]
    seen = []
    handle = last.resnets[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call(unet, whole_seed)
    handle.remove()
    (sample, time), named = inputs(unet, seed)
    deep = seen[0][:, : last.resnets[-1].in_channels - unet.config.block_out_channels[0]]
    embedding = unet.time_embedding(unet.time_proj(time.expand(len(sample))).to(sample.dtype))
    if "added_cond_kwargs" in named:
        added = named["added_cond_kwargs"]
        sizes = unet.add_time_proj(added["time_ids"].flatten()).reshape(len(sample), -1)
        embedding = embedding + unet.add_embedding(torch.cat([added["text_embeds"], sizes], -1))
    hidden = last.resnets[-1](torch.cat([deep, unet.conv_in(sample)], dim=1), embedding)
    if hasattr(last, "attentions"):
        hidden = last.attentions[-1](hidden, encoder_hidden_states=named["encoder_hidden_states"], return_dict=False)[0]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def test_calls_between_are_the_outermost_layers_over_kept_features(unet) -> None:
    plain = [call(unet, seed) for seed in range(4)]
    expected = [by_hand(unet, 0, 1), by_hand(unet, 0, 2)]
    handles = reuse_deep_features(unet, 3)
    drawn = [call(unet, seed) for seed in range(4)]
    assert torch.equal(drawn[0], plain[0])
    assert torch.equal(drawn[3], plain[3])
    for seen, wanted in zip(drawn[1:3], expected):
        torch.testing.assert_close(seen, wanted)
    assert (drawn[1] - plain[1]).abs().max() > 1e-3
    for handle in handles:
        handle.remove()
    assert torch.equal(call(unet, 2), plain[2])


def test_what_is_inside_rests_between_whole_calls(unet) -> None:
    calls: Counter[str] = Counter()
    inner = {
        "down": unet.down_blocks[0],
        "middle": unet.mid_block,
        "up": unet.up_blocks[0],
        "layer": unet.up_blocks[-1].resnets[0],
    }
    outer = {"in": unet.conv_in, "last": unet.up_blocks[-1], "outermost": unet.up_blocks[-1].resnets[-1], "out": unet.conv_out}
    for name, module in {**inner, **outer}.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    names = [name for name, _ in unet.named_modules()]
    reuse_deep_features(unet, 3)
    for seed in range(7):
        call(unet, seed)
        assert [name for name, _ in unet.named_modules()] == names
    assert calls == dict.fromkeys(inner, 3) | dict.fromkeys(outer, 7)


def test_an_interval_of_one_is_no_hook(unet) -> None:
    assert reuse_deep_features(unet, 1) == []


def test_another_batch_size_is_a_whole_call(unet) -> None:
    """Guidance may end in between: half the batch is then gone."""
    plain = call(unet, 1, batch=1)
    reuse_deep_features(unet, 5)
    call(unet, 0)
    assert torch.equal(call(unet, 1, batch=1), plain)


def test_an_error_leaves_the_unet_whole(unet) -> None:
    names = [name for name, _ in unet.named_modules()]
    handles = reuse_deep_features(unet, 2)
    call(unet, 0)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handles.append(unet.conv_out.register_forward_pre_hook(fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        call(unet, 1)
    assert [name for name, _ in unet.named_modules()] == names


def test_an_interrupt_leaves_the_unet_whole(unet) -> None:
    names = [name for name, _ in unet.named_modules()]
    handles = reuse_deep_features(unet, 2)
    call(unet, 0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handles.append(unet.conv_out.register_forward_pre_hook(interrupt))
    with pytest.raises(KeyboardInterrupt):
        call(unet, 1)
    for handle in handles:
        handle.remove()
    assert [name for name, _ in unet.named_modules()] == names


def test_offloaded_layers_make_no_difference(unet) -> None:
    handles = reuse_deep_features(unet, 2)
    expected = [call(unet, seed) for seed in range(4)]
    for handle in handles:
        handle.remove()
    cpu_offload(unet, execution_device=torch.device("cpu"))
    reuse_deep_features(unet, 2)
    for seed, wanted in enumerate(expected):
        assert torch.equal(call(unet, seed), wanted)


def test_model_offload_always_moves_the_whole_unet(unet) -> None:
    """It looks at the first weight to see whether anything is to be moved: a part on the card would stand for all."""
    first_seen: list[int] = []

    class Offload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            first_seen.append(sum(1 for _ in module.parameters()))
            return args, kwargs

    count = sum(1 for _ in unet.parameters())
    add_hook_to_module(unet, Offload())
    reuse_deep_features(unet, 2)
    for seed in range(4):
        first_seen.clear()
        call(unet, seed)
        assert first_seen[0] == count


def test_group_offload_is_refused(unet) -> None:
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(UserError, match="group offload"):
        reuse_deep_features(unet, 2)
