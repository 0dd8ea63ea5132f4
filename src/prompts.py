"""The prompt's grammar: weights, BREAK, LoRA tags, wildcards, and the cut into a text encoder's windows.

Pure text in, pure values out. The grammar is AUTOMATIC1111's (A1111), so that a prompt found on the web means here what
it means there. Order of use: ``clean_prompt``, ``expand_wildcards``, ``extract_loras``, ``parse_weights``, ``chunk_prompt``.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from src.errors import UserError, not_found, refused, usage_error
from src.files import require_file, safe_join

ROUND_BRACKET_FACTOR = 1.1
SQUARE_BRACKET_FACTOR = 1 / 1.1
MAX_OPEN_BRACKETS = 256  # 1.1^256 = 4e10: far beyond sense, and it keeps the parser linear in the prompt's length
MAX_WILDCARD_DEPTH = 32
MAX_WILDCARDS = 1000  # choices made in one prompt; a file that names itself twice would double forever
MAX_WILDCARD_FILE_BYTES = 16 * 2**20

# White space that moves the cursor, and the two Unicode line ends, become a space; every other control character goes.
# The bidirectional marks go too: they make a terminal show a text that is not there.
_SPACING = re.compile(r"\r\n|[\t\n\v\f\r\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean_prompt(text: str) -> str:
    """Make text from outside (flag, job file, picture, wildcard file) safe to print, store and tokenize.

    Line breaks and tabs become spaces, other control characters vanish, lone surrogates become U+FFFD. Idempotent.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins pairs, replaces lone halves
    return _CONTROL.sub("", _SPACING.sub(" ", whole))


def decode_utf8(data: bytes, name: str, next_step: str = "save the file as UTF-8") -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one, as PowerShell's ``>`` writes it.

    Raises UserError (refused) with the line, the byte, ``next_step``.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)  # counted behind the mark
        line = data.count(b"\n", 0, start) + 1
        raise refused(f"{name}: line {line} is not UTF-8 (byte 0x{data[start]:02x}); {next_step}") from None


# --- weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text with one attention weight; a BREAK has ``is_break`` and no text."""

    text: str
    weight: float
    is_break: bool = False


_TOKEN = re.compile(
    r"""
      \\(?P<escaped>[()\[\]\\]?)                                  # \( is a plain bracket; any other backslash vanishes
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)           # the end of (text:1.3)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


def parse_weights(prompt: str) -> list[Segment]:
    r"""Read ``(a)`` x1.1, ``[a]`` /1.1, ``(a:1.3)``, all nestable, ``\( \) \[ \] \\`` as plain characters, and ``BREAK``.

    As in A1111's ``parse_prompt_attention``: a bracket left open reaches to the end, a closing bracket without an opening
    one is text, a weight counts for round brackets alone (``[a:1.3]`` is the text "a:1.3" / 1.1), equal neighbours merge.
    A1111's schedules (``[from:to:0.5]``, ``[a|b]``) are not known here and so read as plain square brackets.
    Two deliberate differences: BREAK breaks inside brackets as well, and ``(a:1.2.3)`` is text x1.1 instead of a crash.

    Returns at least one segment. Raises UserError (usage) for more than 256 brackets open at once or an infinite weight.
    """
    texts: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where the text of each open bracket begins

    def multiply_from(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _TOKEN.finditer(prompt):
        kind, token = match.lastgroup, match[0]
        if kind == "open":
            opened[token].append(len(texts))
            if sum(map(len, opened.values())) > MAX_OPEN_BRACKETS:
                raise usage_error(f"prompt: over {MAX_OPEN_BRACKETS} brackets are open at once; write \\( for a plain one")
        elif kind == "weight" and opened["("]:
            multiply_from(opened["("].pop(), float(match["weight"]))
        elif token == ")" and opened["("]:
            multiply_from(opened["("].pop(), ROUND_BRACKET_FACTOR)
        elif token == "]" and opened["["]:
            multiply_from(opened["["].pop(), SQUARE_BRACKET_FACTOR)
        else:
            new = [match["escaped"]] if kind == "escaped" else _split_breaks(token)
            texts += new
            weights += [1.0] * len(new)
    for start in opened["("]:
        multiply_from(start, ROUND_BRACKET_FACTOR)
    for start in opened["["]:
        multiply_from(start, SQUARE_BRACKET_FACTOR)
    if not all(map(math.isfinite, weights)):
        raise usage_error("prompt: a weight is infinite; write weights such as (text:1.3)")
    return _merge(texts, weights)


_SQUARE = re.compile(r"(?<!\\)\[([^\[\]{}]*)\]")
_SCHEDULE = re.compile(r":\s*(\d+\.?\d*|\.\d+)\s*$")


def unsupported_syntax(prompt: str) -> str | None:
    """Name what A1111 would schedule or combine (``[from:to:0.5]``, ``[a|b]``, ``AND``) and is plain text here; else None."""
    for match in _SQUARE.finditer(prompt):
        if "|" in match[1] or _SCHEDULE.search(match[1]):
            return f"'{match[0][:60]}' is drawn as text: prompts that change while drawing are not known here"
    if re.search(r"\bAND\b", prompt):
        return "'AND' is drawn as text: combining prompts is not known here; a comma or BREAK comes nearest"
    return None


def _split_breaks(text: str) -> list[str | None]:
    """The text between BREAKs, without the white space around them, and None for each BREAK."""
    parts: list[str | None] = []
    position = 0
    for match in _BREAK.finditer(text):
        parts += [text[position : match.start()].strip() if parts else text[: match.start()].rstrip(), None]
        position = match.end()
    return [*parts, text[position:].lstrip() if parts else text]


def _merge(texts: Sequence[str | None], weights: Sequence[float]) -> list[Segment]:
    """Join neighbours of equal weight (exactly equal, as A1111 compares them), then drop those without text."""
    segments: list[Segment] = []
    for text, weight in zip(texts, weights):
        if text is None:
            segments.append(Segment("", 1.0, is_break=True))
        elif segments and not segments[-1].is_break and segments[-1].weight == weight:
            segments[-1] = Segment(segments[-1].text + text, weight)
        else:
            segments.append(Segment(text, weight))
    return [segment for segment in segments if segment.text or segment.is_break] or [Segment("", 1.0)]


# --- chunks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """At most a window of tokens, without begin, end and padding, and each token's weight."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def chunk_prompt(
    segments: Sequence[Segment],
    tokenize: Callable[[str], list[int]],
    comma_token: int | None,
    window: int = 75,
    comma_backtrack: int = 20,
) -> list[Chunk]:
    """Cut a prompt of any length into windows, where A1111 cuts it: no token is lost and their order is kept.

    When a window is full and a comma stands among its last ``comma_backtrack`` tokens, what follows the last comma
    moves to the next window, so that a phrase is not torn; a BREAK closes a window at once. ``comma_token`` is the
    tokenizer's id of ",", None for a tokenizer without one. Returns at least one chunk; two BREAKs in a row enclose an
    empty one, a BREAK at the end opens none. Source: A1111, ``tokenize_line``.
    """
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    last_comma: int | None = None  # its place in the window being filled

    def close_window(size: int) -> None:
        """Emit the first ``size`` tokens and begin the next window with the others."""
        nonlocal tokens, weights, last_comma
        chunks.append(Chunk(tuple(tokens[:size]), tuple(weights[:size])))
        tokens, weights, last_comma = tokens[size:], weights[size:], None

    for segment in segments:
        if segment.is_break:
            close_window(len(tokens))
            continue
        for token in tokenize(segment.text):
            if len(tokens) == window:
                size = window
                if token != comma_token and last_comma is not None and window - last_comma <= comma_backtrack:
                    size = last_comma + 1
                close_window(size)
            elif token == comma_token:
                last_comma = len(tokens)
            tokens.append(token)
            weights.append(segment.weight)
    if tokens or not chunks:
        close_window(len(tokens))
    return chunks


# --- LoRA tags ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoraTag:
    """``<lora:name:weight>``: a LoRA by the stem of its file name."""

    name: str
    weight: float = 1.0


_LORA_TAG = re.compile(r"<lora:([^<>]*)(>?)", re.IGNORECASE)


def extract_loras(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """Take the ``<lora:name:0.8>`` tags out of a prompt (weight 1 when absent): the text without them, and the tags.

    Raises UserError (usage) for a malformed tag, UserError (refused) for a name that is a path: a prompt may come from
    a stranger's picture and must not choose files.
    """
    tags = tuple(_parse_lora_tag(match) for match in _LORA_TAG.finditer(prompt))
    return _LORA_TAG.sub("", prompt), tags


def _parse_lora_tag(match: re.Match[str]) -> LoraTag:
    tag = repr(match[0][:80])
    if not match[2]:
        raise usage_error(f"prompt: {tag} is not closed; write <lora:name:0.8>")
    name, *weights = (part.strip() for part in match[1].split(":"))
    if not name or len(weights) > 1:
        raise usage_error(f"prompt: {tag} is not understood; a name and one weight are read: <lora:name:0.8>")
    if name in {".", ".."} or re.search(r"[/\\]", name) or not name.isprintable():
        raise refused(f"prompt: {tag} names a path; put the file into the LoRA folder and write its name alone")
    try:
        weight = float(weights[0]) if weights else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise usage_error(f"prompt: {tag}: the weight is not a number; write <lora:name:0.8>")
    return LoraTag(name, weight)


# --- wildcards ---------------------------------------------------------------------------------------------------------

_WILDCARD = re.compile(r"\\(?P<escaped>.)|(?P<open>\{)|__(?P<name>(?!_)[\w./\\~:-]+?)__", re.DOTALL)
_BRACE = re.compile(r"\\.|[{|}]", re.DOTALL)


def expand_wildcards(prompt: str, seed: int, folder: Path) -> str:
    r"""Replace ``{a|b|c}`` by one of its options and ``__name__`` by one line of ``folder/name.txt``, at any depth.

    The same prompt, seed and files give the same text. ``__animals/cat__`` reads a subfolder's file; a file holds one
    option a line (UTF-8), blank lines and lines that begin with ``#`` do not count. Braces without ``|`` stay as they are;
    ``\{``, ``\|``, ``\}`` and ``\_`` are plain characters.

    Raises UserError: not found for a missing file, refused for one that is not UTF-8, has no options, is too large or
    lies outside ``folder``, usage for files that name themselves without end.
    """
    return next(expand_by_seeds(prompt, [seed], folder))


def expand_by_seeds(prompt: str, seeds: Iterable[int], folder: Path) -> Iterator[str]:
    """The text that ``expand_wildcards`` makes of a prompt with each seed; a file is read once for them all."""
    options: dict[str, list[str]] = {}
    for seed in seeds:
        yield _WildcardExpander(random.Random(seed), folder, options=options).expand(prompt)


def wildcard_files(prompt: str, folder: Path) -> dict[str, Path]:
    """Name -> file of all that ``expand_wildcards`` may read for a prompt, whatever the seed; without what cannot be read."""
    found: dict[str, Path] = {}
    texts = [prompt]
    while texts:
        names = (match["name"] for match in _WILDCARD.finditer(texts.pop()))
        for name in {name for name in names if name} - found.keys():
            with contextlib.suppress(UserError):
                texts += _read_wildcard_file(folder, name)
                found[name] = safe_join(folder, f"{name}.txt")
    return found


@dataclass(slots=True)
class _WildcardExpander:
    rng: random.Random
    folder: Path
    choices_made: int = 0
    options: dict[str, list[str]] = field(default_factory=dict)  # by wildcard name

    def expand(self, text: str, depth: int = 0) -> str:
        if depth > MAX_WILDCARD_DEPTH:
            raise usage_error(f"prompt: wildcards nest over {MAX_WILDCARD_DEPTH} deep; take out the file that names itself")
        groups = _find_choices(text)
        parts: list[str] = []
        position = 0
        while match := _WILDCARD.search(text, position):
            parts.append(text[position : match.start()])
            position = match.end()
            if match.lastgroup == "escaped":
                parts.append(match["escaped"] if match["escaped"] in "{|}_" else match[0])
            elif match.lastgroup == "name":
                parts.append(self._choose(self._read_options(match["name"]), depth))
            elif bars := groups.get(match.start()):
                parts.append(self._choose([text[start + 1 : end] for start, end in pairwise(bars)], depth))
                position = bars[-1] + 1
            else:
                parts.append("{")
        return "".join(parts) + text[position:]

    def _choose(self, options: Sequence[str], depth: int) -> str:
        self.choices_made += 1
        if self.choices_made > MAX_WILDCARDS:
            raise usage_error(f"prompt: over {MAX_WILDCARDS} wildcards to replace; take out the file that names itself")
        return self.expand(self.rng.choice(options), depth + 1)

    def _read_options(self, name: str) -> list[str]:
        if name not in self.options:
            self.options[name] = _read_wildcard_file(self.folder, name)
        return self.options[name]


def _find_choices(text: str) -> dict[int, list[int]]:
    """For each ``{`` that begins a choice: the places of itself, its own bars and its ``}``."""
    groups: dict[int, list[int]] = {}
    open_groups: list[list[int]] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_groups.append([match.start()])
        elif match[0] == "|" and open_groups:
            open_groups[-1].append(match.start())
        elif match[0] == "}" and open_groups:
            group = open_groups.pop()
            if len(group) > 1:
                groups[group[0]] = [*group, match.start()]
    return groups


def _read_wildcard_file(folder: Path, name: str) -> list[str]:
    path = safe_join(folder, f"{name}.txt")
    if not path.exists():
        raise _wildcard_not_found(folder, name)
    if require_file(path).st_size > MAX_WILDCARD_FILE_BYTES:
        raise refused(f"{path}: larger than {MAX_WILDCARD_FILE_BYTES // 2**20} MiB; split it into smaller wildcard files")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise refused(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    lines = [clean_prompt(line).strip() for line in decode_utf8(data, str(path)).splitlines()]
    options = [line for line in lines if line and not line.startswith("#")]
    if not options:
        raise refused(f"{path}: holds no options; write one per line")
    return options


def _wildcard_not_found(folder: Path, name: str) -> UserError:
    known = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.txt"))
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        hint = f"did you mean __{close[0]}__?"
    else:
        hint = f"there are: {', '.join(known[:10])}" if known else f"put {name}.txt, one option per line, into that folder"
    return not_found(f"prompt: no wildcard file {name}.txt in {folder}; {hint}")
