"""Cached captions against diffusers' own encode_prompt and time ids; lengths, dropped captions, what makes a new entry."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src import conditioning
from src.dataset import Example
from src.errors import UserError
from src.training.text_cache import TextCache, time_ids
from tests.tiny import pipelines

SHORT, LONG = "a red (circle:1.3) left of a blue square", "a small red circle, " * 40
MAKERS = {"sd1": pipelines.sd1, "sdxl": pipelines.sdxl}


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request: pytest.FixtureRequest):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def sdxl():
    return pipelines.sdxl()


def cache_of(pipeline, folder: Path, **changes: object) -> TextCache:
    return TextCache(pipeline, folder / "text", **{"encoder_id": "abc", "device": "cpu", "say": print} | changes)


def encode(cache: TextCache, *captions: str) -> int:
    """How many captions were encoded."""
    progress: list[tuple[int, int]] = []
    cache.encode(captions, lambda *numbers: progress.append(numbers))
    assert progress == [(done, progress[0][1]) for done in range(progress[0][0], progress[0][1] + 1)]
    return len(progress) - 1


def diffusers_encodes(pipeline, caption: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return encoded[0][0], encoded[2][0] if len(encoded) == 4 else None


@pytest.mark.parametrize("caption", [SHORT, "", "x"])
def test_a_caption_is_what_diffusers_encodes(tmp_path: Path, pipeline, caption: str) -> None:
    cache = cache_of(pipeline, tmp_path)
    encode(cache, caption)
    tokens, pooled = diffusers_encodes(pipeline, caption)
    for each in (cache, cache_of(pipeline, tmp_path)):  # from memory, from disk
        text = each.get(caption, 1)
        if caption or pooled is None:
            assert torch.equal(text.tokens, tokens)
            assert pooled is None or torch.equal(text.pooled, pooled)
        else:
            assert text.tokens.shape == tokens.shape
            assert text.tokens.abs().max() == 0
            assert text.pooled.abs().max() == 0


def test_an_empty_caption_of_sdxl_is_zeros_only_where_the_model_says_so(tmp_path: Path) -> None:
    pipeline = pipelines.sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    cache = cache_of(pipeline, tmp_path)
    encode(cache)
    tokens, pooled = diffusers_encodes(pipeline, "")
    assert torch.equal(cache.get("", 1).tokens, tokens)
    assert torch.equal(cache.get("", 1).pooled, pooled)


def test_long_captions_are_whole(tmp_path: Path, pipeline) -> None:
    cache = cache_of(pipeline, tmp_path)
    encode(cache, LONG, SHORT)
    chunks = cache.chunks(LONG)
    assert chunks > 1
    for caption in (LONG, SHORT):  # the shorter one beside the longer, as a picture's prompt and negative are
        expected = conditioning.encode(pipeline, caption, LONG, weighted=False).positive
        text = cache.get(caption, chunks)
        torch.testing.assert_close(text.tokens, expected.tokens)
        assert text.tokens.shape == (77 * chunks, expected.tokens.shape[1])
        if expected.pooled is not None:
            torch.testing.assert_close(text.pooled, expected.pooled)
    dropped = conditioning.encode(pipeline, LONG, "", weighted=False).negative
    torch.testing.assert_close(cache.get("", chunks).tokens, dropped.tokens)
    with pytest.raises(ValueError, match="chunks"):
        cache.get(LONG, 1)


def test_equal_captions_are_encoded_once(tmp_path: Path, pipeline) -> None:
    assert encode(cache_of(pipeline, tmp_path), "a", "b", "a", "", "a") == 3
    again = cache_of(pipeline, tmp_path)
    assert encode(again, "b", "a") == 0
    assert encode(again, "c", "a", "c") == 1


def test_whatever_changes_the_embedding_makes_a_new_entry(tmp_path: Path, pipeline) -> None:
    encode(cache_of(pipeline, tmp_path), "a")
    assert encode(cache_of(pipeline, tmp_path), "A") == 1
    assert encode(cache_of(pipeline, tmp_path, encoder_id="abd"), "a") == 2
    assert encode(cache_of(pipeline, tmp_path, clip_skip=2), "a") == 2
    before = pipeline.text_encoder.dtype
    try:
        pipeline.text_encoder.to(torch.bfloat16)
        assert encode(cache_of(pipeline, tmp_path), "a") == 2
    finally:
        pipeline.text_encoder.to(before)


def test_clip_skip_reaches_the_encoder(tmp_path: Path) -> None:
    pipeline = pipelines.sd1()
    cache = cache_of(pipeline, tmp_path, clip_skip=2)
    encode(cache, SHORT)
    expected = conditioning.encode(pipeline, SHORT, "", clip_skip=2, weighted=False).positive.tokens
    assert torch.equal(cache.get(SHORT, 1).tokens, expected)


def test_embeddings_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    pipeline = pipelines.sd1()
    torch.nn.init.constant_(pipeline.text_encoder.final_layer_norm.weight, float("nan"))
    with pytest.raises(UserError, match="--mixed_precision no"):
        encode(cache_of(pipeline, tmp_path), "a")
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_caption_that_vanished_ends_in_one_line(tmp_path: Path, pipeline) -> None:
    encode(cache_of(pipeline, tmp_path), "a")
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"")
    said: list[str] = []
    with pytest.raises(UserError, match="--resume"):
        cache_of(pipeline, tmp_path, say=said.append).get("a", 1)
    assert len(said) == 1


def test_no_gradients_are_kept(tmp_path: Path, pipeline) -> None:
    cache = cache_of(pipeline, tmp_path)
    encode(cache, "a")
    assert not cache.get("a", 1).tokens.requires_grad


def test_the_encoders_are_back_where_they_were(tmp_path: Path, pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[object] = []
    move: Callable = pipeline.text_encoder.to
    monkeypatch.setattr(pipeline.text_encoder, "to", lambda target: (moves.append(target), move(target))[1])
    encode(cache_of(pipeline, tmp_path), "a")
    assert moves == [torch.device("cpu")] * 2
    encode(cache_of(pipeline, tmp_path), "a")
    assert len(moves) == 2


def test_time_ids_are_those_of_diffusers(sdxl) -> None:
    example = Example(Path("x"), ("",), size_px=(96, 64), original_px=(1200, 900), crop_top_left=(4, 0), sha256="")
    expected = sdxl._get_add_time_ids(
        (900, 1200), (4, 0), (64, 96), torch.float32, text_encoder_projection_dim=sdxl.text_encoder_2.config.projection_dim
    )
    assert torch.equal(time_ids(example), expected[0])
