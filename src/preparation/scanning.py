"""What lies in the source folder: each entry is a picture, a mask, a caption file, or something that is left out and listed."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from src.captions import METADATA_NAMES, SIDECAR_SUFFIXES
from src.dataset import MASK_ENDING
from src.images import PICTURE_SUFFIXES

_KINDS = {
    stat.S_ISLNK: "a link; copy the file itself into the folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_NEEDS = {  # pictures that are not read here, or not yet
    ".heic": "needs the package pillow-heif: pip install pillow-heif",
    ".heif": "needs the package pillow-heif: pip install pillow-heif",
    ".avif": "needs a Pillow that was built with AVIF",
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"), "a camera's raw file; export it as JPEG"),
    **dict.fromkeys((".psd", ".svg", ".eps", ".jp2", ".jxl", ".ico", ".tga"), "no format for photos; export it as PNG"),
}


@dataclass(frozen=True, slots=True)
class Skip:
    """An entry of the source that is not in the result, and why."""

    source: str  # relative to the source folder, with "/"
    kind: str  # the reason in a word or two, the same for all of its sort
    reason: str  # the reason in full

    @property
    def is_picture(self) -> bool:
        if self.kind == "not a file":  # a link, say
            return Path(self.source).suffix.lower() in PICTURE_SUFFIXES
        return self.kind not in ("not a picture", "unused caption", "mask without picture", "unreadable mask")


@dataclass(slots=True)
class Inventory:
    """Every entry of the source but its folders, each in one of the four, relative and in order of their names."""

    pictures: list[str] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)  # picture -> its mask
    captions: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pictures) + len(self.masks) + len(self.captions) + len(self.skipped)


def scan(root: Path) -> Inventory:
    """List all below ``root``. Nothing is opened, no link is followed, so nothing can hang or lead elsewhere."""
    inventory, masks = Inventory(), []
    for name, status in sorted(_walk(root, inventory.skipped), key=lambda entry: entry[0].split("/")):
        path = Path(name)
        suffix = path.suffix.lower()
        if status is None or not stat.S_ISREG(status.st_mode):
            kind = next((text for test, text in _KINDS.items() if status and test(status.st_mode)), "not a regular file")
            inventory.skipped.append(Skip(name, "not a file", kind))
        elif path.name.startswith("."):
            inventory.skipped.append(Skip(name, "not a picture", "a hidden file"))
        elif suffix in PICTURE_SUFFIXES:
            (masks if path.stem.endswith(MASK_ENDING) else inventory.pictures).append(name)
        elif suffix in SIDECAR_SUFFIXES or path.name in METADATA_NAMES:
            inventory.captions.append(name)
        elif suffix in _NEEDS:
            inventory.skipped.append(Skip(name, "unreadable", _NEEDS[suffix]))
        else:
            inventory.skipped.append(Skip(name, "not a picture", "none by its name"))
    _pair_masks(inventory, masks)
    return inventory


def _walk(root: Path, skipped: list[Skip]) -> list[tuple[str, os.stat_result | None]]:
    """(relative name, status) of all entries but folders; a loop, because a recursion could be made too deep."""
    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}".lstrip("/")
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        found.append((name, None))
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(name)
                    else:
                        found.append((name, status))
        except OSError as error:
            skipped.append(Skip(folder or ".", "unreadable", f"a folder that cannot be opened ({error.strerror})"))
    return found


def _pair_masks(inventory: Inventory, masks: list[str]) -> None:
    """Give each picture NAME its NAME-masklabel.png, or .PNG; what then is left over is listed."""
    free = set(masks)
    spelled = {Path(mask).with_suffix(Path(mask).suffix.lower()): mask for mask in sorted(masks)}  # small letters come last
    for picture in inventory.pictures:
        mask = spelled.get(Path(picture).with_name(f"{Path(picture).stem}{MASK_ENDING}.png"))
        if mask in free:
            inventory.masks[picture] = mask
            free.remove(mask)
    for mask in sorted(free):
        inventory.skipped.append(Skip(mask, "mask without picture", "no picture of that name is beside it, or another has it"))
