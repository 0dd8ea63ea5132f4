"""``adherence``: draws held-out prompts of the scenes' grammar and checks each picture against its scene, without a network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import AppConfig, GenerationConfig
from src.errors import ExitCode, UserError, not_found, refused, usage_error
from src.evaluation.results import REPORT, RESULT, versions
from src.evaluation.skills import SPLITS, Judged, Scores, choose
from src.files import check_writable_folder, publish_bytes
from src.recipe import public_name
from src.request import MAX_SEED, PictureRequest, user_path
from src.scenes.grammar import GRAMMARS, PARTS_SAY, Scene
from src.version import VERSION

if TYPE_CHECKING:
    from PIL import Image

    from src.generator import TextToImageGenerator

SUMMARY = "how well pictures follow their prompts, skill by skill, on prompts that training never saw"
PICTURES, PROOF, PROOF_REPORT = "pictures", "proof.json", "proof.html"
ANY_WAY = ("batch_size",)  # pictures are the same at any
_HEAD = {"verb": "adherence", "version": VERSION}
Draw = Callable[[list[str], list[int]], "list[Image.Image]"]  # prompts and seeds -> pictures
Say = Callable[[str], None]


@dataclass(slots=True)
class AdherenceSettings:
    """What decides the figures."""

    model: str = "embedded"
    count: int = 500
    steps: int = 20
    guidance: float = 5.0
    guidance_interval: str = "0:1"
    scheduler: str = "dpm++_2m_karras"
    seed: int = 0  # of the prompts, and of the first picture
    batch_size: int = 8
    split: str = "both"
    grammar: str = "full"


_HELP = {
    "model": "preset, hub id, folder or file, as main.py takes it",
    "count": "prompts",
    "steps": "denoising steps",
    "guidance": "guidance scale",
    "guidance_interval": "guide in this part of the noise schedule alone, 0 being noise",
    "scheduler": "sampler, as main.py takes it",
    "seed": "of the prompts, and of the first picture; the next has the next",
    "batch_size": "pictures drawn together",
    "split": "held-out prompts, colour-shape combinations that training never shows, or half of each",
    "grammar": "; ".join(f"{name}: {said}" for name, said in PARTS_SAY.items()),
}
_METAVARS = {str: "NAME", int: "N", float: "X", "guidance_interval": "A:B"}
_CHOICES = {"split": SPLITS, "grammar": tuple(GRAMMARS)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags; their defaults are those of AdherenceSettings."""
    for field in fields(AdherenceSettings):
        name, choices, kind = f"--{field.name.replace('_', '-')}", _CHOICES.get(field.name), type(field.default)
        help = f"{_HELP[field.name]} (default: {field.default})"
        metavar = None if choices else _METAVARS.get(field.name, _METAVARS[kind])
        parser.add_argument(name, type=kind, choices=choices, default=argparse.SUPPRESS, metavar=metavar, help=help)
    parser.add_argument("--device", metavar="D", default=argparse.SUPPRESS, help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--pictures", metavar="DIR", help=f"check what was drawn before: a folder with its {RESULT}")
    parser.add_argument(
        "--prove", action="store_true", help="prove the checker on rendered truth and on wrong pairs; draw nothing"
    )


def run(options: argparse.Namespace, say: Say) -> int:
    """Draw, or read, or prove; check; write and print the figures. Raises UserError."""
    typed = vars(options)
    settings = AdherenceSettings(**{f.name: typed[f.name] for f in fields(AdherenceSettings) if f.name in typed})
    if settings.seed < 0:  # not drawn, as elsewhere: the same command goes on with the pictures that it has drawn
        raise usage_error(f"--seed {settings.seed}: give 0 or more; the next picture has the next")
    folder = user_path(options.output)
    asked = [f"--{name.replace('_', '-')}" for name in typed if name in _HELP or name == "device"]
    if options.prove:
        if options.pictures is not None:
            raise usage_error("--prove draws and reads nothing; leave out --pictures")
        return _prove(folder, settings, [name for name in asked if name not in ("--count", "--seed")], "count" in typed, say)
    if options.pictures is not None:
        if asked:
            raise usage_error(f"--pictures takes what was drawn as it is; leave out {', '.join(asked)}")
        return _check_drawn(user_path(options.pictures), folder, say)
    return _draw_and_check(settings, typed.get("device"), folder, say)


def measure(draw: Draw, scenes: Sequence[Scene], seed: int = 0, batch_size: int = 8) -> Scores:
    """Draw a picture of each scene's caption and check it. ``draw`` gets at most ``batch_size`` prompts, and their seeds."""
    from src.evaluation.checking import check

    judged: list[Judged] = []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        seeds = [seed + start + index for index in range(len(batch))]
        pictures = draw([scene.caption for scene in batch], seeds)
        judged += [
            Judged(scene, own, check(picture, scene)) for scene, own, picture in zip(batch, seeds, pictures, strict=True)
        ]
    return Scores(tuple(judged))


# --- drawing -------------------------------------------------------------------------------------------------------------


def _draw_and_check(settings: AdherenceSettings, device: str | None, folder: Path, say: Say) -> int:
    scenes = choose(settings.count, settings.seed, settings.split, settings.grammar)
    if settings.seed + len(scenes) > MAX_SEED:
        raise usage_error(f"--seed {settings.seed}: its last picture's seed is above {MAX_SEED:,}")
    from src import orders
    from src.arguments import build_config, parse_interval

    typed = {"model": settings.model, "paths.outputs": str(folder)} | ({} if device is None else {"model.device": device})
    config = build_config(typed)
    interval = {name.removeprefix("generation."): share for name, share in parse_interval(settings.guidance_interval).items()}
    request = PictureRequest.from_config(
        GenerationConfig(), scenes[0].caption, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
        scheduler=settings.scheduler, batch_size=settings.batch_size, **interval,
    )  # fmt: skip
    orders.check_surroundings({}, config)
    generator = _load(config, say)
    facts = {"settings": asdict(settings), "precision": generator.model.precision, "weights_sha256": generator.weights_sha256()}
    drawn = _Drawn(folder, facts, scenes, say)
    drawn.check_same()
    _draw_missing(generator, request, drawn, say)
    return _finish(drawn, folder, say)


def _load(config: AppConfig, say: Say) -> TextToImageGenerator:
    from src.generator import TextToImageGenerator

    generator = TextToImageGenerator(config, say)
    generator.load_model()
    return generator


class _Drawn:
    """A folder of pictures, one a scene, and the result.json that says which is which, from the first picture on."""

    def __init__(self, folder: Path, facts: dict[str, Any], scenes: Sequence[Scene], say: Say) -> None:
        self.folder, self.facts, self.scenes = folder, facts, list(scenes)
        self._say = say

    @property
    def seed(self) -> int:
        return self.facts["settings"]["seed"]

    def path(self, index: int) -> Path:
        return self.folder / PICTURES / f"{index:04d}.png"

    def missing(self) -> list[int]:
        return [index for index in range(len(self.scenes)) if not self.path(index).is_file()]

    def holds_pictures(self) -> bool:
        return len(self.missing()) < len(self.scenes)

    def check_same(self) -> None:
        """Say what is kept of an earlier run; refuse another run's pictures. Then the folder is this run's."""
        if (self.folder / RESULT).is_file():
            before = _read_result(self.folder)
            changed = [name for name in self.facts if name != "settings" and before.get(name) != _plain(self.facts[name])]
            settings, others = _plain(self.facts["settings"]), before.get("settings", {})
            for known in (settings, others):  # a folder may be called by any path
                known["model"] = public_name(str(known.get("model")))
            changed += [name for name in settings if name not in ANY_WAY and settings[name] != others.get(name)]
            if [item["scene"] for item in before["pictures"]] != [_plain(scene.as_dict()) for scene in self.scenes]:
                changed.append("scenes")
            if changed:
                why = f"holds pictures drawn otherwise ({', '.join(changed)})"
                raise refused(f"{self.folder}: {why}; choose another --output, or delete it")
            kept = len(self.scenes) - len(self.missing())
            self._say(f"kept    {kept} pictures drawn before in {self.folder / PICTURES}")
        elif self.holds_pictures():
            raise refused(f"{self.folder / PICTURES}: nobody knows what drew these; choose another --output, or delete them")
        check_writable_folder(self.folder / PICTURES)
        self.write({})

    def write(self, figures: dict[str, Any], verdicts: Sequence[dict[str, Any]] | None = None) -> Path:
        """Write result.json; return its path."""
        pictures = [
            {"file": str(self.path(i).relative_to(self.folder)), "seed": self.seed + i, "scene": scene.as_dict()}
            | ({} if verdicts is None else {"verdict": verdicts[i]})
            for i, scene in enumerate(self.scenes)
        ]
        document = {**_HEAD, "versions": versions(), **self.facts, **figures, "pictures": pictures}
        return publish_bytes(self.folder / RESULT, (json.dumps(document, indent=1) + "\n").encode())


def _plain(value: Any) -> Any:
    """As it is after JSON."""
    return json.loads(json.dumps(value))


def _draw_missing(generator: TextToImageGenerator, request: PictureRequest, drawn: _Drawn, say: Say) -> None:
    from src.images import encode_png
    from src.terminal import Terminal

    missing = drawn.missing()
    bar = Terminal()
    bar.start_progress(len(missing))
    done = 0
    try:
        for first, count in _runs(missing):
            own = replace(request, seed=drawn.seed + first, num_images=count, wildcards=False)
            captions = [drawn.scenes[index].caption for index in range(first, first + count)]
            for index, picture in enumerate(generator.draw(own, texts=captions), start=first):
                text = {key: value for key, value in picture.info.items() if isinstance(value, str)}
                publish_bytes(drawn.path(index), encode_png(picture, text))
                done += 1
                bar.progress(done, "drawing")
    finally:
        bar.end_progress()


def _runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, how many)."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


# --- what was drawn before -----------------------------------------------------------------------------------------------


def _check_drawn(source: Path, folder: Path, say: Say) -> int:
    document = _read_result(source)
    facts = {name: document[name] for name in ("settings", "precision", "weights_sha256") if name in document}
    try:
        scenes = [Scene.from_dict(item["scene"]) for item in document["pictures"]]
    except (KeyError, TypeError, AttributeError):
        raise refused(f"{source / RESULT}: its scenes cannot be read; name a folder that this verb has drawn") from None
    drawn = _Drawn(source, facts, scenes, say)
    if folder.resolve() != source.resolve() and _Drawn(folder, facts, scenes, say).holds_pictures():
        raise usage_error(f"{folder}: holds the pictures of another run; name an --output of its own, or {source} itself")
    if missing := drawn.missing():
        raise not_found(
            f"{drawn.path(missing[0])}: not there, nor {len(missing) - 1} others; draw them first, without --pictures"
        )
    return _finish(drawn, folder, say)


def _read_result(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    if not path.is_file():
        raise not_found(f"{path}: no such file; name a folder that this verb has drawn")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["verb"] != "adherence" or not isinstance(document["settings"]["seed"], int):
            raise ValueError
        [item["scene"] for item in document["pictures"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise refused(f"{path}: is no result of adherence; choose another folder") from None
    return document


def _finish(drawn: _Drawn, folder: Path, say: Say) -> int:
    """Check every picture, write both files into ``folder`` and print the table."""
    from src.evaluation import adherence_report
    from src.images import read_image
    from src.terminal import Terminal

    bar = Terminal()
    bar.start_progress(len(drawn.scenes))
    pictures: list[Image.Image] = []

    def read(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        found = [read_image(drawn.path(seed - drawn.seed)) for seed in seeds]
        pictures.extend(adherence_report.thumbnail(picture) for picture in found)
        bar.progress(len(pictures), "checking")
        return found

    try:
        scores = measure(read, drawn.scenes, drawn.seed)
    finally:
        bar.end_progress()
    check_writable_folder(folder)
    if folder.resolve() == drawn.folder.resolve():
        drawn.write(scores.as_dict(), [asdict(item.verdict) | {"all": item.verdict.all} for item in scores.judged])
    else:
        document = {**_HEAD, "versions": versions(), "of": drawn.folder.resolve().name, **drawn.facts, **scores.as_dict()}
        verdicts = [asdict(item.verdict) | {"all": item.verdict.all, "seed": item.seed} for item in scores.judged]
        publish_bytes(folder / RESULT, (json.dumps(document | {"verdicts": verdicts}, indent=1) + "\n").encode())
    publish_bytes(folder / REPORT, adherence_report.page(scores, pictures, drawn.facts))
    for line in scores.lines():
        print(line)
    say(f"report  {folder / REPORT}")
    return ExitCode.OK


# --- the proof -----------------------------------------------------------------------------------------------------------


def _prove(folder: Path, settings: AdherenceSettings, idle: list[str], has_count: bool, say: Say) -> int:
    """Print and write the proof's table; a failure when the checker does not keep its bounds."""
    if idle:
        raise usage_error(f"--prove draws nothing; leave out {', '.join(idle)}")
    from src.evaluation import adherence_report, proof

    if has_count and settings.count < proof.MIN_COUNT:
        raise usage_error(f"--count {settings.count}: too few to prove anything; take {proof.MIN_COUNT} or more")
    result = proof.prove(settings.count if has_count else proof.COUNT, settings.seed, print)
    check_writable_folder(folder)
    path = publish_bytes(folder / PROOF, (json.dumps({"version": VERSION, **result}, indent=1) + "\n").encode())
    publish_bytes(folder / PROOF_REPORT, adherence_report.proof_page(result, *proof.examples(settings.seed)))
    say(f"proof   {path}")
    say(f"report  {folder / PROOF_REPORT}")
    if not result["holds"]:
        raise UserError(f"{path}: the checker is not within its bounds; look at its failures there")
    return ExitCode.OK
