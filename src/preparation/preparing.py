"""A preparation in time order. Nothing in the source folder changes, and every file of it is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import ImageColor

from src import folders
from src.captions import METADATA_NAMES, FoundCaptions, clean, find_captions, printable, repeats_of
from src.errors import ExitCode, UserError, refused, usage_error
from src.files import check_writable_folder, delete_files
from src.preparation.captioner import describe_all, find_captioner
from src.preparation.examining import Desk, Examined, examine
from src.preparation.findings import find, overruled_by
from src.preparation.output import Destination, Prepared, check_folders, open_destination
from src.preparation.scanning import Inventory, Skip, scan
from src.preparation.settings import PrepareConfig, check
from src.preparation.wording import word_captions
from src.preparation.workers import process_count, work
from src.terminal import Terminal


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the source's files; ``found`` of them are in ``prepared``, used as captions or masks, or ``skipped``."""

    folder: Path
    found: int
    prepared: tuple[Prepared, ...]
    skipped: tuple[Skip, ...]
    caption_files: int
    masks: int
    notes: tuple[str, ...]
    taken_over: int  # pictures that an earlier run had finished

    @property
    def skipped_pictures(self) -> dict[str, int]:
        """How many pictures were left out, by kind."""
        return dict(Counter(skip.kind for skip in self.skipped if skip.is_picture))

    def counts(self) -> dict[str, Any]:
        """The law in figures: found = prepared + masks + caption_files + all that was skipped."""
        kinds = Counter(skip.kind for skip in self.skipped)
        return {
            "found": self.found, "prepared": len(self.prepared), "masks": self.masks,
            "caption_files": self.caption_files, "skipped": dict(sorted(kinds.items())),
        }  # fmt: skip


def prepare(config: PrepareConfig, terminal: Terminal) -> Outcome:
    """Prepare the pictures of ``config.src`` into ``config.dst``; with ``config.dry_run`` only say what would become of them.

    Killed at any moment, the same call finishes the work. Raises UserError: usage (settings, folders that overlap), not found,
    refused (captions that are not UTF-8, a destination with others' files, no picture left), failure (the disk).
    """
    check(config)
    _check_colour(config.background)
    src, dst = Path(config.src).expanduser(), Path(config.dst).expanduser()
    check_folders(src, dst)
    destination = open_destination(dst, config.overwrite)
    if config.caption is not None:
        find_captioner(config)  # before hours of work
    inventory = scan(src)
    if not inventory.pictures:
        first = next((f" ({printable(skip.source)}: {skip.reason})" for skip in inventory.skipped), "")
        raise refused(f"--src {src}: holds no pictures among {len(inventory)} files{first}; name the folder with your pictures")
    readable = {src / name for name in inventory.captions}
    captions = find_captions(src, [src / name for name in inventory.pictures], readable.__contains__)
    if config.dry_run:
        return _prepare(config, terminal, inventory, captions, destination, src)
    check_writable_folder(destination.shelf)
    with _alone(destination):
        destination = open_destination(dst, overwrite=True)  # once more: another run may just have ended
        folders.sweep(dst)
        delete_files(dst.glob(".incomplete-*"))  # what a killed run was writing
        outcome = _prepare(config, terminal, inventory, captions, destination, src)
    with suppress(UserError):  # all is done; a shelf that another program looks into serves the next run
        folders.remove_folder(destination.shelf)
    return outcome


def _prepare(
    config: PrepareConfig,
    terminal: Terminal,
    inventory: Inventory,
    captions: FoundCaptions,
    destination: Destination,
    src: Path,
) -> Outcome:
    examined = _examine_all(config, terminal, inventory, destination, src)

    def has_caption(source: str) -> bool:
        return config.caption is not None or bool(word_captions(captions.texts[src / source], config))

    def is_rich(item: Examined) -> bool:
        return bool(captions.texts[src / item.source]) or bool(item.mask_sha256)

    kept, skipped = find(examined, has_caption, is_rich, config)
    described = _describe(config, terminal, [item for item in kept if not captions.texts[src / item.source]], destination)
    prepared = [_worded(item, captions, described.get(item.source), config, src) for item in kept]
    if described and not config.keep_uncaptioned:
        speechless = [item.picture.source for item in prepared if not item.captions]
        skipped += [Skip(source, "no caption", "the captioner found no words") for source in speechless]
        prepared = [item for item in prepared if item.captions]
    if not prepared:
        causes = ", ".join(f"{count} {kind}" for kind, count in Counter(skip.kind for skip in skipped).most_common())
        first = printable(f"{skipped[0].source}: {skipped[0].reason}")
        way_out = overruled_by({skip.kind for skip in skipped})
        step = f"to keep them: {way_out}" if way_out else "see --help"
        raise refused(f"--src {src}: no picture is left ({causes}; first: {first}); {step}")
    skipped = [*inventory.skipped, *skipped, *_unused(inventory, captions, prepared, src)]
    skipped.sort(key=lambda skip: skip.source.split("/"))
    outcome = _account(destination, inventory, prepared, skipped, [*captions.notes, *_enlarged(prepared)])
    if not config.dry_run:
        from src.preparation.contact_sheet import write_report  # matplotlib: a second that --dry-run need not pay

        facts = {
            "trigger": clean(config.trigger) if config.trigger else None, "settings": config.recorded(),
            "counts": outcome.counts(), "skipped": [asdict(skip) for skip in skipped],
        }  # fmt: skip
        sources = {skip.source for skip in skipped}
        left_out = [item for item in examined if item.sha256 and item.source in sources]

        def report() -> bytes:  # asked for when pictures of an earlier run have made way for those of this one
            return write_report(outcome, config, {item.source: destination.place_of(item) for item in left_out})

        destination.publish(prepared, facts, report)
    return outcome


def _examine_all(
    config: PrepareConfig, terminal: Terminal, inventory: Inventory, destination: Destination, src: Path
) -> list[Examined]:
    desk = Desk(src, None if config.dry_run else destination.shelf, config, destination.known)
    inputs = [(name, inventory.masks.get(name)) for name in inventory.pictures]
    examined: list[Examined] = []
    terminal.start_progress(len(inputs))
    try:
        for result in work(examine, desk, inputs, process_count(config.workers, len(inputs))):
            examined.append(result)
            terminal.progress(len(examined), "pictures")
    finally:
        terminal.end_progress()
    return examined


def _describe(
    config: PrepareConfig, terminal: Terminal, silent: Sequence[Examined], destination: Destination
) -> dict[str, tuple[str, str]]:
    """(captioner, caption) by source for pictures without one, where a captioner was asked for; none in a dry run."""
    if config.caption is None or not silent or config.dry_run:
        return {}
    return describe_all(config, silent, destination, terminal)


def _worded(
    item: Examined, captions: FoundCaptions, described: tuple[str, str] | None, config: PrepareConfig, src: Path
) -> Prepared:
    path = src / item.source
    captioner, description = described or ("", "")
    found = captions.texts[path] or tuple(filter(None, [description]))
    if captions.texts[path]:
        origin = captions.origins[path].relative_to(src).as_posix() if path in captions.origins else "folder name"
    else:
        origin = captioner if description else "template"
    worded = word_captions(found, config)
    return Prepared(item, worded, origin if worded else "", repeats_of(src, path), described=described)


def _unused(inventory: Inventory, captions: FoundCaptions, prepared: Sequence[Prepared], src: Path) -> list[Skip]:
    """Caption files and masks that belong to nothing in the result."""
    kept = {item.picture.source for item in prepared}
    used = {item.caption_from for item in prepared}
    wanted = {path.relative_to(src).as_posix() for path in captions.origins.values()}
    empty = {path.relative_to(src).as_posix() for path in captions.empty}
    stems = {Path(name).with_suffix("") for name in inventory.pictures}
    skips = []
    for name in inventory.captions:
        if name in used:
            continue
        if name in wanted:
            reason = "its pictures are left out"
        elif name in empty:
            reason = "empty"
        elif Path(name).name in METADATA_NAMES:
            reason = "names no picture here, or nearer captions are used"
        elif Path(name).with_suffix("") in stems:
            reason = "a nearer caption is used"
        else:
            reason = "no picture of that name is beside it"
        skips.append(Skip(name, "unused caption", reason))
    for picture, mask in inventory.masks.items():
        if picture not in kept:
            skips.append(Skip(mask, "mask without picture", "its picture is left out"))
    for item in prepared:
        if item.picture.mask_problem is not None:
            skips.append(Skip(item.picture.mask, "unreadable mask", item.picture.mask_problem))
    return skips


def _enlarged(prepared: Sequence[Prepared]) -> list[str]:
    """Nothing is enlarged silently: a note, if something was."""
    names = [item.picture.source for item in prepared if item.picture.enlarged > 1]
    return [f"pictures enlarged, which makes them soft: {len(names)}, first {printable(names[0])}"] if names else []


def _account(
    destination: Destination, inventory: Inventory, prepared: Sequence[Prepared], skipped: Sequence[Skip], notes: Sequence[str]
) -> Outcome:
    """The outcome, after the law that every file found is in the result or on the list of those left out."""
    unused = {skip.source for skip in skipped}
    caption_files = sum(name not in unused for name in inventory.captions)
    masks = sum(bool(item.picture.mask_sha256) for item in prepared)
    taken_over = sum(item.picture.key in destination.known for item in prepared)
    accounted = len(prepared) + masks + caption_files + len(skipped)
    if accounted != len(inventory):
        raise AssertionError(f"{len(inventory)} files were found, {accounted} accounted for")
    return Outcome(
        destination.folder, len(inventory), tuple(prepared), tuple(skipped), caption_files, masks, tuple(notes), taken_over
    )


@contextmanager
def _alone(destination: Destination) -> Iterator[None]:
    """Keep a second preparation from the same folder meanwhile. Raises UserError (refused)."""
    with ExitStack() as stack:
        try:
            stack.enter_context(folders.locked(destination.shelf))
        except UserError as error:
            if error.exit_code != ExitCode.REFUSED:
                raise
            raise refused(
                f"--dst {destination.folder}: another prepare_dataset is at work there; wait for it or choose another folder"
            ) from None
        yield


def _check_colour(name: str) -> None:
    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise usage_error(f"--background {name}: is no colour; write a name such as white, or #rrggbb") from None
