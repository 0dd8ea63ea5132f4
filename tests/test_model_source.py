"""What a model name means, and which folders and files are a model: on small hand-made folders, without torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src import model_source
from src.config import ModelConfig
from src.errors import ExitCode
from src.model_files import check_folder, family_of
from src.model_source import EMBEDDED, Source, resolve, user_cache
from tests.tiny.model_folders import COMMIT, cached, model, refusal, safetensors, write


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with no Hugging Face cache of the user, and the network allowed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return tmp_path


# -- names


def test_embedded_is_the_shipped_model_and_whole(here):
    assert resolve("embedded", Path("c"), offline=True) == Source("folder", EMBEDDED, "embedded")
    check_folder(EMBEDDED)
    assert family_of(EMBEDDED) == "SD1"


@pytest.mark.parametrize("text", ["my model", "./my model", "my model/", "../here/my model", "~/my model"])
def test_a_folder_is_found_however_it_is_spelled(tmp_path, monkeypatch, text):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    model(tmp_path / "here" / "my model")
    source = resolve(text, Path("c"), offline=True)
    assert (source.kind, source.name) == ("folder", "my model")
    assert source.path.samefile(tmp_path / "here" / "my model")


def test_names_hold_no_folder(here):
    model(here / "secret" / "client" / "portraits")
    safetensors(here / "secret" / "v1-5.safetensors", {"a": (1,)})
    assert resolve(str(here / "secret/client/portraits"), Path("c"), offline=True).name == "portraits"
    assert resolve("secret/v1-5.safetensors", Path("c"), offline=True) == Source(
        "file", Path("secret/v1-5.safetensors"), "v1-5"
    )


@pytest.mark.parametrize(
    ("model_id", "idle"),
    [
        ("embedded", ["revision", "architecture"]),
        ("./mine", ["revision", "architecture"]),
        ("owner/name", ["architecture"]),
        ("one.safetensors", ["revision"]),
    ],
)
def test_a_setting_that_this_kind_of_model_has_no_use_for_is_said(here, model_id: str, idle: list[str]):
    """A commit is the hub's; configurations from elsewhere are for a single file, which brings none."""
    model(here / "mine")
    safetensors(here / "one.safetensors", {"a": (1,)})
    lines = model_source.idle_settings(ModelConfig(model_id=model_id, revision="main", architecture="sd15"))
    assert [line.split(" does nothing: ")[0] for line in lines] == [f"the {name}" for name in idle]
    assert model_source.idle_settings(ModelConfig(model_id=model_id)) == []


def test_a_local_folder_wins_over_the_hub(here):
    model(here / "owner" / "name")
    assert resolve("owner/name", Path("c"), offline=False).kind == "folder"


@pytest.mark.parametrize(
    "text",
    [
        "models/sd51",
        "./nothing",
        "/nothing/there",
        "~/nothing",
        "C:\\models\\sd15",
        "C:/x",
        "a\\b",
        "x.safetensors",
        "a/b/c",
        "../x/y",
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_network(here, text):
    (here / "models").mkdir()
    assert "no such file or folder" in refusal(ExitCode.NOT_FOUND, resolve, text, Path("c"), offline=False)


def test_the_nearest_name_is_offered(here):
    model(here / "models" / "sd15")
    assert "did you mean 'models/sd15'" in refusal(ExitCode.NOT_FOUND, resolve, "models/sd51", Path("c"), offline=False)
    assert "did you mean 'models'" in refusal(ExitCode.NOT_FOUND, resolve, "./modles/sd15", Path("c"), offline=False)


def test_of_a_folder_only_models_are_listed_and_a_next_step_is_given(here):
    for clutter in ("models/notes.txt", "models/outputs/x.png", "models/.hidden/model_index.json", "h.py"):
        write(here / clutter)
    message = refusal(ExitCode.NOT_FOUND, resolve, "./zzz", Path("c"), offline=False)
    assert message == "./zzz: no such file or folder; check the path, or name a hub id such as owner/name"
    model(here / "models" / "sd15")
    write(here / "models" / "v1-5.safetensors")
    message = refusal(ExitCode.NOT_FOUND, resolve, "models/turbo", Path("c"), offline=False)
    assert "; 'models' holds sd15, v1-5.safetensors; check the path, or name a hub id such as owner/name" in message
    assert "did you mean" not in refusal(ExitCode.NOT_FOUND, resolve, "models/notes.text", Path("c"), offline=False)


@pytest.mark.parametrize("text", ["", " ", "embeded", "no-such-preset", "sd 15"])
def test_a_bare_word_is_neither_path_nor_hub_id(here, text):
    message = refusal(ExitCode.NOT_FOUND, resolve, text, Path("c"), offline=False)
    assert "presets are chosen with --model NAME or --config NAME" in message
    assert ("did you mean 'embedded'" in message) == (text == "embeded")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickles_are_refused_with_a_way_out(here, suffix):
    (here / f"model{suffix}").write_bytes(b"\x80\x04.")
    assert "safetensors/convert" in refusal(ExitCode.REFUSED, resolve, f"model{suffix}", Path("c"), offline=True)


def test_other_files_are_refused(here):
    write(here / "model.txt")
    assert ".safetensors" in refusal(ExitCode.REFUSED, resolve, "model.txt", Path("c"), offline=True)


# -- hub ids and caches


def test_a_hub_id_is_looked_for_in_our_cache_then_in_the_users(here):
    assert resolve("owner/name", Path("c"), offline=False) == Source("hub", None, "owner/name")
    theirs = cached(here / "user-cache", "owner/name")
    assert resolve("owner/name", Path("c"), offline=True) == Source("hub", theirs, "owner/name")
    ours = cached(Path("c"), "owner/name")
    assert resolve("owner/name", Path("c"), offline=True) == Source("hub", ours, "owner/name")


def test_a_revision_is_a_branch_or_a_commit_of_its_own(here):
    snapshot = cached(Path("c"), "owner/name")
    assert resolve("owner/name", Path("c"), offline=True, revision=COMMIT).path == snapshot
    for other in ("fp16", "f" * 40, "../../x"):
        refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("c"), offline=True, revision=other)
        assert resolve("owner/name", Path("c"), offline=False, revision=other).path is None


@pytest.mark.parametrize(
    "missing",
    ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
     "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_a_partial_download_is_no_model(here, missing):
    (cached(Path("c"), "owner/name") / missing).unlink()
    assert resolve("owner/name", Path("c"), offline=False).path is None
    message = refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("c"), offline=True)
    assert "only partly in c" in message
    assert missing.partition("/")[0] in message
    assert "run once without --offline" in message


def test_offline_says_what_to_do(here, monkeypatch):
    message = refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("models/cache"), offline=True)
    assert message == "owner/name: not in models/cache; run once without --offline"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "without HF_HUB_OFFLINE" in refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("c"), offline=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_users_cache_is_where_huggingface_hub_has_it(monkeypatch, variables, expected):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert user_cache() == Path(expected)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no such hint on this system")
def test_the_weights_that_will_be_loaded_are_read_ahead(tmp_path, monkeypatch) -> None:
    model = tmp_path / "model"
    for name in ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model.fp16", "vae/diffusion_pytorch_model", "other/x"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / f"{name}.safetensors").write_bytes(b"12345")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]))
    source = Source("folder", model, "model")
    half = model_source.start_reading(source, in_half_precision=True)
    assert [path.name for path in half] == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    full = model_source.start_reading(source, in_half_precision=False)
    assert [path.name for path in full] == ["diffusion_pytorch_model.safetensors"] * 2
    assert asked == [(0, 0, os.POSIX_FADV_WILLNEED)] * 4
    assert model_source.start_reading(Source("hub", None, "a/b"), in_half_precision=True) == []
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "model.safetensors").write_bytes(b"1")
    cached = Source("hub", model, "a/b")
    assert len(model_source.start_reading(cached, in_half_precision=True)) == 3
    assert len(model_source.start_reading(cached, in_half_precision=True, include_safety_checker=False)) == 2
