"""Embeddings against diffusers' own encode_prompt, and weights against A1111's formula worked out by hand."""

import pytest
import torch

from src import conditioning
from src.errors import UserError
from tests.tiny import pipelines

PROMPT = "a red circle left of a blue square"
NEGATIVE = "green, small"


@pytest.fixture(scope="module")
def sd1():
    return pipelines.sd1()


@pytest.fixture(scope="module")
def sdxl():
    return pipelines.sdxl()


def reference(pipeline, prompt: str, negative: str | None, clip_skip: int | None = None):
    return pipeline.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative, clip_skip=clip_skip
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [True, False])
def test_plain_prompts_are_what_diffusers_encodes_sd1(sd1, weighted: bool) -> None:
    positive, negative = reference(sd1, PROMPT, NEGATIVE)
    mine = conditioning.encode(sd1, PROMPT, NEGATIVE, weighted=weighted)
    assert torch.equal(mine.positive.tokens, positive[0])
    assert torch.equal(mine.negative.tokens, negative[0])
    assert mine.positive.pooled is None


def test_plain_prompts_are_what_diffusers_encodes_sdxl(sdxl) -> None:
    expected = reference(sdxl, PROMPT, NEGATIVE)
    stacked = conditioning.stack([conditioning.encode(sdxl, PROMPT, NEGATIVE)])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, tensor in zip(names, expected):
        assert torch.equal(stacked[name], tensor), name


def test_empty_negative_is_zero_for_sdxl_as_in_diffusers(sdxl) -> None:
    expected = reference(sdxl, PROMPT, None)
    stacked = conditioning.stack([conditioning.encode(sdxl, PROMPT, "")])
    assert torch.equal(stacked["negative_prompt_embeds"], expected[1])
    assert stacked["negative_prompt_embeds"].abs().max() == 0
    assert torch.equal(stacked["negative_pooled_prompt_embeds"], expected[3])


@pytest.mark.parametrize("a1111", [1, 2, 3])
def test_clip_skip_counts_as_a1111_does_sd1(sd1, a1111: int) -> None:
    """The layer by hand: hidden state -n through the final norm; 1 is the encoder's own output."""
    ids = sd1.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    output = sd1.text_encoder(ids, output_hidden_states=True)
    expected = sd1.text_encoder.final_layer_norm(output.hidden_states[-a1111])
    mine = conditioning.encode(sd1, PROMPT, "", clip_skip=a1111).positive.tokens
    torch.testing.assert_close(mine, expected[0])


@pytest.mark.parametrize(("a1111", "diffusers"), [(1, None), (2, None), (3, 1)])
def test_clip_skip_of_sdxl_starts_at_the_last_layer_but_one(sdxl, a1111: int, diffusers: int | None) -> None:
    mine = conditioning.encode(sdxl, PROMPT, NEGATIVE, clip_skip=a1111).positive.tokens
    assert torch.equal(mine, reference(sdxl, PROMPT, NEGATIVE, diffusers)[0][0])


def test_too_much_clip_skip_is_refused(sd1) -> None:
    with pytest.raises(UserError, match="3 layers"):
        conditioning.encode(sd1, PROMPT, "", clip_skip=4)


def test_weights_of_one_change_nothing(sd1) -> None:
    plain = conditioning.encode(sd1, "a cat, blue", "").positive.tokens
    for prompt in ("(a cat:1.0), blue", "(a cat, blue:1)", r"a cat, blue"):
        assert torch.equal(conditioning.encode(sd1, prompt, "").positive.tokens, plain)


def test_a_weight_multiplies_its_tokens_and_keeps_the_mean(sd1) -> None:
    """A1111's "original" emphasis: z * w, then times mean(z) / mean(z * w)."""
    tokenizer = sd1.tokenizer
    before, inside = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "red circle"))
    weights = torch.ones(77)
    weights[1 + len(before) : 1 + len(before) + len(inside)] = 1.3
    plain = conditioning.encode(sd1, "a red circle", "").positive.tokens
    weighted = plain * weights[:, None]
    expected = weighted * (plain.mean() / weighted.mean())
    torch.testing.assert_close(conditioning.encode(sd1, "a (red circle:1.3)", "").positive.tokens, expected)


def test_brackets_are_literal_without_prompt_weights(sd1) -> None:
    literal, _ = reference(sd1, "a (cat:1.3)", None)
    assert torch.equal(conditioning.encode(sd1, "a (cat:1.3)", "", weighted=False).positive.tokens, literal[0])


def test_a_long_prompt_is_the_join_of_its_chunks(sd1) -> None:
    """200 tokens in three windows, each equal to its 75 tokens encoded alone by the text encoder."""
    tokenizer, encoder = sd1.tokenizer, sd1.text_encoder
    words = ["circle", "square", "star", "red", "blue", "green", "small", "large"] * 25
    tokens = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert len(tokens) == 200
    expected = []
    for start in range(0, 200, 75):
        piece = tokens[start : start + 75]
        ids = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (75 - len(piece))]
        expected.append(encoder(torch.tensor([ids])).last_hidden_state[0])
    mine = conditioning.encode(sd1, " ".join(words), "")
    torch.testing.assert_close(mine.positive.tokens, torch.cat(expected))


def test_the_shorter_side_is_filled_up_with_empty_windows(sd1) -> None:
    mine = conditioning.encode(sd1, "a cat BREAK a dog BREAK a star", "blue")
    empty = conditioning.encode(sd1, "", "").positive.tokens
    blue = conditioning.encode(sd1, "blue", "").positive.tokens
    assert mine.length == 3 * 77
    torch.testing.assert_close(mine.negative.tokens, torch.cat([blue, empty, empty]))


def test_each_encoder_of_sdxl_is_padded_with_its_own_token(sdxl) -> None:
    """The second tokenizer pads with "!"; with the end token in its place the embedding would differ."""
    ids = sdxl.tokenizer_2("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids[0, -1] != sdxl.tokenizer_2.eos_token_id
    hidden = sdxl.text_encoder_2(ids, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(conditioning.encode(sdxl, "a cat", "").positive.tokens[:, 24:], hidden[0])


def test_pooled_vector_is_the_first_windows(sdxl) -> None:
    first = conditioning.encode(sdxl, "a cat", "").positive.pooled
    joined = conditioning.encode(sdxl, "a cat BREAK a dog", "").positive.pooled
    torch.testing.assert_close(joined, first)


def test_gradients_reach_the_encoder_where_it_learns_and_not_where_it_draws(sd1) -> None:
    assert not conditioning.encode(sd1, PROMPT, NEGATIVE).positive.tokens.requires_grad
    embedding = conditioning.embed(sd1, PROMPT, 1)
    assert torch.equal(embedding.tokens, conditioning.encode(sd1, PROMPT, "").positive.tokens)
    embedding.tokens.square().sum().backward()
    gradients = [parameter.grad is not None for parameter in sd1.text_encoder.parameters()]
    sd1.text_encoder.zero_grad(set_to_none=True)
    assert all(gradients)


def test_a_text_is_filled_up_to_the_windows_asked_for(sd1, sdxl) -> None:
    for pipeline in (sd1, sdxl):
        assert conditioning.count_chunks(pipeline, PROMPT) == 1
        tokens = conditioning.embed(pipeline, PROMPT, 3).tokens
        assert tokens.shape == conditioning.embedding_shape(pipeline, 3)
        torch.testing.assert_close(tokens[77:154], conditioning.embed(pipeline, "", 1).tokens)
