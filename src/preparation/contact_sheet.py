"""report.html of a preparation: what was left out and why, the pictures with their captions, sizes and caption lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import report
from src.captions import printable
from src.images import read_image
from src.preparation.output import Prepared
from src.preparation.settings import PrepareConfig
from src.preparation.wording import CLIP_TOKENS, estimate_tokens
from src.terminal import counted

if TYPE_CHECKING:
    from src.preparation.preparing import Outcome

MAX_SHOWN = 240  # pictures of the contact sheet; at 10 to 20 kB each the file stays below 6 MB
MAX_SHOWN_LEFT_OUT = 60
MAX_ROWS = 10_000  # of a table; a line has about 200 bytes
_THUMBNAIL_PX = 192
_CAPTION_CHARACTERS = 160  # below a thumbnail; the table has all


def write_report(outcome: Outcome, config: PrepareConfig, thumbnails: Mapping[str, Path]) -> bytes:
    """The HTML file. ``thumbnails`` are the pictures that were left out, as far as they were drawn, by source name."""
    parts = [
        _summary(outcome, config),
        *_left_out(outcome, thumbnails),
        _sheet(outcome),
        report.section("Sizes", report.gallery(_size_charts(outcome.prepared))),
        _captions(outcome.prepared, config),
    ]
    return report.page(f"Data set {outcome.folder}", *parts)


def _summary(outcome: Outcome, config: PrepareConfig) -> str:
    left_out = outcome.skipped_pictures
    pairs: dict[str, Any] = {
        "source": config.src,
        "pictures": f"{len(outcome.prepared):,} prepared, {sum(left_out.values()):,} left out",
        "left out": ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items())) or None,
        "masks": outcome.masks or None,
        "trigger": config.trigger,
        "size": f"{config.size} px" + (", in buckets" if config.buckets else f" square, {config.crop} crop"),
        "changed": _changes(outcome.prepared) or None,
        "every file": f"{outcome.found:,} found = {counted(len(outcome.prepared), 'picture')} + "
        f"{counted(outcome.masks, 'mask')} + {counted(outcome.caption_files, 'caption file')} + "
        f"{len(outcome.skipped):,} listed as left out",
        "next": config.next_command(),
    }
    notes = [report.text(note) for note in outcome.notes]
    return report.section("Summary", report.facts({name: value for name, value in pairs.items() if value is not None}), *notes)


def _changes(prepared: Sequence[Prepared]) -> str:
    """What was done to how many pictures, apart from cutting."""
    counts = Counter(note.partition(" (")[0] for item in prepared for note in item.picture.notes)
    return ", ".join(f"{count} × {note}" for note, count in counts.most_common())


def _left_out(outcome: Outcome, thumbnails: Mapping[str, Path]) -> Iterable[str]:
    if not outcome.skipped:
        return
    shown = [skip for skip in outcome.skipped if skip.source in thumbnails]
    shown = _spread(sorted(shown, key=lambda skip: skip.kind), MAX_SHOWN_LEFT_OUT)
    figures = [_figure(thumbnails[skip.source], f"{skip.kind}\n{printable(skip.source)}\n{skip.reason}") for skip in shown]
    rows = [(printable(skip.source), skip.kind, printable(skip.reason)) for skip in outcome.skipped]
    parts = [report.gallery(filter(None, figures))] if figures else []
    parts += [report.table(("file", "finding", "reason"), rows[:MAX_ROWS]), *_rest(len(rows))]
    yield report.section("Left out", *parts)


def _sheet(outcome: Outcome) -> str:
    shown = _spread(outcome.prepared, MAX_SHOWN)
    figures = (_figure(outcome.folder / item.file_name, _label(item)) for item in shown)
    title = "Pictures" if len(shown) == len(outcome.prepared) else f"Pictures: {len(shown)} of {len(outcome.prepared)}"
    return report.section(title, report.gallery(filter(None, figures)))


def _label(item: Prepared) -> str:
    """File, caption, where it came from, and what was done to it."""
    picture = item.picture
    caption = item.captions[0] if item.captions else "no caption"
    if len(caption) > _CAPTION_CHARACTERS:
        caption = caption[: _CAPTION_CHARACTERS - 1] + "…"
    more = f" (+{len(item.captions) - 1} more)" if len(item.captions) > 1 else ""
    left, top, right, bottom = picture.crop_px
    kept = (right - left) * (bottom - top) / (picture.source_px[0] * picture.source_px[1])
    source = "{} · {}×{}".format(printable(picture.source), *picture.source_px)
    cut = f" · {kept:.0%} kept" if kept < 0.995 else ""
    notes = "".join(f"\n{note}" for note in picture.notes)
    return f"{item.file_name}: {caption}{more}\n{source}{cut}{notes}"


def _size_charts(prepared: Sequence[Prepared]) -> Iterable[str]:
    shorter = Counter(_bin(min(item.picture.source_px), (256, 512, 768, 1024, 1536, 2048, 3072, 4096)) for item in prepared)
    yield report.bars("Shorter side of the originals", _in_order(shorter, " px"), "pictures")
    sizes = Counter("{}×{}".format(*item.picture.size_px) for item in prepared)
    yield report.bars("Sizes of the data set", dict(sizes.most_common(16)), "pictures")


def _captions(prepared: Sequence[Prepared], config: PrepareConfig) -> str:
    lengths = [estimate_tokens(caption) for item in prepared for caption in item.captions]
    bins = Counter(_bin(length, (10, 20, 30, 40, 50, 60, CLIP_TOKENS + 1, 150)) for length in lengths)
    origins = Counter(Path(item.caption_from).suffix.lstrip(".") or item.caption_from or "none" for item in prepared)
    charts = [
        report.bars("Length of the captions, about", _in_order(bins, " tokens"), "captions"),
        report.bars("Where the captions came from", dict(origins.most_common()), "pictures"),
    ]
    long = sum(length > CLIP_TOKENS for length in lengths)
    warning = (
        f"{counted(long, 'caption')} beyond the {CLIP_TOKENS} tokens of one window of CLIP (marked below). train_lora reads "
        "them to the end; many other trainers cut them off there."
    )
    rows = [(item.file_name, printable(item.picture.source), "\n".join(item.captions) or None) for item in prepared]
    marked = {
        index for index, item in enumerate(prepared) if any(estimate_tokens(text) > CLIP_TOKENS for text in item.captions)
    }
    table = report.table(("file", "source", "captions"), rows[:MAX_ROWS], marked=marked)
    return report.section(
        "Captions", report.gallery(charts), *([report.text(warning)] if long else []), table, *_rest(len(rows))
    )


def _figure(path: Path, label: str) -> str | None:
    """A thumbnail, or None for a picture that was not drawn."""
    return report.picture(read_image(path), label, max_px=_THUMBNAIL_PX) if path.is_file() else None


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


def _bin(value: int, edges: Sequence[int]) -> tuple[int, int | None]:
    """The (lowest, first above) of the range that a value falls into."""
    lows = [0, *edges]
    index = sum(value >= edge for edge in edges)
    return lows[index], edges[index] if index < len(edges) else None


def _in_order(bins: Mapping[tuple[int, int | None], int], unit: str) -> dict[str, float]:
    """Ranges as text, the lowest first."""
    return {
        (f"{low:,}{unit} or more" if high is None else f"{low:,} to {high - 1:,}{unit}"): count
        for (low, high), count in sorted(bins.items(), key=lambda item: item[0][0])
    }


def _rest(count: int) -> list[str]:
    return [report.text(f"... and {count - MAX_ROWS:,} more; dataset.json has all.")] if count > MAX_ROWS else []
