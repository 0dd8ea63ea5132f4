"""What a model name means: the embedded model, a folder, a single file or a hub id. Decided on disk, without torch.

A path is looked for before anything else. What looks like a path but is not there is an error and never a hub id, so a
typing mistake does not go to the network. A hub id is looked for in ``models/cache``, then in the user's own Hugging
Face cache (which is only read), and counts as found when every component is whole.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src.config import ModelConfig, preset_names
from src.errors import ExitCode, UserError, not_found, refused
from src.model_files import CLASSES, EMBEDDED, OF_SAFETY_CHECKER, WEIGHT_STEMS, check_folder, select_weights, vae_folder
from src.tensor_files import quoted, refuse_pickle

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".gguf", ".onnx")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is. ``path`` is None when it must be downloaded first; ``name`` holds no folder and may be published."""

    kind: Literal["folder", "file", "hub"]
    path: Path | None
    name: str


def resolve(
    model_id: str, cache: Path, offline: bool, *, revision: str | None = None, include_safety_checker: bool = True
) -> Source:
    """Find a model on disk. Only a hub id that is whole in no cache is left to download (``path`` None).

    Raises UserError: not found (with the nearest name), or refused for a folder or file that is there but unusable.
    """
    if model_id == "embedded":
        return Source("folder", EMBEDDED, "embedded")
    return _resolve(model_id, cache, offline, revision, lambda folder: check_folder(folder, include_safety_checker))


def resolve_vae(vae: str, cache: Path, offline: bool) -> Source:
    """Find a VAE as ``resolve`` finds a model: a folder (its own, or a model's with a ``vae`` inside), a file or a hub id."""
    return _resolve(vae, cache, offline, None, vae_folder)


def files_of(model_id: str) -> list[Path]:
    """What decides how a model of this disk draws: its file, or its folder's weights, configurations and vocabularies.

    Empty for one of the hub, where name and revision say it. The safety checker is left out.
    """
    path = _place(model_id)
    if not path.is_dir():
        return [path] if path.is_file() else []
    parts = [_component_files(name, path / name) for name in CLASSES if name not in OF_SAFETY_CHECKER]
    return [*path.glob("model_index.json"), *(file for part in parts for file in part)]


def vae_files_of(vae: str) -> list[Path]:
    """The same of a VAE: a file, its own folder, or a model's with a ``vae`` inside."""
    path = _place(vae)
    if not path.is_dir():
        return [path] if path.is_file() else []
    return _component_files("vae", path / "vae" if (path / "vae").is_dir() else path)


def idle_settings(model: ModelConfig) -> list[str]:
    """A line for each setting that this kind of model has no use for."""
    path, lines = _place(model.model_id), []
    if model.revision and path.exists():
        lines.append(f"the revision does nothing: {model.model_id} lies on this disk, and only the hub has revisions")
    if model.architecture and not path.is_file():
        lines.append(f"the architecture does nothing: {model.model_id} is no single file, and brings configurations of its own")
    return lines


def start_reading(source: Source, in_half_precision: bool, include_safety_checker: bool = True) -> list[Path]:
    """Let the system read a model's weights from the disk while this process does other things; returns the files.

    They are read once more, from memory then. Where the system takes no such hint, nothing is done.
    """
    if source.path is None or not hasattr(os, "posix_fadvise"):
        return []
    files = [source.path]
    if source.path.is_dir():
        wanted = {source.path / name for name in WEIGHT_STEMS if include_safety_checker or name not in OF_SAFETY_CHECKER}
        folders = {path.parent for path in source.path.glob("*/*.safetensors")} & wanted
        chosen = {folder: select_weights(folder.name, os.listdir(folder), in_half_precision)[0] for folder in sorted(folders)}
        files = [folder / name for folder, names in chosen.items() for name in names]
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return files


def is_offline(offline: bool) -> bool:
    """Whether the network is forbidden, by us or by huggingface_hub's own variable."""
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def cached_snapshot(model_id: str, cache: Path, revision: str | None = None) -> Path | None:
    """The folder of a hub model in a Hugging Face cache, complete or not; None if it was never fetched there."""
    storage = cache / f"models--{model_id.replace('/', '--')}"
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (storage / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    snapshot = storage / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def is_embedded(model_id: str) -> bool:
    """Whether a model's name or folder is the embedded model; another folder of that name is not."""
    if model_id in ("", "embedded"):
        return model_id == "embedded"
    return os.path.realpath(os.path.expanduser(model_id)) == os.path.realpath(EMBEDDED)


def user_cache() -> Path:
    """The user's ordinary Hugging Face cache, found by the variables and in the order of huggingface_hub."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def _place(name: str) -> Path:
    """Where a model or VAE of that name lies, if it is a path or the embedded model."""
    return EMBEDDED if name == "embedded" else Path(os.path.expanduser(name))


def _component_files(component: str, folder: Path) -> list[Path]:
    names, weights = os.listdir(folder) if folder.is_dir() else [], set()
    if component in WEIGHT_STEMS:  # in full and in half precision: which of them is loaded is the machine's affair
        weights = {name for half in (True, False) for name in select_weights(component, names, half)[0]}
    return sorted(folder / name for name in names if name in weights or name.endswith((".json", ".txt")))


def _resolve(model_id: str, cache: Path, offline: bool, revision: str | None, check: Callable[[Path], object]) -> Source:
    path = Path(os.path.expanduser(model_id))
    if model_id.strip() and os.path.isdir(path):
        check(path)
        return Source("folder", path, path.resolve().name)
    refuse_pickle(path)
    if os.path.isfile(path):
        if path.suffix.lower() != ".safetensors":
            raise refused(f"{model_id}: is no .safetensors file, the one weight format that is read; take that version")
        return Source("file", path, path.stem)
    if _looks_like_path(model_id):
        raise _path_not_found(model_id, path)
    if _HUB_ID.fullmatch(model_id):
        return _resolve_hub_id(model_id, cache, offline, revision, check)
    close = difflib.get_close_matches(model_id, ["embedded", *preset_names()], n=1)
    guess = "it is a preset" if model_id in preset_names() else f"did you mean '{close[0]}'" if close else ""
    raise not_found(
        f"{quoted(model_id)}: neither a file, nor a folder, nor a hub id such as owner/name{'; ' * bool(guess)}{guess}; "
        "presets are chosen with --model NAME or --config NAME"
    )


def _looks_like_path(text: str) -> bool:
    first, slash, _ = text.partition("/")
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or re.match(r"[A-Za-z]:", text) is not None
        or text.lower().endswith(_FILE_SUFFIXES)
        or text.count("/") > 1
        or (bool(slash) and os.path.isdir(first))
    )


def _path_not_found(text: str, path: Path) -> UserError:
    """Say how far the path exists, and what lies there that is spelled alike or could be meant."""
    child, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        child, parent = parent, parent.parent
    entries = [entry for entry in sorted(parent.glob("*")) if not entry.name.startswith(".")]
    files = [entry.name for entry in entries if entry.suffix == ".safetensors"]
    folders = [entry.name for entry in entries if os.path.isdir(entry)]
    close = difflib.get_close_matches(child.name, files + folders, n=1, cutoff=0.5)
    if close:
        return not_found(f"{text}: no such file or folder; did you mean '{parent / close[0]}'?")
    models = [name for name in folders if os.path.isfile(parent / name / "model_index.json")] + files
    listed = f"'{parent}' holds {', '.join(models[:5])}{' ...' * (len(models) > 5)}; " if models else ""
    return not_found(f"{text}: no such file or folder; {listed}check the path, or name a hub id such as owner/name")


def _resolve_hub_id(model_id: str, cache: Path, offline: bool, revision: str | None, check: Callable[[Path], object]) -> Source:
    state = f"not in {cache}"
    for store in (cache, user_cache()):
        snapshot = cached_snapshot(model_id, store, revision)
        if snapshot is None:
            continue
        try:
            check(snapshot)
            return Source("hub", snapshot, model_id)
        except UserError as error:
            # Another program's copy may be partial or pickled: a download brings what is needed into our own cache.
            if is_offline(offline) and error.exit_code == ExitCode.REFUSED:
                raise
            cause = str(error).removeprefix(f"{snapshot}: ").partition(";")[0]
            state = f"only partly in {store} ({cause})"
    if is_offline(offline):
        raise not_found(f"{model_id}: {state}; run once without {'--offline' if offline else 'HF_HUB_OFFLINE'}")
    return Source("hub", None, model_id)
