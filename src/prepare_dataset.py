"""The door of ``python -m src.prepare_dataset``: from a folder of photos to a folder that can be trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from src.config import set_value
from src.doors import answer
from src.errors import ExitCode
from src.flags import CommandLine, Flag, switch
from src.preparation.settings import CAPTIONERS, CROPS, PrepareConfig, PrepareRun, check
from src.terminal import Terminal

if TYPE_CHECKING:
    from src.preparation.preparing import Outcome

USAGE = "python -m src.prepare_dataset --src DIR --dst DIR [options]"

EPILOG = """examples:
  python -m src.prepare_dataset --src ./data/raw --dst ./data/train --size 512 --trigger "sks dog"
  python -m src.prepare_dataset --src ./art --dst ./data/train --size 1024 --buckets --trigger sks --caption-template "{caption}, {trigger} style"
  python -m src.prepare_dataset --src ./data/raw --dst ./data/train --dry-run

Captions: NAME.txt beside NAME.jpg (each line is one), metadata.jsonl, metadata.csv, or the names of folders such as "10_sks dog".
The source folder is never changed. The same command again goes on where it was stopped and redoes only what has changed.

exit codes: 0 done, 1 failure, 2 wrong usage, 3 out of memory, 4 not found, 6 input refused, 130 interrupted"""

_SHOWN = 10  # pictures that were left out, on the terminal

FLAGS: dict[str, tuple[Flag, ...]] = {
    "folders": (
        Flag(("--src",), "your pictures, in any depth of folders", "prepare.src", metavar="DIR"),
        Flag(("--dst",), "the data set to make", "prepare.dst", metavar="DIR"),
        switch("--overwrite", "also what you have changed in the data set by hand", "prepare.overwrite"),
    ),
    "pictures": (
        Flag(("--size", "--resolution"), "pixels, a multiple of 8", "prepare.size", int, "PX"),
        Flag(("--crop",), " | ".join(CROPS) + ": in the middle, or around detail, colour and skin", "prepare.crop", metavar="NAME", choices=CROPS),
        switch("--buckets", "keep aspect ratios: sides are multiples of 64, the area is that of --size", "prepare.buckets"),
        Flag(("--background",), "colour behind transparency", "prepare.background", metavar="COLOUR"),
        switch("--allow-upscale", "enlarge pictures that are too small, in place of leaving them out", "prepare.allow_upscale"),
    ),
    "what is left out": (
        switch("--keep-blurred", "keep blurred pictures", "prepare.keep_blurred"),
        Flag(("--blur-threshold",), "sharpness below which a picture is blurred", "prepare.blur_threshold", float, "X"),
        switch("--keep-duplicates", "keep near-duplicates", "prepare.keep_duplicates"),
        Flag(("--duplicate-distance",), "bits of 64 in which hashes of near-duplicates may differ", "prepare.duplicate_distance", int, "N"),
        switch("--keep-uncaptioned", "keep pictures without a caption", "prepare.keep_uncaptioned"),
    ),
    "captions": (
        Flag(("--trigger",), "the words that shall mean your subject; put before captions that lack them", "prepare.trigger", metavar="TEXT"),
        Flag(("--caption-template",), "for pictures without a caption, or with {caption} for all", "prepare.caption_template", metavar="TEXT"),
        Flag(("--caption-prefix",), "words before every caption; may be repeated", "prepare.caption_prefix", metavar="TEXT", repeat=True),
        Flag(("--caption-suffix",), "words after every caption; may be repeated", "prepare.caption_suffix", metavar="TEXT", repeat=True),
        Flag(("--caption",), " | ".join(CAPTIONERS) + ": describe pictures without a caption", "prepare.caption", metavar="NAME", choices=CAPTIONERS),
        Flag(("--captioner",), "its model: a folder, or a hub id that is on disk", "prepare.captioner", metavar="MODEL"),
    ),
    "run": (
        switch("--dry-run", "say what would be left out; writes nothing", "prepare.dry_run"),
        Flag(("--workers",), "processes (default: one a core, at most 4)", "prepare.workers", int, "N"),
        switch("--json", "the summary as JSON on stdout"),
        switch("--debug", "show the traceback of an error"),
        Flag(("--help", "-h"), "print this", kind=None),
    ),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code. Errors are one line; ``--debug`` adds the traceback."""
    return answer(argv, _run, "interrupted; the same command goes on from here", as_json="--json" in argv)


def command_line() -> CommandLine:
    """The flags of this door."""
    return CommandLine(
        FLAGS, prog="prepare_dataset", usage=USAGE, epilog=EPILOG, defaults=PrepareRun().to_dict(),
        description="Make a folder of pictures with captions that can be trained on out of a folder of photos.",
    )  # fmt: skip


def read_config(typed: dict[str, Any]) -> PrepareConfig:
    """What was typed over the defaults, checked. Raises UserError (usage)."""
    run = PrepareRun()
    for name, value in typed.items():
        if isinstance(value, str) and not value.strip():
            setattr(run.prepare, name.partition(".")[2], value)  # set_value takes "" for null; check() refuses it by name
        elif "." in name:
            set_value(run, name, value)
    check(run.prepare)
    return run.prepare


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    line = command_line()
    typed = line.parse(argv)
    if "help" in typed:
        print(line.help_text())
        return ExitCode.OK
    config = read_config(typed)
    from src.preparation.preparing import prepare  # Pillow and numpy: --help must not pay for them

    outcome = prepare(config, terminal)
    if terminal.as_json:
        print(json.dumps({"folder": str(outcome.folder), **outcome.counts(), "notes": outcome.notes}))
    _tell(outcome, config, terminal)
    return ExitCode.OK


def _tell(outcome: Outcome, config: PrepareConfig, terminal: Terminal) -> None:
    """The summary: what became of the pictures, where to look, and what to type next."""
    from src.captions import printable
    from src.preparation.findings import overruled_by
    from src.terminal import counted

    for note in outcome.notes:
        terminal.say(note)
    listed = [skip for skip in outcome.skipped if skip.is_picture or config.dry_run]
    shown = listed if config.dry_run else listed[:_SHOWN]
    for skip in shown:
        terminal.say(printable(f"{'would leave' if config.dry_run else 'left'} out {skip.source}: {skip.kind}, {skip.reason}"))
    if len(listed) > len(shown):
        terminal.say(f"... and {len(listed) - len(shown):,} more, all in the report")
    left_out = outcome.skipped_pictures
    causes = ", ".join(f"{count:,} {kind}" for kind, count in sorted(left_out.items()))
    verb = "would be prepared" if config.dry_run else "prepared"
    total = f"{sum(left_out.values()):,} left out" + (f" ({causes})" if causes else "")
    before = f" ({outcome.taken_over:,} of them before)" if outcome.taken_over else ""
    terminal.say(f"{counted(len(outcome.prepared), 'picture')} {verb}{before}, {total}")
    if way_out := overruled_by(left_out):
        terminal.say(f"to keep them: {way_out}")
    if not config.dry_run:
        terminal.say(f"report: {outcome.folder / 'report.html'}")
        terminal.say(f"next:   {config.next_command()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
