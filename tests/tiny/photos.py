"""Small pictures that pass for photos: smooth colours with sharp shapes, another one for each seed; and folders of them."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from PIL import Image, ImageDraw


def photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    dice = random.Random(seed)
    picture = Image.frombytes("RGB", (5, 4), dice.randbytes(60)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(9):
        x, y, side = dice.randrange(width), dice.randrange(height), dice.randrange(4, max(5, width // 4))
        draw.rectangle((x, y, x + side, y + side), fill=tuple(dice.randbytes(3)))
    return picture


def photo_folder(folder: Path, count: int, **size: int) -> Path:
    """``count`` photos named a.png, b.png ... in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        photo(seed, **size).save(folder / f"{chr(97 + seed % 26) * (1 + seed // 26)}.png")
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """What every entry below a folder is: the hash of a file, the target of a link, the type and times of all."""
    entries = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
            target = os.readlink(path) if path.is_symlink() else ""
            times = status.st_mtime_ns if not path.is_dir() else 0
            entries[str(path.relative_to(folder))] = f"{status.st_mode} {times} {content} {target}"
    return entries
