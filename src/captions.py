"""Captions of a folder of pictures, from the forms in use: sidecar files, Hugging Face's metadata, kohya's folder names.

The nearer source wins: ``NAME.txt`` or ``NAME.caption`` beside ``NAME.png``; then ``metadata.jsonl`` or ``metadata.csv`` of
the picture's folder or one above it (``file_name`` and ``text``, ``caption`` or ``captions``); then a folder ``10_sks dog``,
whose name is the caption. A picture may have several captions: one a line in a sidecar file, a list or several rows in
metadata. A table of captions (`read_caption_table`) stands for all of these. All text is UTF-8, and all that is not is named
at once, before anything else is done.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import listdir
from os.path import normpath, splitext
from pathlib import Path
from typing import Any

from src.errors import refused

SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
TABLE_NAMES = ("results.csv", "captions.csv", "captions.txt", "flickr_annotations_30k.csv")  # of Flickr30k and Flickr8k
_TABLE_PICTURE = ("image", "image_name", "file_name", "filename")
_TABLE_LISTS = ("captions", "raw")  # several captions in one cell, as a JSON list: Flickr30k on the Hugging Face hub
_TABLE_CAPTION = ("caption", "comment", "text", "sentence", *_TABLE_LISTS)
MAX_SIDECAR_BYTES = 64 << 10
MAX_METADATA_BYTES = 512 << 20
_SHOWN_PROBLEMS = 20
_SHOWN_EMPTY = 5

_KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.+)")  # three digits, so that "2024_holiday" is a year and not 2024 repeats
# Controls, the byte order mark, zero-width spaces, marks that turn the reading direction, halves of surrogate pairs. The
# joiners U+200C and U+200D stay: Persian words and composed emoji need them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_ISO_2022 = re.compile(rb"\x1b[$(]")


@dataclass(slots=True)
class FoundCaptions:
    """The captions of each picture (perhaps none), the file that each came from, and what a person should know."""

    texts: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    origins: dict[Path, Path] = field(default_factory=dict)  # no entry: from a folder's name, or none
    empty: list[Path] = field(default_factory=list)  # sidecar files without a word
    notes: list[str] = field(default_factory=list)


def read_captions(
    folder: Path, pictures: Sequence[Path], empty_is_none: bool = False
) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """The cleaned captions of each picture below ``folder`` (``()`` where there are none), and notes on how they were found.

    ``empty_is_none``: a picture beside an empty caption file has none, whatever metadata say. Raises UserError (refused) that
    names every file which is not UTF-8, with the first wrong byte, or is no metadata.
    """
    found = find_captions(folder, pictures, empty_is_none=empty_is_none)
    return found.texts, found.notes


def find_captions(
    folder: Path,
    pictures: Sequence[Path],
    is_file: Callable[[Path], bool] = Path.is_file,
    empty_is_none: bool = False,
) -> FoundCaptions:
    """As :func:`read_captions`, with the origin of each caption. ``is_file`` says which paths may be read."""
    found, problems = FoundCaptions(), []
    metadata = _read_all_metadata(folder, pictures, is_file, found.notes, problems)
    odd = oddly_spelled(pictures)
    from_folders: set[str] = set()
    for picture in pictures:
        captions, origin, empty = _from_sidecar(picture, is_file, odd, problems)
        found.empty += [path for path in empty if path not in found.empty]  # a.png and a.jpg share a.txt
        if not captions and not (empty and empty_is_none):
            captions, origin = metadata.get(_key(picture), ((), None))
        if not captions and (kohya := _kohya_folder(folder, picture)):
            captions = tuple(filter(None, [clean(kohya[2])]))
            from_folders.add(kohya[0])
        found.texts[picture] = captions
        if origin is not None:
            found.origins[picture] = origin
    if problems:
        shown = printable(", ".join(problems[:_SHOWN_PROBLEMS]))
        more = f" and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise refused(f"captions cannot be read: {shown}{more}; save them as UTF-8 text")
    if found.empty:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found.empty[:_SHOWN_EMPTY])
        more = f" and {len(found.empty) - _SHOWN_EMPTY} more" if len(found.empty) > _SHOWN_EMPTY else ""
        found.notes.append(f"empty caption files, taken as none: {names}{more}; write a caption into them, or delete them")
    if from_folders:
        found.notes.append(f"captions taken from folder names: {', '.join(sorted(from_folders))}")
    if several := sum(len(captions) > 1 for captions in found.texts.values()):
        found.notes.append(f"pictures with several captions: {several} (each line of a .txt file is one)")
    found.notes = list(map(printable, found.notes))
    return found


def oddly_spelled(pictures: Iterable[Path]) -> dict[Path, Path]:
    """The files beside the pictures whose ending has capital letters, by their path with small ones: IMG_1.TXT of IMG_1.JPG."""
    found: dict[Path, Path] = {}
    for folder in {picture.parent for picture in pictures}:
        with suppress(OSError):
            for stem, suffix in map(splitext, sorted(listdir(folder))):
                if suffix != suffix.lower():
                    found[folder / f"{stem}{suffix.lower()}"] = folder / f"{stem}{suffix}"
    return found


def find_caption_table(folder: Path) -> Path | None:
    """A table of captions that lies in a folder by one of the usual names."""
    return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)


def read_caption_table(table: Path, folder: Path, pictures: Sequence[Path]) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """The captions of the pictures below ``folder`` that a table names, in its order, and notes.

    A caption a line, several lines a picture: ``image,caption`` (CSV) or ``image_name| comment_number| comment``, and such a
    first line; or a line a picture, with a column ``raw`` or ``captions`` that holds a JSON list.

    A picture is named by its path from the folder or the table, or by its file name where no other picture has that. Raises
    UserError (refused) for a file that is no such table, names none of the pictures, or may mean either of two.
    """
    problems: list[str] = []
    text = _read_text(table, MAX_METADATA_BYTES, problems)
    if problems:
        raise refused(f"captions cannot be read: {printable(problems[0])}; save them as UTF-8 text")
    by_name: dict[str, list[Path]] = {}
    for picture in pictures:
        by_name.setdefault(_key(Path(picture.name)), []).append(picture)
    by_path = {_key(picture): picture for picture in pictures}
    found: dict[Path, list[str]] = {}
    strangers: set[str] = set()
    broken: list[int] = []
    for line, name, caption in _table_rows(table, text):
        if not name or not clean(caption):
            broken.append(line)
            continue
        paths = (_key(parent / name) for parent in (folder, table.parent))
        picture = next((by_path[path] for path in paths if path in by_path), None)
        if picture is None and (named := by_name.get(_key(Path(Path(name).name)))):
            picture = _only(named, name, table, line)
        found.setdefault(picture, []).append(caption) if picture else strangers.add(name)
    if not found:
        raise refused(f"{table}: names none of the pictures in {folder}; check --dataset_dir and --captions_file")
    notes = [f"captions from {table.name}: {sum(map(len, found.values())):,} of {len(found):,} pictures"]
    if broken:
        notes.append(f"{table.name}: {len(broken)} lines without picture or caption are left out, first line {broken[0]}")
    if strangers:
        notes.append(f"{table.name} names pictures that are not there: {len(strangers)}, first {min(strangers)}")
    return {picture: _unique(captions) for picture, captions in found.items()}, list(map(printable, notes))


def _only(pictures: Sequence[Path], name: str, table: Path, line: int) -> Path:
    """The one picture of this file name; of several any might be meant."""
    if len(pictures) > 1:
        raise refused(
            printable(f"{table}: line {line}: '{name}' may be {pictures[0]} or {pictures[1]}; write the path from the folder")
        )
    return pictures[0]


def _table_rows(table: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """(line, picture, caption) of each line; both are "" where the line has too few columns."""
    first = text.partition("\n")[0]
    delimiter = next((sign for sign in "|\t;" if sign in first), ",")
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        head = [clean(column).lower() for column in next(reader, [])]
        picture = next((head.index(name) for name in _TABLE_PICTURE if name in head), None)
        caption = next((head.index(name) for name in _TABLE_CAPTION if name in head), None)
        if picture is None or caption is None:
            raise refused(
                f"{table}: its first line names no picture ({', '.join(_TABLE_PICTURE)}) and caption "
                f"({', '.join(_TABLE_CAPTION)}); write image,caption as the first line"
            )
        for row in reader:
            if len(row) <= max(picture, caption):
                if row:
                    yield reader.line_num, "", ""
                continue
            # A caption with a delimiter of its own, unquoted, goes on to the end of the line where it is the last column.
            words = delimiter.join(row[caption:]) if caption == len(head) - 1 else row[caption]
            if quoting == csv.QUOTE_MINIMAL and any(_begins_a_row(line) for line in words.splitlines()[1:]):
                raise refused(f"{table}: line {reader.line_num} is within quotes that an earlier line opened; close them there")
            name = row[picture].strip().replace("\\", "/")
            for one in _listed(words) if head[caption] in _TABLE_LISTS else [words]:
                yield reader.line_num, name, one
    except csv.Error as error:
        raise refused(f"{table}: line {reader.line_num} is no line of a table ({error}); save it as CSV") from None


def _listed(words: str) -> list[str]:
    """The captions of a cell: each of a JSON list, or the text itself; ``[""]`` for a list of anything else, or of nothing."""
    if not words.lstrip().startswith("["):
        return [words]
    try:
        found = json.loads(words)
    except (ValueError, RecursionError):
        return [""]
    return found if found and all(isinstance(item, str) for item in found) else [""]


def repeats_of(folder: Path, picture: Path) -> int:
    """How often a picture counts in an epoch: 10 in kohya's ``10_sks dog``, else 1; ``0_name`` counts once as well."""
    kohya = _kohya_folder(folder, picture)
    return max(1, int(kohya[1])) if kohya else 1


def clean(text: str) -> str:
    """One line of ``text``: any white space as one space, no control characters, no byte order mark."""
    return " ".join(_INVISIBLE.sub("", text).split())


def printable(name: str) -> str:
    """A file's name on one line: it may hold line breaks, bytes that are no text, and signs that turn the reading direction."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)


def _key(picture: Path) -> str:
    """macOS stores accents apart from their letters in file names; metadata seldom does."""
    return unicodedata.normalize("NFC", normpath(picture))


def _kohya_folder(folder: Path, picture: Path) -> re.Match[str] | None:
    """The nearest folder above the picture, below ``folder``, that is named in kohya's way."""
    for parent in picture.parents:
        if parent == folder:
            return None
        if found := _KOHYA_FOLDER.fullmatch(parent.name):
            return found
    return None


def _from_sidecar(
    picture: Path, is_file: Callable[[Path], bool], odd: Mapping[Path, Path], problems: list[str]
) -> tuple[tuple[str, ...], Path | None, list[Path]]:
    """The captions beside a picture, their file, and the files there without a word. ``odd``: `oddly_spelled` ones."""
    empty = []
    for suffix in SIDECAR_SUFFIXES:
        path = picture.with_suffix(suffix)
        path = path if is_file(path) else odd.get(path, path)
        if is_file(path):
            text = _read_text(path, MAX_SIDECAR_BYTES, problems)
            if captions := _unique(text.splitlines()):
                return captions, path, empty
            empty.append(path)
    return (), None, empty


def _read_all_metadata(
    folder: Path, pictures: Sequence[Path], is_file: Callable[[Path], bool], notes: list[str], problems: list[str]
) -> dict[str, tuple[tuple[str, ...], Path]]:
    """Captions by :func:`_key` from every metadata file between ``folder`` and a picture; the deepest one wins."""
    known = {_key(picture) for picture in pictures}
    folders = {folder}
    for picture in pictures:
        folders.update(parent for parent in picture.parents if parent.is_relative_to(folder))
    captions: dict[str, tuple[tuple[str, ...], Path]] = {}
    for path in (parent / name for parent in sorted(folders) for name in reversed(METADATA_NAMES)):
        if not is_file(path):
            continue
        rows: dict[str, list[str]] = {}
        for file_name, texts in _metadata_rows(path, problems):
            rows.setdefault(_key(path.parent / file_name.replace("\\", "/")), []).extend(texts)
        captions |= {key: (_unique(texts), path) for key, texts in rows.items() if key in known and _unique(texts)}
        if missing := sorted(rows.keys() - known):
            notes.append(f"{path} names pictures that are not there: {len(missing)}, first {Path(missing[0]).name}")
    return captions


def _metadata_rows(path: Path, problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(file_name, captions) of each row; what is no such row is added to ``problems``, the first of a file only."""
    text = _read_text(path, MAX_METADATA_BYTES, problems)
    parse = _parse_jsonl if path.suffix == ".jsonl" else _parse_csv
    try:
        for number, row in parse(text):
            if not isinstance(row.get("file_name"), str):
                raise ValueError(f"line {number} has no file_name")
            yield row["file_name"], _captions_of(row, number)
    except (ValueError, RecursionError, csv.Error) as error:
        problems.append(f"{path} ({error})")


def _parse_jsonl(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield number, row


def _begins_a_row(line: str) -> bool:
    """Whether a line within a caption is in truth the next picture's: a quote was opened and not closed."""
    return re.match(r'\s*"?[^",]+\.(jpe?g|png|webp|bmp|tiff?|gif|avif|heic)"?\s*,', line, re.IGNORECASE) is not None


def _parse_csv(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        if any(_begins_a_row(line) for value in row.values() if isinstance(value, str) for line in value.splitlines()[1:]):
            raise ValueError(f"line {reader.line_num} is still in quotes that an earlier line opened")
        yield reader.line_num, row


def _captions_of(row: dict[str, Any], number: int) -> list[str]:
    """A row's ``captions``, ``text`` or ``caption``: a string, a list of strings, or (in CSV) a list as JSON."""
    for column in ("captions", "text", "caption"):
        value = row.get(column)
        if isinstance(value, str) and column == "captions" and value.lstrip().startswith("["):
            value = json.loads(value)
        if isinstance(value, str):
            value = [value]
        if value in (None, []) or (isinstance(value, list) and not any(value)):
            continue
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f"line {number}: {column} is neither a text nor a list of texts")
        return value
    return []


def _unique(texts: Sequence[str]) -> tuple[str, ...]:
    """The cleaned texts without empty and repeated ones, in their order."""
    return tuple(dict.fromkeys(filter(None, map(clean, texts))))


def _read_text(path: Path, max_bytes: int, problems: list[str]) -> str:
    """The UTF-8 text of a file, without a byte order mark; "" and an entry in ``problems`` if it is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        problems.append(f"{path} ({error.strerror})")
        return ""
    try:
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes:,} bytes")
        if b"\0" in data:  # valid UTF-8, but never meant so
            raise ValueError(f"byte {data.index(0)} is NUL, as in UTF-16")
        if found := _ISO_2022.search(data):
            raise ValueError(f"byte {found.start()} is an escape, as in ISO-2022")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        shift = 3 if data.startswith(b"\xef\xbb\xbf") else 0  # the codec counts from behind the mark
        problems.append(f"{path} (byte {error.start + shift} is not UTF-8)")
    except ValueError as error:
        problems.append(f"{path} ({error})")
    return ""
