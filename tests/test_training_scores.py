"""Scores: CLIP's own preprocessing and features, cosines by hand, the CLIP that is found, the rule for the best."""

import json
import math
import os
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from src.training import scores
from src.training.history import History
from src.training.scores import (
    Best,
    Clip,
    Score,
    Scorer,
    balance,
    choose_best,
    find_clip,
    load_clip,
    shows_subject,
    without_trigger,
)
from tests.tiny import pipelines
from tests.tiny.clips import save_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def clip(clip_folder) -> Clip:
    return Clip(clip_folder)


def photo(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype="uint8"))


# --- features ------------------------------------------------------------------------------------------------------------


def test_features_are_those_of_transformers(clip, clip_folder) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [photo(1), photo(2, (31, 90)), photo(3, (400, 300)), Image.new("L", (32, 32), 90)]
    texts = ["a red circle", "", "a photo of a dog on a hill " * 30]
    tokens = pipelines.tokenizer()(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        pixels = torch.cat([processor(item.convert("RGB"), return_tensors="pt").pixel_values for item in pictures])
        wanted = model(input_ids=tokens, pixel_values=pixels)
    assert torch.allclose(clip.picture_features(pictures), wanted.image_embeds, atol=2e-3)
    assert torch.allclose(clip.text_features(texts), wanted.text_embeds, atol=1e-5)
    assert torch.allclose(clip.picture_features(pictures).norm(dim=-1), torch.ones(4))


def test_a_clip_with_pixels_of_its_own_is_believed(clip_folder, tmp_path) -> None:
    folder = save_clip(tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    white = Image.new("RGB", (32, 32), "white")
    assert torch.equal(Clip(folder)._pixels(white), torch.ones(1, 3, 32, 32))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5] * 3}))
    with pytest.raises(ValueError, match="three channels"):
        Clip(folder)


def test_loading_and_scoring_draw_no_random_numbers(clip_folder) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    scorer = Scorer(Clip(clip_folder), [photo(1)], ["a"], None)
    scorer.score([photo(2)])
    assert torch.equal(torch.get_rng_state(), state)


# --- cosines -------------------------------------------------------------------------------------------------------------


class KnownFeatures:
    """In place of CLIP: a picture's feature is the direction of its first pixel, a text's that of its length."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def picture_features(self, pictures: list[Image.Image]) -> torch.Tensor:
        rows = [torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32) for picture in pictures]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, 3)

    def text_features(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        return torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(texts), 1)


def plain(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (red, green, blue))


def test_cosines_by_hand() -> None:
    photos = [plain(9, 0, 0), plain(0, 7, 0)]
    scorer = Scorer(KnownFeatures(), photos, ["a sks dog", "sks dog, ink", "a cat"], "sks dog")
    found = scorer.score([plain(3, 0, 0), plain(5, 5, 0), plain(0, 0, 8)])
    # Subject: (1, 0) with both photos -> 1, 0; the diagonal -> sqrt(1/2) twice. The cat is not asked to be the subject.
    assert found.clip_i == pytest.approx((1 + 0 + 2 * math.sqrt(0.5)) / 4)
    assert found.clip_t == pytest.approx((1 + math.sqrt(0.5) + 0) / 3)


def test_without_the_trigger_every_prompt_shows_the_subject() -> None:
    scorer = Scorer(KnownFeatures(), [plain(9, 0, 0)], ["a cat", "a dog"], "zxc")
    assert scorer.score([plain(1, 0, 0), plain(0, 1, 0)]).clip_i == pytest.approx(0.5)


def test_a_missing_picture_is_not_counted() -> None:
    scorer = Scorer(KnownFeatures(), [plain(9, 0, 0)], ["sks dog", "a cat"], "sks dog")
    assert scorer.score([None, plain(1, 0, 0)]) == Score(None, pytest.approx(1.0))
    assert scorer.score([plain(1, 0, 0), None]) == Score(pytest.approx(1.0), pytest.approx(1.0))
    assert scorer.score([None, None]) == Score(None, None)


def test_no_photos_no_fidelity_and_many_photos_are_spread() -> None:
    assert Scorer(KnownFeatures(), [], ["a"], None).score([plain(1, 0, 0)]).clip_i is None
    photos = [plain(1, 0, 0)] * 500 + [plain(0, 1, 0)] * 500
    assert Scorer(KnownFeatures(), photos, ["a"], None).score([plain(1, 0, 0)]).clip_i == pytest.approx(0.5)


def test_clip_reads_the_prompt_without_the_made_up_word() -> None:
    known = KnownFeatures()
    Scorer(known, [plain(1, 0, 0)], ["a photo of sks dog in a spacesuit"], "sks dog")
    assert known.texts == ["a photo of dog in a spacesuit"]


@pytest.mark.parametrize(
    ("prompt", "trigger", "expected"),
    [
        ("a photo of sks dog", "sks dog", "a photo of dog"),
        ("a photo of SKS  Dog, ink", "sks dog", "a photo of Dog, ink"),
        ("a photo of ohwx", "ohwx", "a photo of"),
        ("ohwx and ohwxy", "ohwx", "and ohwxy"),
        ("sks dogs", "sks dog", "sks dogs"),
        ("a (b.c) d", "(b.c)", "a d"),
        ("a cat", "sks dog", "a cat"),
        ("a cat", None, "a cat"),
        ("a cat", " ", "a cat"),
    ],
)
def test_the_trigger_gives_way_to_its_class(prompt, trigger, expected) -> None:
    assert without_trigger(prompt, trigger) == expected


# --- which CLIP ----------------------------------------------------------------------------------------------------------


def hub_snapshot(cache: Path, name: str, config: object, weights: str = "model.safetensors") -> Path:
    storage = cache / f"models--{name.replace('/', '--')}"
    commit = "a" * 40
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    snapshot = storage / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (snapshot / weights).write_bytes(b"")
    return snapshot


BOTH = {"model_type": "clip", "vision_config": {}, "text_config": {}}


def test_the_nearest_and_best_known_clip_is_found(tmp_path, monkeypatch) -> None:
    cache, users = tmp_path / "cache", tmp_path / "users"
    monkeypatch.setenv("HF_HUB_CACHE", str(users))
    assert find_clip("some/model", cache) is None
    small = hub_snapshot(users, "openai/clip-vit-base-patch32", BOTH)
    assert find_clip("some/model", cache) == small
    hub_snapshot(cache, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", BOTH, weights="pytorch_model.bin")  # a pickle
    hub_snapshot(cache, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", {"model_type": "clip_text_model"})
    hub_snapshot(cache, "openai/clip-vit-base-patch16", "[" * 100_000)
    assert find_clip("some/model", cache) == small
    large = hub_snapshot(users, "openai/clip-vit-large-patch14", BOTH)
    assert find_clip("some/model", cache) == large
    own = cache / "clip"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(BOTH))
    (own / "model.safetensors").write_bytes(b"")
    assert find_clip("some/model", cache) == own
    assert find_clip("embedded", cache) in (None, scores.EMBEDDED / "clip"), "a CLIP of photos judges no drawings"


def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch, clip_folder) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "users"))
    lines: list[str] = []
    assert load_clip("some/model", tmp_path, lines.append) is None
    assert "no CLIP with an image tower" in lines[0]
    folder = save_clip(tmp_path / "clip")
    assert load_clip("some/model", tmp_path, lines.append) is not None
    assert len(lines) == 1
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert load_clip("some/model", tmp_path, lines.append) is None
    (folder / "model.safetensors").unlink()
    os.link(clip_folder / "model.safetensors", folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3  # its weights are not in the file
    (folder / "config.json").write_text(json.dumps(config))
    assert load_clip("some/model", tmp_path, lines.append) is None
    assert "missing" in lines[-1]
    assert all("\n" not in line for line in lines)


# --- the best ------------------------------------------------------------------------------------------------------------


def noted(validation: dict[int, float] | None = None, clip: dict[int, tuple] | None = None) -> History:
    history = History(None)
    for step, loss in (validation or {}).items():
        history.add("validation", step, loss=loss)
    for step, (clip_i, clip_t) in (clip or {}).items():
        history.add("score", step, clip_i=clip_i, clip_t=clip_t)
    return history


def test_balance_by_hand() -> None:
    assert balance(Score(0.8, 0.3), None) == pytest.approx(math.sqrt(0.24))
    assert balance(Score(0.9, 0.2), Score(0.6, 0.3)) == pytest.approx(1.0)  # half more of one, a third less of the other
    assert balance(Score(0.6, 0.3), Score(0.6, 0.3)) == pytest.approx(1.0)
    assert balance(Score(None, 0.3), None) is None
    assert balance(Score(-0.5, 0.3), None) == pytest.approx(math.sqrt(0.01 * 0.3))


def test_the_order_does_not_depend_on_the_base() -> None:
    found = numpy.random.default_rng(0).uniform(0.05, 1, (20, 2))
    orders = [
        sorted(range(20), key=lambda index, base=base: balance(Score(*found[index]), base))
        for base in (None, Score(0.6, 0.3), Score(0.1, 0.9))
    ]
    assert orders[0] == orders[1] == orders[2]


def test_scores_come_before_validation_and_validation_before_the_last() -> None:
    clip = {0: (0.6, 0.31), 100: (0.7, 0.30), 200: (0.8, 0.29), 300: (0.85, 0.2)}
    losses = {0: 0.5, 100: 0.3, 200: 0.35, 300: 0.4}
    best = choose_best(noted(losses, clip), [100, 200, 300])
    assert best.step == 200
    assert "CLIP" in best.reason
    assert "base model: 1" in best.reason
    best = choose_best(noted(losses), [100, 200, 300])
    assert best == Best(100, "lowest validation loss, 0.3")
    best = choose_best(noted(), [100, 200, 300])
    assert best.step == 300
    assert "not a judgement" in best.reason
    assert choose_best(noted(losses, clip), []) is None


def test_pictures_that_were_drawn_otherwise_are_not_compared() -> None:
    """After a resume with other sample prompts: neither checkpoints nor the base of before."""
    history = History(None)
    for step, clip_i, prompts in ((0, 0.5, ["a"]), (100, 0.9, ["a"]), (200, 0.6, ["b"]), (300, 0.7, ["b"])):
        history.add("score", step, clip_i=clip_i, clip_t=0.3, drawn={"prompts": prompts, "seed": 42})
    best = choose_best(history, [100, 200, 300])
    assert best.step == 300
    assert "base" not in best.reason
    older = noted(clip={0: (0.5, 0.3), 100: (0.9, 0.3)})  # of a version that did not say how it drew
    older.add("score", 200, clip_i=0.6, clip_t=0.3, drawn={"prompts": ["a"], "seed": 42})
    assert choose_best(older, [100, 200]).step == 100


def test_of_equals_the_earliest_and_only_what_was_saved() -> None:
    assert choose_best(noted({100: 0.3, 200: 0.3, 300: 0.4}), [300, 200, 100]).step == 100
    assert choose_best(noted({100: 0.1, 200: 0.3, 300: 0.4}), [200, 300]).step == 200
    assert choose_best(noted({0: 0.01, 100: 0.3}), [100]).step == 100, "the base model is no checkpoint"


def test_a_checkpoint_has_the_newest_number_up_to_it() -> None:
    losses = {50: 0.1, 100: 0.5, 150: 0.2, 220: 0.05}
    assert choose_best(noted(losses), [100, 200, 300]).step == 300
    assert choose_best(noted(losses), [100, 200]).step == 200


def test_numbers_that_are_none_are_passed_over() -> None:
    history = noted({100: float("nan"), 200: 0.5}, {0: (None, None), 100: (None, 0.3)})
    assert choose_best(history, [100, 200]) == Best(200, "lowest validation loss, 0.5")


def test_a_trigger_is_a_word_of_its_own() -> None:
    prompts = ["a cat on a roof", "a scattered crowd", "a CAT, sitting", "a bobcat"]
    assert shows_subject(prompts, "cat") == [True, False, True, False]
    assert shows_subject(["a photo of sks  dog", "a dog"], "sks dog") == [True, False]
    assert shows_subject(prompts, "sks") == shows_subject(prompts, None) == [True] * 4
