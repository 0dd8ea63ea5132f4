"""``attention``: which word drew what. Cross-attention laid over the picture, word by word, early, middle and late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import ExitCode, usage_error
from src.evaluation import drawing
from src.flags import Flag

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from src.evaluation.attention_maps import Recording, Word
    from src.generator import Step, TextToImageGenerator

SUMMARY = "which word drew what: a picture with the cross-attention of each word of its prompt over it"
SHEET, MAPS = "attention.png", "maps.safetensors"
MAX_WORDS = 12  # where none are asked for
MAX_CURVES = 6  # that colours still tell apart
_REPORT_PX = 256
_PARTS = ("early", "middle", "late")
MAX_PARTS = 50

_ABOUT = """\
At every step each cross-attention of the U-Net shares its attention out over the tokens, for each place of the picture. A \
map is a word's part of it: the mean over heads, over layers of all resolutions, and over the word's tokens; under guidance \
of the half that follows the prompt. Bright is much and dark is little for that word: each word has a scale of its own, one \
for all its rows. Most of the attention lies on the token that begins the text, so that shares are small; the table has them. \
Early steps lay out the picture, late ones its details. The pictures of the first column are what was expected at that point."""

FLAGS = (
    Flag(("--words",), "words or phrases of the prompt, separated by commas (default: all but the smallest)", metavar="W,W"),
    Flag(
        ("--parts",),
        "rows below that of all steps; as many as steps shows each (default: 3)",
        kind=int,
        metavar="N",
    ),
    Flag(("--seed",), f"of the picture (default: {drawing.FIRST_SEED})", "generation.seed", int, "N"),
)


@dataclass(slots=True)
class Row:
    """Some of the steps: their number, and what they show."""

    name: str
    calls: range  # of the U-Net
    picture: Image.Image | None = None  # as it was expected after the last of them
    maps: torch.Tensor | None = None  # (W, h, w), mean over the calls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt, as main.py reads it")
    drawing.add_flags(parser, FLAGS)


def run(options: argparse.Namespace, say: drawing.Say) -> int:
    """Draw one picture, recording, and write the sheet, the maps and the report. Returns the exit code."""
    folder, typed = drawing.read_typed(options, say)
    wanted = [part.strip() for part in typed.pop("words", "").split(",") if part.strip()]
    parts = typed.pop("parts", len(_PARTS))
    if not 1 <= parts <= MAX_PARTS:
        raise usage_error(f"--parts {parts} is outside 1 to {MAX_PARTS}")
    order = drawing.OrderDesk(say).order(typed)
    if parts > max(len(_PARTS), order.request.num_inference_steps):
        raise usage_error(f"--parts {parts} is more than --steps {order.request.num_inference_steps}; ask for fewer parts")
    if order.config.optimization.enable_torch_compile:
        raise usage_error("attention maps and --torch-compile do not go together; leave --torch-compile out")
    if order.request.deep_cache > 1:
        raise usage_error("--deep-cache leaves most of the attention out of most steps; leave --deep-cache out")
    from src.evaluation import attention_maps

    order, text = _settled(order)
    weighted = order.request.prompt_weights
    with drawing.Artist(say, [order]) as artist:
        artist.generator.config = order.config
        pipeline = artist.generator.model.pipeline
        if wanted:
            words = attention_maps.find_words(pipeline, text, weighted, wanted)
        else:
            words = attention_maps.words_of(pipeline, text, weighted)
        if not words:
            raise usage_error("attention: the prompt holds no word to show; name some with --words")
        if len(words) > MAX_WORDS and not wanted:
            say(f"words   {len(words)} are too many for a sheet: the first {MAX_WORDS} are shown; choose with --words")
            words = words[:MAX_WORDS]
        previews = _Previews(artist.generator, parts, order.request.num_inference_steps)
        with attention_maps.recorded(pipeline) as recording:
            picture = artist.draw(order, previews.note)
        path = artist.save(picture, "attention")
    rows = _rows(recording, words, picture, previews)
    facts = drawing.facts_of(picture) | {"file": str(path.relative_to(folder))}
    for written in _write(folder, words, rows, recording, facts):
        print(written)
    return ExitCode.OK


def _settled(order: drawing.Order) -> tuple[drawing.Order, str]:
    """The order with wildcards filled in, and the text that is encoded."""
    from src import prompts

    request = order.request
    prompt = prompts.clean_prompt(request.prompt)
    if request.wildcards:
        prompt = prompts.expand_wildcards(prompt, request.seed, order.config.paths.folder("wildcards"))
    text, _ = prompts.extract_loras(prompt)
    return replace(order, request=replace(request, prompt=prompt, wildcards=False)), text


class _Previews:
    """What the picture is expected to be, after each part of the steps but the last."""

    def __init__(self, generator: TextToImageGenerator, parts: int, steps: int) -> None:
        self.pictures: list[Image.Image | None] = []
        self.parts, self.steps, self._generator = parts, steps, generator

    def note(self, step: Step) -> None:
        if len(self.pictures) < self.parts - 1 and step.fraction >= (len(self.pictures) + 1) / self.parts - 1e-6:
            self.pictures.append(next(iter(self._generator.preview(step.latents())), None))


def _rows(recording: Recording, words: Sequence[Word], picture: Image.Image, previews: _Previews) -> list[Row]:
    """All steps, then their parts, as far as there are steps enough."""
    import torch

    from src.evaluation.attention_maps import word_maps

    count = len(recording.maps)
    rows = [Row("all steps" if count > 1 else "the step", range(count), picture)]
    parts = previews.parts
    if count >= parts > 1:
        edges = [round(count * part / parts) for part in range(parts + 1)]
        expected = [*previews.pictures, *[None] * parts][: parts - 1]  # a preview that could not be decoded is none
        what = "step" if count == previews.steps else "call"
        for number, (start, stop, seen) in enumerate(zip(edges, edges[1:], [*expected, picture])):
            name = f"{_PARTS[number]}, {start + 1} to {stop}" if parts == len(_PARTS) else _numbers(what, start, stop)
            rows.append(Row(name, range(start, stop), seen))
    for row in rows:
        row.maps = word_maps(torch.stack([recording.maps[call] for call in row.calls]).mean(dim=0), words)
    return rows


def _numbers(what: str, start: int, stop: int) -> str:
    """ "step 4" or "steps 4 to 6" of calls 3 to 5; "call": some samplers ask the U-Net twice in a step."""
    return f"{what} {stop}" if stop == start + 1 else f"{what}s {start + 1} to {stop}"


def _write(folder: Path, words: Sequence[Word], rows: Sequence[Row], recording: Recording, facts: dict[str, Any]) -> list[Path]:
    """The sheet, the maps, the figures and the report; returns their paths."""
    import safetensors.torch
    import torch

    from src import files, images, report
    from src.evaluation import results
    from src.evaluation.attention_maps import word_maps
    from src.evaluation.overlay import heat
    from src.evaluation.sheet import cell_limit_px, draw_sheet, shrunk

    limit_px = cell_limit_px(1 + len(words), len(rows))
    picture = shrunk(rows[0].picture, max(limit_px, _REPORT_PX))
    all_maps = torch.stack([row.maps for row in rows]).numpy()  # (R, W, h, w)
    low, high = all_maps.min(axis=(0, 2, 3)), all_maps.max(axis=(0, 2, 3))
    cells = [
        [row.picture and row.picture.resize(picture.size), *(heat(picture, *scaled) for scaled in zip(maps, low, high))]
        for row, maps in zip(rows, all_maps)
    ]
    names, labels = ["picture", *(word.text for word in words)], [row.name for row in rows]
    title = "{prompt} · {model} · seed {seed} · {steps} steps · guidance {guidance_scale:g}".format(**facts)
    sheet = draw_sheet([[cell and shrunk(cell, limit_px) for cell in row] for row in cells], names, labels, title)
    by_call = torch.stack([word_maps(maps, words) for maps in recording.maps], dim=1)  # (W, calls, h, w)
    tensors = {word.text: maps.contiguous() for word, maps in zip(words, by_call)}
    files.check_writable_folder(folder)
    paths = [
        files.publish_bytes(folder / SHEET, images.encode_png(sheet, {"title": title})),
        files.publish_bytes(folder / MAPS, safetensors.torch.save(tensors)),
    ]
    figures = [_figures(word, maps) for word, maps in zip(words, by_call)]
    result = {**facts, "calls": len(recording.maps), "timesteps": recording.timesteps, "words": figures}
    page = report.page(
        "Which word drew what",
        report.text(title),
        report.section("Attention", report.table(["", *names], _shown(labels, cells)), report.text(_ABOUT)),
        report.section("Words", *_word_parts(figures)),
    )
    return [*paths, results.publish(folder, "attention", result, page)]


def _shown(labels: Sequence[str], cells: Sequence[Sequence[Image.Image | None]]) -> list[list[str | None]]:
    from src import report

    return [[label, *(cell and report.picture(cell, max_px=_REPORT_PX) for cell in row)] for label, row in zip(labels, cells)]


def _word_parts(figures: Sequence[dict[str, Any]]) -> list[str]:
    """The words' table, and their curves where there is more than one step."""
    from src import report

    columns = ["word", "tokens", "mean share", "largest share", "x of the largest", "y of the largest"]
    table = report.table(
        columns, [[item["word"], item["tokens"], item["mean"], item["max"], *item["max_at"]] for item in figures]
    )
    if len(figures[0]["mean_by_call"]) == 1:
        return [table]
    largest = sorted(figures, key=lambda item: item["mean"], reverse=True)[:MAX_CURVES]
    curves = {item["word"]: list(enumerate(item["mean_by_call"], start=1)) for item in largest}
    title = "Mean share, step by step" + ("" if len(largest) == len(figures) else f": the {MAX_CURVES} largest")
    return [table, report.curves(title, curves, "call of the U-Net", "share")]


def _figures(word: Word, maps: torch.Tensor) -> dict[str, Any]:
    """A word in numbers; maps are (calls, h, w), places are shares of the picture's width and height."""
    mean = maps.mean(dim=0)
    height, width = mean.shape
    y, x = divmod(int(mean.argmax()), width)
    return {
        "word": word.text, "tokens": len(word.places), "places": word.places, "mean": mean.mean().item(),
        "max": mean.max().item(), "max_at": [(x + 0.5) / width, (y + 0.5) / height],
        "mean_by_call": maps.mean(dim=(1, 2)).tolist(),
    }  # fmt: skip
