"""The folder that a preparation makes: what in it is ours, how a new result takes the place of an old one, what is recorded.

``0000.png``, ``0000.txt`` (a caption a line), perhaps ``0000-masklabel.png``, and so on; ``metadata.jsonl`` with ``file_name``
and ``text``; ``dataset.json`` with the settings, where each picture came from, and what was left out; ``report.html``. Finished
pictures wait in ``.preparing/``; only when all are there, they get their names, and ``dataset.json`` is written twice: before,
with ``"complete": false``, and at the very end. A run that was killed at any moment is finished by the same command.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.captions import METADATA_NAMES, SIDECAR_SUFFIXES
from src.errors import UserError, not_found, refused, usage_error
from src.files import delete_files, move_files, publish_bytes, sha256_of
from src.images import PICTURE_SUFFIXES
from src.preparation.examining import Examined, mask_path
from src.version import VERSION

SHELF = ".preparing"
MANIFEST, METADATA, REPORT = "dataset.json", "metadata.jsonl", "report.html"
_MADE_BY = "prepare_dataset"
_OUR_NAMES = re.compile(r"\d{4,}(-masklabel)?\.png|\d{4,}\.txt")


@dataclass(slots=True)
class Prepared:
    """One picture of the result."""

    picture: Examined
    captions: tuple[str, ...]
    caption_from: str  # the file, "folder name", "template", a captioner's name, or "" for none
    repeats: int = 1
    file_name: str = ""
    described: tuple[str, str] | None = None  # (captioner, what it said)

    def record(self) -> dict[str, Any]:
        """Its entry in dataset.json."""
        mask = mask_path(Path(self.file_name)).name if self.picture.mask_sha256 else None
        names = {"file_name": self.file_name, "mask_file_name": mask}
        words = {"captions": self.captions, "caption_from": self.caption_from, "described": self.described}
        return {**names, **words, "repeats": self.repeats, **asdict(self.picture)}


@dataclass(slots=True)
class Destination:
    """A folder that may be written to, and what an earlier run left there."""

    folder: Path
    files: dict[str, str] = field(default_factory=dict)  # ours, by name -> SHA-256, or "" where it is not checked
    known: dict[str, tuple[dict[str, Any], Path]] = field(default_factory=dict)  # an earlier run's records by key, and places

    @property
    def shelf(self) -> Path:
        return self.folder / SHELF

    def publish(self, prepared: Sequence[Prepared], facts: Mapping[str, Any], report: Callable[[], bytes]) -> None:
        """Give the pictures on the shelf their names in this order, write their captions, and take away our older files.

        ``facts`` go into dataset.json; ``report`` is asked for the report when the pictures have their names.
        Raises UserError (failure) when the disk says no; the same command then goes on.
        """
        digits = max(4, len(str(max(0, len(prepared) - 1))))
        for number, item in enumerate(prepared):
            item.file_name = f"{number:0{digits}d}.png"
        texts = {item.file_name.replace(".png", ".txt"): "\n".join(item.captions).encode() for item in prepared}
        texts[METADATA] = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in _metadata(prepared)).encode()
        files = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()} | {REPORT: ""}
        for item in prepared:
            files[item.file_name] = item.picture.sha256
            if item.picture.mask_sha256:
                files[mask_path(Path(item.file_name)).name] = item.picture.mask_sha256
        self._shelve(files)
        self._record(prepared, {**facts, "complete": False, "files": dict.fromkeys(self.files | files, "")})
        delete_files(self.folder / name for name in self.files.keys() - files.keys())
        self._unshelve(prepared)
        for name, data in texts.items():
            if not _holds(self.folder / name, files[name]):
                publish_bytes(self.folder / name, data)
        publish_bytes(self.folder / REPORT, report())
        self._record(prepared, {**facts, "complete": True, "files": files})
        self.files = files

    def place_of(self, picture: Examined) -> Path:
        """Where a picture's PNG lies that has no name yet: on the shelf, or still under the name of an earlier run."""
        place = self.shelf / f"{picture.key}.png"
        return place if place.exists() else self.known.get(picture.key, ({}, place))[1]

    def _shelve(self, files: Mapping[str, str]) -> None:
        """Put the pictures of an earlier run back on the shelf whose names now belong to others."""
        pairs = []
        for record, own in self.known.values():
            for path, digest, ending in ((own, record["sha256"], "png"), (mask_path(own), record["mask_sha256"], "mask.png")):
                if digest and files.get(path.name) != digest and _holds(path, digest):
                    pairs.append((path, self.shelf / f"{record['key']}.{ending}"))
        move_files(pairs)

    def _unshelve(self, prepared: Sequence[Prepared]) -> None:
        pairs = []
        for item in prepared:
            target, key = self.folder / item.file_name, item.picture.key
            pairs.append((self.shelf / f"{key}.png", target))
            pairs.append((self.shelf / f"{key}.mask.png", mask_path(target)))
        move_files((source, target) for source, target in pairs if source.exists())

    def _record(self, prepared: Sequence[Prepared], facts: Mapping[str, Any]) -> None:
        head = {"made_by": _MADE_BY, "version": VERSION, **facts}
        lines = [f"{json.dumps(name)}: {json.dumps(value, indent=1)}" for name, value in head.items()]
        pictures = ",\n".join(json.dumps(item.record()) for item in prepared)  # a line each
        lines.append(f'"pictures": [\n{pictures}\n]')
        data = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
        publish_bytes(self.folder / MANIFEST, data)


def check_folders(src: Path, dst: Path) -> None:
    """Refuse a source that is missing, and a destination in the source or around it. Raises UserError (not found, usage)."""
    if not src.is_dir():
        kind = "is not a folder" if src.exists() else "no such folder"
        raise not_found(f"--src {src}: {kind}; name the folder with your pictures")
    real_src, real_dst = Path(os.path.realpath(src)), Path(os.path.realpath(dst))
    for inner, outer, text in ((real_dst, real_src, "lies in"), (real_src, real_dst, "holds")):
        if any(_same(place, outer) for place in (inner, *inner.parents)):
            text = "is" if _same(real_src, real_dst) else text
            raise usage_error(f"--dst {dst} {text} the source folder, which is never changed; choose another folder")


def open_destination(folder: Path, overwrite: bool) -> Destination:
    """What is in ``folder``, which need not exist.

    Raises UserError (refused) where writing would mix with or lose others' work: pictures, captions or reports that no
    preparation made, and, without ``overwrite``, files of ours that were changed since.
    """
    if folder.exists() and not folder.is_dir():
        raise refused(f"--dst {folder}: is a file, not a folder; choose another name")
    manifest = _read_manifest(folder / MANIFEST)
    files = {name: digest for name, digest in manifest.get("files", {}).items() if _is_ours(name)}
    known = {record["key"]: (record, folder / record["file_name"]) for record in manifest.get("pictures", [])}
    foreign = [name for name in _data_files(folder) if name not in files and name != MANIFEST]
    foreign += [MANIFEST] if (folder / MANIFEST).exists() and not manifest else []
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise refused(
            f"--dst {folder}: holds '{foreign[0]}'{more}, which this command did not make; choose an empty or a new folder"
        )
    if manifest.get("complete") and not overwrite:
        _refuse_changed(folder, files)
    return Destination(folder, files, known)


def _refuse_changed(folder: Path, files: Mapping[str, str]) -> None:
    changed = [name for name, digest in sorted(files.items()) if digest and not _holds(folder / name, digest)]
    changed = [name for name in changed if (folder / name).exists()]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise refused(
            f"--dst {folder}: '{changed[0]}'{more} was changed after it was made; make the change in the source folder, "
            "choose another folder, or give --overwrite to lose it"
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    """An earlier run's dataset.json, or {} if there is none that this program wrote."""
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["made_by"] != _MADE_BY or not all(isinstance(name, str) for name in manifest["files"].values()):
            return {}
        for record in manifest["pictures"]:
            if not (_OUR_NAMES.fullmatch(record["file_name"]) and re.fullmatch("[0-9a-f]{64}", record["key"])):
                return {}
            Examined(**{name: record[name] for name in Examined.__dataclass_fields__})
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}
    return manifest


def _is_ours(name: str) -> bool:
    """Whether a name can be one of ours: a manifest that was tampered with must not make us delete others' files."""
    return name in (METADATA, REPORT) or _OUR_NAMES.fullmatch(name) is not None


def _data_files(folder: Path) -> list[str]:
    """Names of all that a trainer would take for data, and of what we would write over. Hidden folders are left alone."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name).relative_to(folder)
            is_data = path.suffix.lower() in (*PICTURE_SUFFIXES, *SIDECAR_SUFFIXES) or name in (*METADATA_NAMES, REPORT)
            if is_data and not name.startswith("."):
                names.append(path.as_posix())
    return names


def _metadata(prepared: Sequence[Prepared]) -> list[dict[str, Any]]:
    """Rows as Hugging Face's imagefolder wants them: all with the same columns. ``text`` is one string, whatever there is."""
    rows = []
    several = any(len(item.captions) > 1 for item in prepared)
    repeated = any(item.repeats != 1 for item in prepared)
    for item in prepared:
        row: dict[str, Any] = {"file_name": item.file_name, "text": item.captions[0] if item.captions else ""}
        if several:
            row["captions"] = item.captions
        if repeated:
            row["repeats"] = item.repeats
        rows.append(row)
    return rows


def _same(path: Path, other: Path) -> bool:
    """Whether two paths lead to one folder, also where names differ by case or a mount."""
    try:
        return path == other or path.samefile(other)
    except OSError:
        return False


def _holds(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except UserError:
        return False
