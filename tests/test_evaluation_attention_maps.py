"""Attention maps: softmax(q k^T) by hand on tiny U-Nets, sums over tokens, untouched pictures, tokens of words."""

import copy
import itertools
import math

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from src import conditioning, cpu_layers
from src.errors import UserError
from src.evaluation.attention_maps import Word, find_words, grid_of, recorded, word_maps, words_of
from src.schedulers import build_scheduler, find_sampler
from tests.tiny import pipelines

PROMPT = "a red circle left of a (blue:1.3) square, on a white background"


def call(pipeline, prompt: str = PROMPT, size: tuple[int, int] = (8, 8), timestep: float = 500, batch: int = 2) -> torch.Tensor:
    """One call of the U-Net as the pipelines make it under guidance: the negative half first."""
    source = torch.Generator().manual_seed(1)
    encoded = conditioning.encode(pipeline, prompt, "ugly")
    text = torch.stack([encoded.negative.tokens, encoded.positive.tokens])[2 - batch :]
    latents = torch.randn(1, 4, *size, generator=source).repeat(batch, 1, 1, 1)
    more = {}
    if encoded.positive.pooled is not None:
        pooled = torch.stack([encoded.negative.pooled, encoded.positive.pooled])[2 - batch :]
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch)}}
    with torch.no_grad():
        return pipeline.unet(latents, torch.tensor(timestep), encoder_hidden_states=text, return_dict=False, **more)[0]


def by_hand(pipeline, size: tuple[int, int], **options) -> torch.Tensor:
    """The mean of softmax(q k^T / sqrt(d)) over heads, layers and resolutions, from the layers' own projections."""
    seen: dict[str, torch.Tensor] = {}
    layers = {name: module for name, module in pipeline.unet.named_modules() if name.endswith("attn2")}
    handles = [
        projection.register_forward_hook(lambda _, __, output, key=f"{name}.{part}": seen.__setitem__(key, output))
        for name, module in layers.items()
        for part, projection in (("q", module.to_q), ("k", module.to_k))
    ]
    call(pipeline, size=size, **options)
    for handle in handles:
        handle.remove()
    maps = []
    for name, module in layers.items():
        query, key = seen[f"{name}.q"][-1], seen[f"{name}.k"][-1]
        width = query.shape[-1] // module.heads
        heads = [
            (query[:, at : at + width] @ key[:, at : at + width].T / math.sqrt(width)).softmax(-1)
            for at in range(0, query.shape[-1], width)
        ]
        mean = sum(heads) / len(heads)  # (L, S)
        level = next(level for level in (size, tuple(math.ceil(side / 2) for side in size)) if level[0] * level[1] == len(mean))
        maps.append(mean.T.reshape(1, -1, *level))
    largest = max(item.shape[-2:] for item in maps)
    return torch.cat([torch.nn.functional.interpolate(item, largest, mode="bilinear") for item in maps]).mean(0)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("size", [(8, 8), (6, 12), (9, 7)])
def test_a_map_is_the_mean_softmax_of_every_cross_attention(kind: str, size: tuple[int, int]) -> None:
    pipeline = getattr(pipelines, kind)()
    wanted = by_hand(pipeline, size)
    with recorded(pipeline) as recording:
        call(pipeline, size=size)
    (found,) = recording.maps
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.allclose(found.sum(dim=0), torch.ones(found.shape[1:]), atol=1e-5)


def test_under_guidance_it_is_the_prompts_half() -> None:
    pipeline = pipelines.sd1()
    with recorded(pipeline) as guided:
        call(pipeline)
    with recorded(pipeline) as plain:
        call(pipeline, batch=1)
    with recorded(pipeline) as other:
        call(pipeline, "something else")
    assert torch.allclose(guided.maps[0], plain.maps[0], atol=1e-5)
    assert not torch.allclose(guided.maps[0], other.maps[0], atol=1e-5)


@pytest.mark.parametrize("exchanged", [False, True], ids=["diffusers", "ours on a CPU"])
def test_recording_changes_nothing_and_leaves_nothing(exchanged: bool) -> None:
    pipeline = pipelines.sd1()
    if exchanged:
        cpu_layers.prepare_for_drawing(pipeline.unet)
    before, output = pipeline.unet.attn_processors, call(pipeline)
    with recorded(pipeline) as recording:
        assert torch.equal(call(pipeline), output)
        assert pipeline.unet.attn_processors != before
    assert len(recording.maps) == 1
    assert pipeline.unet.attn_processors == before
    assert not pipeline.unet._forward_hooks
    assert not pipeline.unet._forward_pre_hooks
    with pytest.raises(KeyError), recorded(pipeline):
        raise KeyError
    assert pipeline.unet.attn_processors == before


def test_a_run_that_begins_anew_is_recorded_anew() -> None:
    """Memory ran out after a step or two: the ladder draws the same once more, with a scheduler of its own."""
    pipeline = pipelines.sd1()
    with recorded(pipeline) as recording:
        for run in ([900], [900, 500], [900, 500, 500, 100]):  # Heun asks twice at a timestep
            pipeline.scheduler = copy.copy(pipeline.scheduler)
            for timestep in run:
                call(pipeline, timestep=timestep)
    assert recording.timesteps == [900, 500, 500, 100]
    assert len(recording.maps) == 4


@pytest.mark.parametrize(("sampler", "spacing"), [("dpm2_a_karras", "linspace"), ("dpm2_a", "leading"), ("heun", "leading")])
def test_every_call_of_a_run_is_recorded_though_its_timesteps_go_up(sampler: str, spacing: str) -> None:
    pipeline = pipelines.sd1()
    config = {**pipeline.scheduler.config, "timestep_spacing": spacing, "_use_default_values": ()}
    pipeline.scheduler = build_scheduler(find_sampler(sampler), config)
    pipeline.scheduler.set_timesteps(20)
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert len(timesteps) == 39
    assert any(after > before for before, after in itertools.pairwise(timesteps)) == sampler.startswith("dpm2_a")
    with recorded(pipeline) as recording:
        for timestep in timesteps:
            call(pipeline, timestep=timestep)
    assert recording.timesteps == timesteps
    assert len(recording.maps) == 39


def test_processors_that_were_exchanged_are_noticed() -> None:
    pipeline = pipelines.sd1()

    def draw() -> None:
        with recorded(pipeline):
            pipeline.unet.set_attn_processor(AttnProcessor2_0())
            call(pipeline)

    with pytest.raises(UserError, match="--memory"):
        draw()


def test_a_compiled_unet_is_refused() -> None:
    pipeline = pipelines.sd1()
    pipeline.unet.mid_block._compiled_call_impl = lambda: None
    with pytest.raises(UserError, match="--torch-compile"), recorded(pipeline):
        pass


@pytest.mark.parametrize(
    ("places", "size", "wanted"),
    [(64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (20, (9, 7), (5, 4)), (6, (9, 7), (3, 2)), (72, (6, 12), (6, 12))],
)
def test_levels_are_rounded_up(places: int, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert grid_of(places, size) == wanted


# --- words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_word_has_the_places_of_its_tokens(kind: str) -> None:
    pipeline = getattr(pipelines, kind)()
    ids = pipeline.tokenizer("a red circle left of a blue square, on a white background").input_ids  # begins with begin
    for word in words_of(pipeline, PROMPT, weighted=True):
        own = pipeline.tokenizer(word.text, add_special_tokens=False).input_ids
        assert [ids[place] for place in word.places] == own
    assert [word.text for word in words_of(pipeline, PROMPT, True)] == [
        "red", "circle", "left", "blue", "square", "white", "background",
    ]  # fmt: skip


def test_words_of_several_tokens_and_phrases() -> None:
    pipeline = pipelines.sd1()
    prompt = "a castle beside a red circle, a castle at night"
    castle, phrase = find_words(pipeline, prompt, True, ["Castle", "red circle"])
    tokens = conditioning.tokenize(pipeline, "castle")
    assert len(tokens) > 1, "the test needs a word that is torn"
    assert len(castle.places) == 2 * len(tokens)
    assert len(phrase.places) == len(conditioning.tokenize(pipeline, "red circle"))
    assert {word.text: word.places for word in words_of(pipeline, prompt, True)}["castle"] == castle.places
    for wrong in ("cast", "blue", "circle red"):
        with pytest.raises(UserError, match="castle, beside, red, circle, night"):
            find_words(pipeline, prompt, True, [wrong])


def test_brackets_are_words_only_where_they_are_plain() -> None:
    pipeline = pipelines.sd1()
    (weighted,) = find_words(pipeline, PROMPT, True, ["blue"])
    (literal,) = find_words(pipeline, PROMPT, False, ["blue"])
    assert literal.places[0] == weighted.places[0] + 1  # behind the bracket


def test_beyond_the_window_places_count_begins_and_ends() -> None:
    """The embedding of a long prompt is made of windows of 77 with a begin, an end and padding each."""
    pipeline = pipelines.sd1()
    prompt = "red BREAK a blue circle"
    (blue,) = find_words(pipeline, prompt, True, ["blue"])
    assert blue.places == (77 + 1 + 1,)
    long = "a " * 80 + "square"
    (square,) = find_words(pipeline, long, True, ["square"])
    assert square.places == (77 + 1 + 5,)
    with recorded(pipeline) as recording:
        encoded = conditioning.encode(pipeline, long, "")
        with torch.no_grad():
            pipeline.unet(torch.zeros(1, 4, 8, 8), torch.tensor(9), encoder_hidden_states=encoded.positive.tokens[None])
    assert recording.maps[0].shape[0] == 2 * 77


def test_a_words_map_is_the_mean_of_its_tokens() -> None:
    maps = torch.arange(2 * 4 * 1 * 2, dtype=torch.float32).view(2, 4, 1, 2)  # (calls, S, h, w)
    found = word_maps(maps, [Word("one", (2,)), Word("two", (0, 3))])
    assert found.shape == (2, 2, 1, 2)
    assert torch.equal(found[:, 0], maps[:, 2])
    assert torch.equal(found[:, 1], (maps[:, 0] + maps[:, 3]) / 2)
