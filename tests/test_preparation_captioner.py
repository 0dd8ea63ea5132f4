"""Captions by a BLIP on disk: a tiny random one, against transformers used by hand. Nothing is downloaded."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from src.errors import ExitCode, UserError
from src.preparation import captioner, contact_sheet
from src.preparation.captioner import Blip, find_captioner
from src.preparation.preparing import prepare
from src.preparation.settings import PrepareConfig
from src.terminal import Terminal
from tests.tiny.photos import photo, photo_folder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "dog", "cat", "on", "the", "sofa", "red", "blue"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    ends = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(2)
    config = BlipConfig(
        text_config={**small, **ends, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 64},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():  # large weights: the words depend on the picture; and no end before some words
        for parameter in model.parameters():
            parameter.mul_(30 if parameter.dim() > 1 else 1)
        model.text_decoder.cls.predictions.bias[:7] -= 1e4
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def by_hand(folder, picture):
    processor, model = BlipProcessor.from_pretrained(folder), BlipForConditionalGeneration.from_pretrained(folder).eval()
    inputs = processor(images=picture, return_tensors="pt")
    tokens = model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=40)
    return " ".join(processor.decode(tokens[0], skip_special_tokens=True).split())


def test_it_says_what_transformers_says_by_hand(blip, tmp_path):
    pictures = [photo(seed, 64, 64) for seed in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    said = Blip(blip).describe([tmp_path / f"{number}.png" for number in range(4)])
    assert said == [by_hand(blip, picture) for picture in pictures]
    assert all(said)


def run(src, dst, blip, **changes):
    known = {"size": 64, "caption": "blip", "captioner": str(blip), "workers": 1, **changes}
    return prepare(PrepareConfig(src=str(src), dst=str(dst), **known), Terminal())


@pytest.fixture
def _no_report(monkeypatch):
    monkeypatch.setattr(contact_sheet, "write_report", lambda *args: b"report")


@pytest.mark.usefixtures("_no_report")
def test_pictures_without_a_caption_get_one_and_the_others_keep_theirs(blip, tmp_path):
    src = photo_folder(tmp_path / "src", 3)
    (src / "b.txt").write_text("mine")
    outcome = run(src, tmp_path / "dst", blip, trigger="sks")
    assert [item.caption_from for item in outcome.prepared] == [str(blip), "b.txt", str(blip)]
    assert outcome.prepared[1].captions == ("sks, mine",)
    assert all(item.captions[0].startswith("sks, ") for item in outcome.prepared)
    assert outcome.skipped == ()


@pytest.mark.usefixtures("_no_report")
def test_no_picture_is_described_twice(blip, tmp_path, monkeypatch):
    src = photo_folder(tmp_path / "src", 3)
    first = run(src, tmp_path / "dst", blip)
    photo(50).save(src / "new.png")
    described = []
    real = Blip.describe
    monkeypatch.setattr(Blip, "describe", lambda self, paths: described.append(len(paths)) or real(self, paths))
    again = run(src, tmp_path / "dst", blip, trigger="sks")
    assert described == [1]
    assert [f"sks, {item.captions[0]}" for item in first.prepared] == [item.captions[0] for item in again.prepared[:3]]


@pytest.mark.usefixtures("_no_report")
def test_a_killed_run_keeps_what_was_said(blip, tmp_path, monkeypatch):
    src = photo_folder(tmp_path / "src", 6)
    real = Blip.describe

    def describe(self, paths):
        if len(paths) == 2:
            raise KeyboardInterrupt
        return real(self, paths)

    monkeypatch.setattr(Blip, "describe", describe)
    with pytest.raises(KeyboardInterrupt):
        run(src, tmp_path / "dst", blip)
    asked = []
    monkeypatch.setattr(Blip, "describe", lambda self, paths: asked.append(len(paths)) or real(self, paths))
    run(src, tmp_path / "dst", blip)
    assert asked == [2]


@pytest.mark.usefixtures("_no_report")
def test_a_captioner_without_words_leaves_the_picture_out(blip, tmp_path, monkeypatch):
    src = photo_folder(tmp_path / "src", 2)
    monkeypatch.setattr(Blip, "describe", lambda self, paths: ["a dog", ""][-len(paths) :])  # the second is asked again
    outcome = run(src, tmp_path / "dst", blip)
    assert [(skip.source, skip.kind) for skip in outcome.skipped] == [("b.png", "no caption")]
    outcome = run(src, tmp_path / "dst", blip, caption_prefix=("masterpiece",))
    assert [(skip.source, skip.kind) for skip in outcome.skipped] == [("b.png", "no caption")]
    outcome = run(src, tmp_path / "dst", blip, trigger="sks dog")
    assert [(item.captions, item.caption_from) for item in outcome.prepared] == [
        (("sks dog, a dog",), str(blip)), (("a photo of sks dog",), "template"),
    ]  # fmt: skip


def test_the_model_is_found_in_a_cache(blip, tmp_path, monkeypatch):
    commit = "0" * 40
    storage = tmp_path / "models--Salesforce--blip-image-captioning-base"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs/main").write_text(commit)
    (storage / "snapshots").mkdir()
    (storage / "snapshots" / commit).symlink_to(blip)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_captioner(PrepareConfig())[1].resolve() == blip.resolve()


def test_what_is_not_there_or_no_blip_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_captioner(PrepareConfig())
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert captioner.DEFAULT_MODEL in str(caught.value)
    folder = tmp_path / "model"
    folder.mkdir()
    for content, part in (
        ("{}", "says none"),
        ('{"model_type": "clip"}', "says clip"),
        ('{"model_type": "blip"}', "safetensors"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=part) as caught:
            find_captioner(PrepareConfig(captioner=str(folder)))
        assert caught.value.exit_code == ExitCode.REFUSED
        assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="says none"):
        find_captioner(PrepareConfig(captioner=str(folder)))


@pytest.mark.usefixtures("_no_report")
def test_no_words_for_any_picture_is_refused(blip, tmp_path, monkeypatch):
    src = photo_folder(tmp_path / "src", 2)
    monkeypatch.setattr(Blip, "describe", lambda self, paths: [""] * len(paths))
    with pytest.raises(UserError, match=r"no picture is left \(2 no caption"):
        run(src, tmp_path / "dst", blip)
