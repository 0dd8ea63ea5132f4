"""The verb ``quality``: the distance between two folders of pictures, by every measure in use."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import folders, quiet
from src.arguments import build_config
from src.errors import ExitCode, not_found, usage_error
from src.evaluation import inputs
from src.files import check_writable_folder
from src.images import encode_png
from src.request import user_path
from src.terminal import Terminal, counted

if TYPE_CHECKING:
    import numpy as np

    from src.evaluation.figures import Figure, Seen

SCENES = "scenes"  # --real: not a folder, but what the project draws itself
SUMMARY = "two folders of pictures: FID, KID, CMMD, CLIP score, precision, recall, copies"

_NO_CLIP = "no CLIP is given, and none with an image tower is on this disk"
_OWN_CLIP = "CLIP    the embedded model's own: it knows the project's drawn scenes alone; for other pictures give --clip FOLDER"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two sets."""

    folder: Path
    pictures: list[Path]
    found: int  # before --max-pictures
    is_drawn: bool = False  # scenes of the project's own

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": "held-out scenes" if self.is_drawn else self.folder.resolve().name,
            "pictures": len(self.pictures),
            "found": self.found,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is to be measured, checked as far as that goes without torch."""

    real: Side
    generated: Side
    clip: Path | None
    inception: Path | None
    prompts: list[str | None] | None  # of the generated pictures; None: not asked for
    seed: int
    device: str
    output: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb."""
    add = parser.add_argument
    add(
        "--real", metavar="DIR", required=True,
        help="pictures of the world: held-out ones, never those that were learnt; scenes: held-out scenes, as many as there "
        "are generated pictures, drawn into OUTPUT/real",
    )  # fmt: skip
    add("--generated", metavar="DIR", required=True, help="pictures of the model")
    add("--clip", metavar="FOLDER", help="a CLIPModel folder of transformers (default: the first on this disk)")
    add("--inception", metavar="FILE", help="FID's Inception v3 as .safetensors, for FID, KID and inception score")
    add(
        "--prompts", choices=inputs.PROMPT_SOURCES, default="auto",
        help="of the generated pictures: from their recipes, their captions, or both in turn (default: %(default)s)",
    )  # fmt: skip
    add("--max-pictures", metavar="N", type=int, help="of each folder, drawn by --seed (default: all)")
    add("--seed", metavar="N", type=int, default=0, help="of samples, subsets and splits (default: %(default)s)")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: %(default)s)")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Measure, write both files and print the table. Raises UserError."""
    comparison = read_comparison(options, say)
    quiet.silence_libraries()
    from src.evaluation import quality_report, results

    seen, found = _measure(comparison, say)
    by = next(iter(seen.values()))  # CLIP where there is one: it sees what a picture shows
    copies = quality_report.copies(by)
    result = {
        "real": comparison.real.as_json(), "generated": comparison.generated.as_json(), "seed": comparison.seed,
        "prompts": None if comparison.prompts is None else len(comparison.prompts) - comparison.prompts.count(None),
        "extractors": {name: int(item.real.shape[1]) for name, item in seen.items()},
        "figures": [asdict(figure) for figure in found],
        "nearest": [copy.as_json(comparison.generated.pictures, comparison.real.pictures) for copy in copies],
    }  # fmt: skip
    page = quality_report.page(comparison, found, copies, by.extractor)
    path = results.publish(comparison.output, "quality", result, page)
    print(table(found))
    say(f"report  {path}")
    return ExitCode.OK


def read_comparison(options: argparse.Namespace, say: Callable[[str], None]) -> Comparison:
    """Check what was typed, without torch. Raises UserError."""
    generated, is_drawn = user_path(options.generated), options.real == SCENES and not user_path(SCENES).exists()
    real = user_path(options.output) / "real" if is_drawn else user_path(options.real)
    if options.max_pictures is not None and options.max_pictures < 1:
        raise usage_error(f"--max-pictures {options.max_pictures}: give 1 or more")
    if options.seed < 0:
        raise usage_error(f"--seed {options.seed}: give 0 or more")
    one, other = real.resolve(), generated.resolve()
    if one == other or one in other.parents or other in one.parents:
        if is_drawn:
            raise usage_error(f"--output {options.output}: its scenes would lie among --generated {generated}; choose another")
        raise usage_error(f"--real {real} and --generated {generated} share pictures; name folders apart from each other")
    real_side = None if is_drawn else _side(inputs.pictures_in, real, "--real", options, say)
    generated_side = _side(inputs.generated_in, generated, "--generated", options, say)
    if options.clip is not None and not user_path(options.clip).is_dir():  # before torch is imported
        raise not_found(f"--clip {options.clip}: no such folder; name a CLIPModel folder of transformers")
    inception = None if options.inception is None else user_path(options.inception)
    if inception is not None:
        inputs.check_inception(inception)
    else:
        say("Inception none: so no FID, KID and inception score; --inception FILE gives it")
    clip = _clip_folder(options.clip)
    if clip is None and inception is None:
        raise not_found(f"{_NO_CLIP}; give --clip FOLDER, --inception FILE, or both")
    prompts = None
    if clip is None:
        say(f"CLIP    none: {_NO_CLIP}; so no CMMD and no CLIP score")
    elif options.prompts != "none":
        prompts = inputs.prompts_of(generated, generated_side.pictures, options.prompts)
    output = check_writable_folder(user_path(options.output))
    real_side = real_side or _draw_scenes(output, len(generated_side.pictures), say)
    return Comparison(real_side, generated_side, clip, inception, prompts, options.seed, options.device, output)


def _draw_scenes(output: Path, count: int, say: Callable[[str], None]) -> Side:
    """Scenes as `adherence` asks for by default, placed as those that the embedded model learnt from, in OUTPUT/real.

    What is there and was not drawn here is moved aside.
    """
    from src.evaluation.skills import choose
    from src.scenes.drawing import draw
    from src.scenes.grammar import LATTICE_PX

    scenes = choose(count, 0, "both", lattice_px=LATTICE_PX)
    pictures = {f"{index:05}.png": encode_png(draw(scene), {}) for index, scene in enumerate(scenes)}
    folder = output / "real"
    if os.path.lexists(folder) and not _is_ours(folder):
        say(f"{folder}: holds what was not drawn here; it is now {folders.set_aside(folder).name}")
    folders.publish_folder(folder, {**pictures, inputs.REAL_SCENES: json.dumps({"files": sorted(pictures)}).encode()})
    say(f"real      {counted(count, 'held-out scene')} drawn into {folder}")
    return Side(folder, [folder / name for name in pictures], count, is_drawn=True)


def _is_ours(folder: Path) -> bool:
    """Whether `_draw_scenes` made all that lies there, so that it may be replaced."""
    try:
        known = {inputs.REAL_SCENES, *json.loads((folder / inputs.REAL_SCENES).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not folder.is_symlink() and set(os.listdir(folder)) <= known


def _clip_folder(named: str | None) -> Path | None:
    """The one named, else the first on this disk as for the other verbs, else the embedded model's. Raises UserError."""
    from src.evaluation.likeness import clip_folder
    from src.training.scores import find_clip

    if named is not None:
        return clip_folder(named, [], Path())
    cache = build_config({}).paths.folder("cache")
    return find_clip("", cache) or find_clip("embedded", cache)


def table(found: list[Figure]) -> str:
    """The figures in columns, for the terminal."""
    rows = [["metric", "features", "value", "", "better", "of"]]
    for figure in found:
        value = "–" if figure.value is None else f"{figure.value:.4g}"
        std = "" if figure.std is None else f"± {figure.std:.2g}"
        note = f" ({figure.note})" if figure.note else ""
        rows.append([figure.name, figure.features, value, std, figure.better, figure.based_on + note])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows)


def _side(
    find: Callable[..., list[Path]], folder: Path, flag: str, options: argparse.Namespace, say: Callable[[str], None]
) -> Side:
    pictures = find(folder, flag, say)
    chosen = inputs.sample(pictures, options.max_pictures, options.seed)
    share = "" if len(chosen) == len(pictures) else f" of {len(pictures):,}"
    say(f"{flag[2:]:<9} {counted(len(chosen), 'picture')}{share} in {folder}")
    return Side(folder, chosen, len(pictures))


def _measure(comparison: Comparison, say: Callable[[str], None]) -> tuple[dict[str, Seen], list[Figure]]:
    """What each extractor saw, by its name, and all the figures; CLIP's first."""
    from src.evaluation import features, figures

    device = features.pick_device(comparison.device)
    clip = comparison.clip and features.ClipFeatures(comparison.clip, device)
    inception = comparison.inception and features.InceptionFeatures(comparison.inception, device)
    seen, found = {}, []
    if clip:
        if clip.is_own:
            say(_OWN_CLIP)
        seen[clip.name] = _see(clip, comparison)
        found += figures.of_clip(seen[clip.name], *_texts(clip, comparison.prompts, say), comparison.seed)
    if inception:
        seen[inception.name] = _see(inception, comparison)
        found += figures.of_inception(seen[inception.name], comparison.seed)
    return seen, found


def _see(extractor: Any, comparison: Comparison) -> Seen:
    from src.evaluation.features import extract
    from src.evaluation.figures import Seen

    terminal = Terminal()
    real = extract(extractor, comparison.real.pictures, terminal, f"{extractor.name}, real")
    generated = extract(extractor, comparison.generated.pictures, terminal, f"{extractor.name}, generated")
    return Seen(extractor.name, real["features"], generated["features"], generated.get("logits"))


def _texts(
    clip: Any, prompts: list[str | None] | None, say: Callable[[str], None]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(T, D) features of the prompts, and (T,) whose picture's they are; None where they are not asked for."""
    import numpy as np

    from src.evaluation.likeness import say_cut

    if prompts is None:
        return None, None
    given = [index for index, prompt in enumerate(prompts) if prompt]
    say_cut(clip.clip, [prompts[index] for index in given], say)
    rows = clip.text_features([prompts[index] for index in given])
    return rows, np.array(given, dtype=int)
