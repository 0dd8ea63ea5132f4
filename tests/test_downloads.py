"""Downloads against a hub on the loopback interface: what is fetched, what a broken line leaves behind, what is said."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

try:
    import httpx2 as httpx
except ImportError:  # huggingface_hub 1, the newest for Python 3.10
    import httpx

from src.downloads import REFERENCE_REPOSITORIES, download_model, download_tokenizer, download_vae
from src.errors import ExitCode, UserError
from src.model_source import resolve, resolve_vae
from tests.hub_server import COMMIT, Hub, serve
from tests.tiny.model_folders import CHECKER, SD1, SDXL, refusal

ID = "owner/name"
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "safety_checker": "model",
}


def repository(
    parts: dict, pipeline: str = "StableDiffusionPipeline", dots: tuple[str, ...] = ("", ".fp16"), suffix: str = ".safetensors"
) -> dict[str, bytes]:
    """A repository as they are found: several formats of the same weights, and files that nobody here needs."""
    generator = random.Random(0)
    files = {
        "model_index.json": json.dumps({"_class_name": pipeline, **parts}).encode(),
        "README.md": b"#",
        ".gitattributes": b"*",
    }
    files |= {"v1-5-pruned.safetensors": generator.randbytes(500), "v1-5-pruned.ckpt": b"pickle", "script.py": b"print()"}
    for name in (name for name, value in parts.items() if isinstance(value, list) and value[1]):
        stem = WEIGHTS.get(name.removesuffix("_2"))
        if stem:
            files[f"{name}/config.json"] = json.dumps({"_class_name": parts[name][1]}).encode()
            files |= {f"{name}/{stem}{dot}{suffix}": generator.randbytes(700) for dot in dots}
            files |= {f"{name}/{stem}.{other}": b"x" for other in ("bin", "fp16.bin", "msgpack", "onnx", "non_ema.safetensors")}
            files |= {f"{name}/openvino_model.{other}": b"x" for other in ("xml", "bin")}
        elif name.startswith("tokenizer"):
            files |= {
                f"{name}/{file}": generator.randbytes(90) for file in ("vocab.json", "merges.txt", "tokenizer_config.json")
            }
        else:
            config = "scheduler_config.json" if name == "scheduler" else "preprocessor_config.json"
            files[f"{name}/{config}"] = name.encode()
    return files


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with one model, reached through HF_ENDPOINT; no other cache, no waiting between tries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it was read when the hub was imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 64)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serve({ID: repository({**SD1, **CHECKER})}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def needed(files: dict[str, bytes], dot: str, *without: str) -> dict[str, bytes]:
    """What is used of a repository: its index, the configurations, one variant of the safetensors weights."""
    weights = {f"{part}/{stem}{dot}.safetensors" for part, stem in WEIGHTS.items()}
    configs = {name for name in files if "/" in name and name.endswith((".json", ".txt"))}
    wanted = {"model_index.json"} | {name for name in weights | configs if name.partition("/")[0] not in without}
    return {name: files[name] for name in wanted if name in files}


@pytest.mark.parametrize(("precision", "dot"), [("fp16", ".fp16"), ("bf16", ".fp16"), ("fp32", "")])
def test_only_what_is_used_is_fetched(hub, precision, dot):
    folder = download_model(ID, Path("cache"), precision=precision)
    assert contents(folder) == needed(hub.repositories[ID], dot)
    assert hub.fetched() == set(needed(hub.repositories[ID], dot))


def test_the_safety_checker_is_not_fetched_when_it_is_not_used(hub):
    folder = download_model(ID, Path("cache"), include_safety_checker=False)
    assert contents(folder) == needed(hub.repositories[ID], ".fp16", "safety_checker", "feature_extractor")
    assert resolve(ID, Path("cache"), offline=True, include_safety_checker=False).path.samefile(folder)
    assert resolve(ID, Path("cache"), offline=False).path is None  # with the checker it is not whole
    assert contents(download_model(ID, Path("cache"))) == needed(hub.repositories[ID], ".fp16")


def test_full_precision_where_no_other_is_published(hub):
    hub.repositories[ID] = repository(SD1, dots=("",))
    assert contents(download_model(ID, Path("cache"))) == needed(hub.repositories[ID], "")


def test_fetched_once_then_found_offline(hub):
    folder = download_model(ID, Path("cache"))
    hub.asked.clear()
    assert resolve(ID, Path("cache"), offline=True).path.samefile(folder)
    assert not hub.asked
    download_model(ID, Path("cache"))
    assert not hub.fetched()  # a second download finds all files there


def test_a_revision_is_fetched_under_its_name(hub):
    hub.revisions = (*hub.revisions, "fp16")
    folder = download_model(ID, Path("cache"), "fp16")
    assert resolve(ID, Path("cache"), offline=True, revision="fp16").path.samefile(folder)
    assert resolve(ID, Path("cache"), offline=True, revision=COMMIT).path.samefile(folder)
    refusal(ExitCode.NOT_FOUND, resolve, ID, Path("cache"), offline=True)


def test_sdxl_and_shards(hub):
    files = repository(SDXL, "StableDiffusionXLPipeline")
    stem = "unet/diffusion_pytorch_model"
    whole = files.pop(f"{stem}.fp16.safetensors")
    shards = {f"{stem}.fp16-0000{i + 1}-of-00002.safetensors": whole[350 * i :][:350] for i in range(2)}
    hub.repositories[ID] = files | shards | {f"{stem}.safetensors.index.fp16.json": b"{}"}
    fetched = set(contents(download_model(ID, Path("cache"))))
    assert {
        *shards,
        f"{stem}.safetensors.index.fp16.json",
        "text_encoder_2/model.fp16.safetensors",
        "tokenizer_2/vocab.json",
    } <= fetched
    assert f"{stem}.safetensors" not in fetched


# -- a broken line


def test_a_short_cut_is_mended_without_a_word(hub, capfd):
    hub.drop_at = 300
    assert contents(download_model(ID, Path("cache"), progress=False)) == needed(hub.repositories[ID], ".fp16")
    assert "bytes=256-" in {wanted for _, _, wanted in hub.asked}  # the last whole chunk before byte 300
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("cut_at", [0, 1, 2, 699, *random.Random(1).sample(range(3, 699), 20)])
def test_a_cut_leaves_nothing_that_looks_whole_and_a_second_try_completes(hub, cut_at):
    hub.cut_at = cut_at
    message = refusal(ExitCode.FAILURE, download_model, ID, Path("cache"), progress=False)
    assert "run the same command again, finished files are kept" in message
    original = hub.repositories[ID]
    kept = contents(Path("cache/models--owner--name/snapshots"))
    assert all(original[name.partition("/")[2]] == data for name, data in kept.items())
    assert resolve(ID, Path("cache"), offline=False).path is None
    hub.cut_at, hub.is_down = None, False
    hub.asked.clear()
    folder = download_model(ID, Path("cache"), progress=False)
    assert contents(folder) == needed(original, ".fp16")
    assert not hub.fetched() & {name.partition("/")[2] for name in kept}
    assert not list(Path("cache").rglob("*.incomplete"))


def test_a_wrong_length_and_a_stall_are_said(hub):
    hub.missing_bytes = 5
    assert "wrong length" in refusal(ExitCode.FAILURE, download_model, ID, Path("cache"), progress=False)
    hub.missing_bytes, hub.stall = 0, True
    assert "run the same command again" in refusal(ExitCode.FAILURE, download_model, ID, Path("cache"), progress=False)
    hub.stall = False
    assert contents(download_model(ID, Path("cache"), progress=False)) == needed(hub.repositories[ID], ".fp16")


# -- refusals


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "said"),
    [
        (404, "RepoNotFound", ExitCode.NOT_FOUND, "check the spelling"),
        (401, "RepoNotFound", ExitCode.NOT_FOUND, "check the spelling"),
        (401, "GatedRepo", ExitCode.REFUSED, "accept it at {page} and set HF_TOKEN"),
        (403, "GatedRepo", ExitCode.REFUSED, "accept it at {page} and set HF_TOKEN"),
        (403, "", ExitCode.REFUSED, "accept the licence at {page} and set HF_TOKEN"),
        (401, "", ExitCode.REFUSED, "HF_TOKEN"),
        (503, "", ExitCode.FAILURE, "answered 503"),
        (429, "", ExitCode.FAILURE, "answered 429"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(hub, status, code, exit_code, said):
    hub.refusals[ID] = (status, code)
    message = refusal(exit_code, download_model, ID, Path("cache"))
    assert message.startswith(f"{ID}: ")
    assert said.format(page=f"{hub.endpoint}/{ID}") in message


def test_no_network(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refusal(ExitCode.FAILURE, download_model, ID, Path("cache"))
    assert "no connection to http://127.0.0.1:9; check the network" in message


def test_offline_by_the_hubs_own_variable(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(ExitCode.NOT_FOUND, download_model, ID, Path("cache"))
    assert not hub.asked


def test_an_endpoint_that_is_no_hub(hub, monkeypatch):
    monkeypatch.setattr("tests.hub_server.json.dumps", lambda listing: "<html>")
    assert "check HF_ENDPOINT" in refusal(ExitCode.FAILURE, download_model, ID, Path("cache"))


def test_repositories_that_are_no_model(hub):
    assert "no revision 'v9'" in refusal(ExitCode.NOT_FOUND, download_model, ID, Path("cache"), "v9")
    hub.repositories["owner/files"] = {"model.safetensors": b"x"}
    assert "is no diffusers model" in refusal(ExitCode.REFUSED, download_model, "owner/files", Path("cache"))
    hub.repositories["owner/pickled"] = repository(SD1, suffix=".bin")
    assert "pickled" in refusal(ExitCode.REFUSED, download_model, "owner/pickled", Path("cache"))
    hub.repositories["owner/flux"] = repository(SD1, "FluxPipeline")
    assert "FluxPipeline" in refusal(ExitCode.REFUSED, download_model, "owner/flux", Path("cache"))
    assert not any(name.endswith((".safetensors", ".bin", ".py")) for name in hub.fetched())
    assert "owner/name" in refusal(ExitCode.USAGE, download_model, "no name!", Path("cache"))


def test_a_disk_that_is_too_full_is_known_before(hub, monkeypatch):
    monkeypatch.setattr("src.downloads.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    message = refusal(ExitCode.FAILURE, download_model, ID, Path("new/cache"))
    assert "too full: 0.0 GB to fetch, 0.0 GB free" in message
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be written")],
)
def test_what_the_disk_answers_is_said_in_one_line(hub, monkeypatch, number, said):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", fail)
    assert said in refusal(ExitCode.FAILURE, download_model, ID, Path("cache"))


def test_a_bug_is_not_explained_away(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download_model(ID, Path("cache"))


def test_every_exception_of_the_http_library_is_known():
    from src.downloads import _explain

    request = httpx.Request("GET", "http://x")
    kinds = [kind for kind in vars(httpx).values() if isinstance(kind, type) and issubclass(kind, httpx.RequestError)]
    assert len(kinds) > 10
    for kind in kinds:
        told = _explain(kind("x", request=request), ID, None, "http://x", Path("c"))
        assert isinstance(told, UserError)


# -- VAE and tokenizer


def test_a_vae_alone(hub):
    config = json.dumps({"_class_name": "AutoencoderKL"}).encode()
    files = {
        "config.json": config,
        "diffusion_pytorch_model.safetensors": b"1",
        "diffusion_pytorch_model.bin": b"2",
        "sdxl_vae.safetensors": b"3",
    }
    hub.repositories["owner/vae"] = files
    folder = download_vae("owner/vae", Path("cache"))
    assert contents(folder) == {name: files[name] for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert resolve_vae("owner/vae", Path("cache"), offline=True).path.samefile(folder)
    hub.repositories["owner/clip"] = files | {"config.json": b'{"_class_name": "CLIPModel"}'}
    assert "CLIPModel" in refusal(ExitCode.REFUSED, download_vae, "owner/clip", Path("cache"))


def test_the_tokenizer_of_a_family(hub):
    reference = REFERENCE_REPOSITORIES["SDXL"]
    hub.repositories[reference] = repository(SDXL, "StableDiffusionXLPipeline")
    assert reference in refusal(ExitCode.NOT_FOUND, download_tokenizer, "SDXL", Path("cache"), offline=True)
    folder = download_tokenizer("SDXL", Path("cache"))
    assert {name.partition("/")[0] for name in contents(folder)} == {"model_index.json", "tokenizer", "tokenizer_2"}
    hub.asked.clear()
    assert download_tokenizer("SDXL", Path("cache"), offline=True).samefile(folder)
    assert not hub.asked


# -- what is shown


def test_a_bar_with_bytes_rate_and_time_on_a_terminal_only(hub, monkeypatch, capfd):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    download_model(ID, Path("cache"))
    last = screen.getvalue().strip().rpartition("\r")[2]
    fetched = needed(hub.repositories[ID], ".fp16")
    del fetched["model_index.json"]  # it came before, to know what is needed
    size = f"{sum(map(len, fetched.values())) / 1000:.2f}k"
    assert re.fullmatch(rf"{ID}: 100%\S*\|\s*{size}/{size} \[\d\d:\d\d<\d\d:\d\d, +[\d.]+k?B/s\]", last)
    assert screen.getvalue().count("\n") == 1  # one bar, not the hub's three

    piped = io.StringIO()
    monkeypatch.setattr(sys, "stderr", piped)
    download_model(ID, Path("other"))
    assert piped.getvalue() == ""
