"""Data sets that `datasets` saved (``save_to_disk``): unpacked once into a folder of pictures with ``metadata.jsonl``.

A folder of pictures with ``metadata.jsonl`` needs none of this: it is read as it is, without that package.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from src import folders
from src.errors import refused, usage_error
from src.files import Stream
from src.images import PICTURE_SUFFIXES

MARKS = ("dataset_dict.json", "state.json")  # of several splits, of one
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "sentence")
SPLIT = "train"


def unpacked(folder: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """``folder``, or where its pictures are now if it is a saved data set; of several splits the one called train.

    Raises UserError: usage (the package is not installed), refused (no such data set, no pictures or captions in it).
    """
    mark = next((folder / name for name in MARKS if (folder / name).is_file()), None)
    if mark is None:
        return folder
    states = sorted(folder.rglob("state.json"))  # each holds a fingerprint of its split
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in states)).hexdigest()
    target = cache / "datasets" / digest[:32]
    if not target.is_dir():
        with folders.locked(folders.make_folder(target.parent), waits=True):  # each process of a run comes here
            if not target.is_dir():
                rows, captions = _load(folder)
                folders.publish_folder(target, _contents(rows, captions, folder))
    say(f"data    {folder} is a saved data set; its pictures are in {target}")
    return target


def _load(folder: Path) -> tuple[Any, str]:
    """The rows with undecoded pictures, and the column of the captions."""
    try:
        import datasets
    except ImportError:
        raise usage_error(
            f"{folder}: is a data set that `datasets` saved; pip install datasets, or name a folder of pictures"
        ) from None
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # what that library raises over a damaged folder has no class in common
        raise refused(f"{folder}: cannot be read by `datasets` ({' '.join(str(error).split())[:160]}); save it again") from None
    if isinstance(rows, datasets.DatasetDict):
        if SPLIT not in rows:
            raise refused(f"{folder}: has no split '{SPLIT}' but {', '.join(rows)}; name the folder of one of them")
        rows = rows[SPLIT]
    caption = next((name for name in CAPTION_COLUMNS if name in rows.column_names), None)
    if caption is None or not isinstance(rows.features.get("image"), datasets.Image):
        raise refused(
            f"{folder}: needs a column 'image' of pictures and one of {', '.join(CAPTION_COLUMNS)}, and has "
            f"{', '.join(rows.column_names)}; rename them"
        )
    return rows.select_columns(["image", caption]).cast_column("image", datasets.Image(decode=False)), caption


def _contents(rows: Any, caption: str, folder: Path) -> dict[str, bytes | Stream]:
    """The files of the unpacked folder: each picture's own bytes, read one at a time."""
    contents: dict[str, bytes | Stream] = {}
    lines = []
    for number, row in enumerate(rows):
        data = _bytes(row["image"], folder, number)
        name = f"{number:07d}.{_suffix(data, folder, number)}"
        texts = row[caption] if isinstance(row[caption], list) else [row[caption]]
        contents[name] = Stream(len(data), lambda number=number: _picture(rows, folder, number))
        lines.append(json.dumps({"file_name": name, "captions": [text for text in texts if isinstance(text, str)]}))
    return {**contents, "metadata.jsonl": "\n".join(lines).encode()}


def _picture(rows: Any, folder: Path, number: int) -> Iterator[bytes]:
    yield _bytes(rows[number]["image"], folder, number)


def _bytes(held: dict[str, Any] | None, folder: Path, number: int) -> bytes:
    if held is None or (held["bytes"] is None and held["path"] is None):
        raise refused(f"{folder}: row {number} has no picture; leave it out of the data set")
    if held["bytes"] is not None:
        return held["bytes"]
    try:
        return Path(held["path"]).read_bytes()
    except OSError as error:
        raise refused(
            f"{folder}: row {number}: {held['path']} cannot be read ({error.strerror or error}); save the data set "
            "with its pictures"
        ) from None


def _suffix(data: bytes, folder: Path, number: int) -> str:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            kind = str(picture.format)
    except Exception:  # a damaged picture raises anything
        raise refused(f"{folder}: row {number} holds no picture that can be read; leave it out of the data set") from None
    suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(kind, kind.lower())  # MPO: the JPEG of a phone, with a second picture in it
    if f".{suffix}" not in PICTURE_SUFFIXES:  # else it would lie in the folder and nobody would read it
        raise refused(f"{folder}: row {number} is a picture of the kind {kind}, which is not read here; save it as PNG")
    return suffix
