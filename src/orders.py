"""What was typed -> what to do: requests, jobs, and a recipe to follow; everything checked that can be without a model."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from src import files, images, model_source
from src.arguments import apply_typed, parse_job
from src.config import AppConfig
from src.errors import UserError, not_found, usage_error
from src.jobs import Journal, job_id, read_job_lines, split_flags
from src.model_shapes import BUNDLED
from src.prompts import extract_loras
from src.recipe import KEYS, ParsedRecipe, from_text_chunks
from src.request import LoraChoice, PictureRequest
from src.session import Job, Wishes, job_settings
from src.tensor_files import missing
from src.terminal import Terminal

JOURNAL = ".finished.jsonl"


def read_request(config: AppConfig, typed: dict[str, Any]) -> PictureRequest:
    """One checked request; the files that it names are there and can be read."""
    loras = tuple(LoraChoice.parse(text) for text in typed.get("lora", ()))
    for choice in loras:
        if not choice.path.exists():
            raise missing(choice.path)
    for tag in extract_loras(typed.get("prompt", ""))[1]:
        LoraChoice.named(Path(config.paths.lora), tag.name)
    pictures = {"init_image": typed.get("init_image"), "mask_image": typed.get("mask")}
    pictures = {name: Path(path).expanduser() for name, path in pictures.items() if path is not None}
    request = PictureRequest.from_config(config.generation, typed.get("prompt", ""), loras=loras, **pictures)
    for path in pictures.values():
        images.read_image(path)
    return request


# -- jobs


def read_jobs(typed: dict[str, Any], config: AppConfig) -> list[Job]:
    """The one request of the command line, or one a line of the job file; a line that is wrong carries its error."""
    if "prompts" not in typed:
        return [Job(read_request(config, typed))]
    if "prompt" in typed:
        raise usage_error("a prompt and --prompts FILE are given; the file's lines are the prompts, so leave the other out")
    jobs, seen = [], Counter()
    for line in read_job_lines(typed["prompts"], sys.stdin):
        try:
            request = _read_job(line.text, typed, config)
        except UserError as error:
            jobs.append(Job(error=error, line=line.number))
            continue
        settings = job_settings(request, config.model.model_id, config.model.vae)
        key = job_id(settings, 0)
        jobs.append(Job(request, line=line.number, id=job_id(settings, seen[key])))
        seen[key] += 1
    if not jobs:
        raise usage_error(f"{typed['prompts']}: holds no job; write a prompt a line")
    return jobs


def _read_job(text: str, typed: dict[str, Any], config: AppConfig) -> PictureRequest:
    """A line is a prompt or flags; what it does not say is as on the command line."""
    words = split_flags(text)
    own = {"prompt": text} if words is None else parse_job(words)
    config = copy.deepcopy(config)
    apply_typed(config, own)
    shared = {name: value for name, value in typed.items() if name in ("lora", "init_image", "mask")}
    return read_request(config, {**shared, **own})


def check_surroundings(typed: dict[str, Any], config: AppConfig) -> Wishes:
    """What must be right before a model is loaded: the output folder can be written, the model's name means something."""
    if typed.get("preview", 1) < 1:
        raise usage_error(f"--preview {typed['preview']}: give the number of steps between previews, 1 or more")
    folder = files.check_writable_folder(Path(config.paths.outputs).expanduser())
    files.safe_join(folder, f"{config.paths.prefix}_00000000_000000_000.png")
    model = config.model
    cache = Path(config.paths.cache)
    checker = not config.optimization.disable_safety_checker
    model_source.resolve(model.model_id, cache, model.offline, revision=model.revision, include_safety_checker=checker)
    if model.vae:
        model_source.resolve_vae(model.vae, cache, model.offline)
    journal = None
    if "prompts" in typed and "redo" not in typed:
        journal = Journal(folder / JOURNAL)
    return Wishes(
        folder,
        config.paths.prefix,
        grid="grid" in typed,
        preview_every=typed.get("preview"),
        metadata="no_metadata" not in typed,
        journal=journal,
    )


# -- --from-image


def read_recipe(typed: dict[str, Any], terminal: Terminal) -> ParsedRecipe | None:
    if "from_image" not in typed:
        return None
    recipe = from_text_chunks(images.read_text_chunks(Path(typed["from_image"]).expanduser(), KEYS))
    for note in recipe.notes:
        terminal.say(f"recipe  {note}")
    return recipe


def follow_recipe(recipe: ParsedRecipe, typed: dict[str, Any], config: AppConfig) -> None:
    """Take prompt, model and adapters from a recipe where the command line does not say otherwise.

    A recipe comes from a stranger: its names are looked for among what is already here, and nothing is fetched for it.
    """
    if recipe.mode != "txt2img" and "init_image" not in typed:
        raise usage_error(
            f"{typed['from_image']} was drawn over another picture ({recipe.mode}); give that with --init-image FILE"
        )
    typed.setdefault("prompt", recipe.prompt)
    if "model" not in typed and "config" not in typed and recipe.model_name:
        config.model.model_id = _find_model(recipe.model_name, config)
    if "vae" not in typed and recipe.vae_name:
        config.model.vae = _find_model(recipe.vae_name, config)
    if "lora" not in typed:
        tagged = {tag.name for tag in extract_loras(typed["prompt"])[1]}
        named = [
            LoraChoice.named(Path(config.paths.lora), item.name, item.weight)
            for item in recipe.loras
            if item.name not in tagged
        ]
        typed["lora"] = [f"{choice.path}:{choice.weight}" for choice in named]


def compare_with_recipe(recipe: ParsedRecipe, sha256: str, terminal: Terminal) -> None:
    if recipe.model_sha256 and not sha256.startswith(recipe.model_sha256):
        terminal.say(
            f"recipe  was drawn with weights {recipe.model_sha256[:10]}, these are {sha256[:10]}: the picture will differ"
        )


def _find_model(name: str, config: AppConfig) -> str:
    """A model that a recipe names, among what is already here: embedded, known hub ids, the cache, files under models/."""
    caches = (Path(config.paths.cache), model_source.user_cache())
    if name == "embedded" or name in BUNDLED or any(model_source.cached_snapshot(name, cache) for cache in caches):
        return name
    found = [path for path in Path("models").glob("*") if name in (path.name, path.stem)]
    if found:
        return str(found[0])
    raise not_found(f"the recipe's model '{name}' is not here; name the one to draw with: --model MODEL")
