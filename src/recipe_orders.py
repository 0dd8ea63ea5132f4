"""``--from-image``: take from a picture's recipe what the command line leaves open, and say what will not be as it was.

A recipe comes from a stranger: its names are looked for among what is already here, and nothing is fetched for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src import devices, images, model_source
from src.arguments import is_given
from src.config import AppConfig, GenerationConfig
from src.errors import UserError, not_found, usage_error
from src.memory_plan import check_switches
from src.named_files import NamedFiles, tensors_sha256
from src.orders import named_files
from src.prompts import extract_loras
from src.recipe import KEYS, LoraRef, ParsedRecipe, from_text_chunks
from src.recipe_dialects import HUB_ID
from src.request import MIN_SIZE_PX, SIZE_STEP_PX, LoraChoice, user_path
from src.schedulers import find_sampler

MODELS_FOLDER = Path("models")

Say = Callable[[str], None]


def read_recipe(typed: dict[str, Any], say: Say) -> ParsedRecipe | None:
    """The recipe of the picture that ``--from-image`` names, brought to what can be drawn here; None without that flag.

    ``settings`` holds only what was not typed. Raises UserError: usage with ``--prompts``; not found; refused without a recipe.
    """
    if "from_image" not in typed:
        return None
    if "prompts" in typed:
        raise usage_error("--from-image draws one picture again and --prompts many; give one of the two")
    path = user_path(typed["from_image"])
    with _naming(path):
        recipe = from_text_chunks(images.read_text_chunks(path, KEYS))
    settings = {name: value for name, value in recipe.settings.items() if f"generation.{name}" not in typed}
    notes = [*recipe.notes, *_mend_sampler(settings), *_mend_size(settings)]
    for note in notes:
        say(f"recipe  {note}")
    return replace(recipe, settings=settings, notes=tuple(notes))


def follow_recipe(recipe: ParsedRecipe, typed: dict[str, Any], config: AppConfig, say: Say) -> dict[str, Any]:
    """Return ``typed`` with the recipe's prompt and adapters, and set its model, VAE and precision in ``config``.

    What was chosen by a flag, ``--set`` or ``--config`` stays. Raises UserError, with the picture's name, for what is not here.
    """
    typed = dict(typed)
    named = named_files(config)
    with _naming(user_path(typed["from_image"])):
        _check_pictures(recipe, typed, named, say)
        _follow_models(recipe, typed, config, named)
        if not is_given(typed, "model.precision") and (recipe.drawn_on.precision != "fp16" or _may_have_card(config)):
            config.model.precision = recipe.drawn_on.precision or config.model.precision
        if not is_given(typed, "optimization.quantize") and _can_quantize(config):
            config.optimization.quantize = recipe.drawn_on.quantize
        if "prompt" not in typed:
            typed |= {"prompt": recipe.prompt, "wildcards": False}  # a recorded prompt is final
        _follow_loras(recipe, typed, config, named, say)
    return typed


def compare_with_recipe(
    recipe: ParsedRecipe, weights_sha256: str, precision: str, device: str, say: Say, quantize: str | None = None
) -> None:
    """Say what the loaded model and this machine have different from the recipe's: a line each for weights and machine."""
    if recipe.model_sha256 and not weights_sha256.startswith(recipe.model_sha256):
        say(f"recipe  drawn with weights {recipe.model_sha256[:10]}, these are {weights_sha256[:10]}: the picture will differ")
    then = recipe.drawn_on
    now = replace(then, precision=precision, device=device, torch=version("torch"), quantize=quantize)
    now = replace(now, **{name: None for name in ("precision", "device", "torch") if getattr(then, name) is None})
    if then != now:
        say(f"recipe  drawn in {_words(then)}; this run is in {_words(now)}: the picture may differ")


def _words(drawn_on: Any) -> str:
    matrices = drawn_on.quantize and f"with an {drawn_on.quantize} U-Net"
    parts = (
        drawn_on.precision,
        matrices,
        drawn_on.device and f"on {drawn_on.device}",
        drawn_on.torch and f"with torch {drawn_on.torch}",
    )
    return " ".join(part for part in parts if part)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begin errors with the picture's name, where they do not say it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}", error.exit_code) from None


# -- settings


def _mend_sampler(settings: dict[str, Any]) -> Iterator[str]:
    """Put the nearest sampler for one that is not known here: the same with its own schedule, else the default; say so."""
    name = settings.get("scheduler")
    if name is None or _is_sampler(name):
        return
    stems = [name[: match.start()] for match in re.finditer(r"[\s_]+", name)]
    nearest = next(filter(_is_sampler, reversed(stems)), GenerationConfig().scheduler)
    settings["scheduler"] = nearest
    yield f"sampler '{name}' cannot be drawn here; the nearest is {find_sampler(nearest).label}: the picture will differ"


def _is_sampler(name: str) -> bool:
    try:
        find_sampler(name)
    except UserError:
        return False
    return True


def _mend_size(settings: dict[str, Any]) -> Iterator[str]:
    for name in ("width", "height"):
        size_px = settings.get(name)
        if size_px is None:
            continue
        settings[name] = max(MIN_SIZE_PX, round(size_px / SIZE_STEP_PX) * SIZE_STEP_PX)
        if settings[name] != size_px:
            yield f"{name} {size_px} is drawn as {settings[name]}, a multiple of {SIZE_STEP_PX} from {MIN_SIZE_PX}"


def _may_have_card(config: AppConfig) -> bool:
    """Whether fp16 has a chance; torch is asked later."""
    return config.model.device != "cpu" and (devices.has_apple_gpu() or devices.detect_card() is not None)


def _can_quantize(config: AppConfig) -> bool:
    """Whether a U-Net of few bits has a chance; where it has none, the recipe's line says what differs."""
    has_card = config.model.device != "cpu" and devices.detect_card() is not None
    settings = replace(config.optimization, quantize="nf4")
    return (
        has_card
        and importlib.util.find_spec("bitsandbytes") is not None
        and _succeeds(lambda: check_switches(settings) is None)
    )


# -- pictures, models, adapters


def _check_pictures(recipe: ParsedRecipe, typed: dict[str, Any], named: NamedFiles, say: Say) -> None:
    needed = {"txt2img": (), "img2img": ("init_image",), "inpaint": ("init_image", "mask")}[recipe.mode]
    flags = {"init_image": "--init-image FILE", "mask": "--mask FILE"}
    absent = [flags[name] for name in needed if name not in typed]
    if absent:
        raise usage_error(f"it was drawn over another picture ({recipe.mode}); give that with {' and '.join(absent)}")
    for name in needed:
        recorded, path = getattr(recipe, name), user_path(typed[name])
        if recorded is not None and not named.sha256(path).startswith(recorded.sha256):
            say(f"recipe  {path} is not the {name.replace('_', ' ')} '{recorded.name}' of then: the picture will differ")


def _follow_models(recipe: ParsedRecipe, typed: dict[str, Any], config: AppConfig, named: NamedFiles) -> None:
    if not is_given(typed, "model.model_id"):
        config.model.model_id = _find_model(recipe, config, named)
    if not is_given(typed, "model.vae") and recipe.vae_name is not None:
        config.model.vae = _find_vae(recipe.vae_name, config)


def _find_model(recipe: ParsedRecipe, config: AppConfig, named: NamedFiles) -> str:
    """A model that a recipe names, among what is already here: embedded, whole in a cache, or under models/."""
    name, sha256 = recipe.model_name, recipe.model_sha256
    if name is None:
        raise not_found("the recipe names no model that can be looked for; name the one to draw with: --model MODEL")
    checker = not config.optimization.disable_safety_checker
    cache, revision = config.paths.folder("cache"), config.model.revision

    def in_cache() -> bool:
        return model_source.resolve(name, cache, True, revision=revision, include_safety_checker=checker).kind == "hub"

    if name == "embedded" or (HUB_ID.fullmatch(name) and _succeeds(in_cache)):
        return name
    own = _all_own(name, config)
    if not own:
        raise not_found(f"the recipe's model '{name}' is not here; name the one to draw with: --model MODEL")
    if len(own) > 1 and sha256 is not None:  # only then, because gigabytes are read for it
        return str(next((path for path in own if _has_weights(path, sha256, named)), own[0]))
    return str(own[0])


def _find_vae(name: str, config: AppConfig) -> str:
    cache = config.paths.folder("cache")
    in_cache = HUB_ID.fullmatch(name) and _succeeds(lambda: model_source.resolve_vae(name, cache, True).kind == "hub")
    own = [name] if in_cache else _all_own(name, config)
    if not own:
        raise not_found(
            f"the recipe's VAE '{name}' is not here; give one with --vae VAE, or --set model.vae=null for the model's own"
        )
    return str(own[0])


def _succeeds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except UserError:
        return False


def _has_weights(path: Path, sha256: str, named: NamedFiles) -> bool:
    """Whether a model's U-Net or single file has that hash, of which the first digits may be known."""
    files = [path] if path.is_file() else sorted(path.glob("unet/*.safetensors"))
    return _succeeds(lambda: any(named.sha256(file).startswith(sha256) for file in files))


def _all_own(name: str, config: AppConfig) -> list[Path]:
    """The .safetensors files and diffusers folders of that name under models/, at most one folder deep."""
    not_models = {config.paths.folder("cache").resolve(), config.paths.folder("lora").resolve()}
    found = []
    for path in sorted([*MODELS_FOLDER.glob("*"), *MODELS_FOLDER.glob("*/*")]):
        is_file = path.suffix == ".safetensors" and path.is_file()
        is_model = is_file or any((path / index).is_file() for index in ("model_index.json", "config.json"))
        if is_model and name in (path.name, path.stem) and not_models.isdisjoint((path.resolve(), path.resolve().parent)):
            found.append(path)
    return found


def _follow_loras(recipe: ParsedRecipe, typed: dict[str, Any], config: AppConfig, named: NamedFiles, say: Say) -> None:
    """Name the recipe's adapters by their paths, in place of the tags of its prompt: a tag would take the first of its name.

    ``--lora`` takes the place of them all. A prompt that was typed keeps its tags, and they count before the recipe's.
    """
    prompt, tags = extract_loras(typed["prompt"])
    loras = list(recipe.loras)
    if typed.get("wildcards", True):
        loras = [item for item in loras if item.name not in {tag.name for tag in tags}]
    else:
        typed["prompt"] = prompt
        known = {item.name for item in loras}
        loras += [LoraRef(tag.name, tag.weight) for tag in tags if tag.name not in known]
    if "lora" not in typed:
        typed["lora"] = [f"{_find_lora(item, config, named, say)}:{item.weight}" for item in loras]


def _find_lora(recorded: LoraRef, config: AppConfig, named: NamedFiles, say: Say) -> Path:
    """The adapter of a recipe among the user's own: of several with its name the one with its hash."""
    folder = config.paths.folder("lora")
    found = LoraChoice.all_named(folder, recorded.name)
    if not found:
        raise not_found(f"the recipe's LoRA '{recorded.name}' is not in {folder}; give it with --lora PATH")
    differences = []
    for path in found:
        named.check_adapter(path)
        here, then = named.adapter_sha256(path), recorded.sha256
        if then is None and recorded.tensors_sha256 is not None and path.is_file():
            here, then = tensors_sha256(path), recorded.tensors_sha256
        if then is None or here.startswith(then):
            return path
        differences.append(f"{then[:10]}, here {here[:10]}")
    say(f"recipe  {found[0]} is not the LoRA '{recorded.name}' of then ({differences[0]}): the picture will differ")
    return found[0]
