"""A picture's recipe <-> PNG text chunks: everything that is needed to draw the picture once more.

Written twice: as A1111's ``parameters`` text, which other programs and websites read, and as strict JSON under
``recipe``. Read from our JSON, else from A1111's text, else from InvokeAI's JSON.
Format of the text: A1111 ``modules/processing.py`` (create_infotext) and ``modules/infotext_utils.py`` (quote).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from src.errors import refused
from src.recipe_dialects import (
    HUB_ID,
    LORA_TAG,
    SETTINGS,
    Draft,
    LoraRef,
    ParsedRecipe,
    PictureRef,
    load_object,
    read_infotext,
    read_invokeai,
    sha256_digits,
    shown,
)

__all__ = ["LoraRef", "ModelRef", "ParsedRecipe", "PictureRef", "Recipe", "from_text_chunks", "public_name", "to_text_chunks"]

SCHEMA = "text-to-image.recipe/v1"
PARAMETERS_KEY = "parameters"
RECIPE_KEY = "recipe"
INVOKEAI_KEY = "invokeai_metadata"
KEYS = (RECIPE_KEY, PARAMETERS_KEY, INVOKEAI_KEY)  # of the chunks that are read
MAX_CHUNK_BYTES = 64 << 10

_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_FILE_SUFFIXES = (*_MODEL_SUFFIXES, ".png", ".jpg", ".jpeg", ".webp", ".json", ".yaml")
_NOT_NAMES = {"prompt", "negative_prompt", "memory_plan", "revision"}  # may hold a slash without being a path


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model or VAE: hub id or file name, family such as "sd15", SHA-256 where it is one file."""

    name: str
    family: str = ""
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one picture was drawn from, and on what. Sizes in pixels; ``strength`` is None for txt2img.

    ``loras`` lists every LoRA, whether it came by flag or by a ``<lora:...>`` tag; a prompt that was typed keeps its tags.
    ``config`` is the resolved configuration, ``stack`` the versions of torch, diffusers, ..., ``version`` our own.
    """

    mode: str  # txt2img | img2img | inpaint
    prompt: str
    negative_prompt: str
    seed: int
    rng: str = "cpu"  # where the noise is drawn
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    clip_skip: int
    prompt_weights: bool
    deep_cache: int = 1
    token_merging: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    strength: float | None = None
    init_image: PictureRef | None = None
    mask: PictureRef | None = None
    model: ModelRef
    vae: ModelRef | None = None
    loras: tuple[LoraRef, ...] = ()
    precision: str
    quantize: str | None = None
    device: str
    memory_plan: str
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    time_s: float | None = None
    stack: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    version: str


# --- writing -----------------------------------------------------------------------------------------------------------


def to_text_chunks(recipe: Recipe, sampler_name: str, schedule_type: str | None) -> dict[str, str]:
    """Return the PNG text chunks; ``sampler_name`` and ``schedule_type`` are A1111's, such as "DPM++ 2M" and "Karras".

    Paths are cut to their last part and ``config["paths"]`` stays out: a picture that is passed on tells nobody how its
    maker's disk looks. The JSON is ASCII, so that nothing on the way can damage it. A chunk of more than 64 KiB (a prompt
    of ten thousand words), which no reader would take, is left out.
    """
    document = {"schema": SCHEMA, **_without_paths(asdict(recipe))}
    chunks = {
        PARAMETERS_KEY: _infotext(recipe, sampler_name, schedule_type),
        RECIPE_KEY: json.dumps(document, allow_nan=False),
    }
    return {key: text for key, text in chunks.items() if len(text.encode()) <= MAX_CHUNK_BYTES}


def public_name(text: str) -> str:
    """The last part of a path. A hub id (``owner/name``) and text without a separator stay as they are."""
    if HUB_ID.fullmatch(text) and not text.lower().endswith(_FILE_SUFFIXES):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _without_paths(item, name) for name, item in value.items() if name != "paths"}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item, key) for item in value]
    return public_name(value) if isinstance(value, str) and key not in _NOT_NAMES else value


def _infotext(recipe: Recipe, sampler_name: str, schedule_type: str | None) -> str:
    model, vae = recipe.model, recipe.vae
    interval = f"{_plain(recipe.guidance_start)}:{_plain(recipe.guidance_end)}"
    hashes = [(_alias(lora), lora.tensors_sha256 or lora.sha256) for lora in recipe.loras]
    values = {
        "Steps": recipe.num_inference_steps,
        "Sampler": sampler_name,
        "Schedule type": schedule_type,
        "CFG scale": _plain(recipe.guidance_scale),
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": model.sha256 and model.sha256[:10],
        "Model": _stem(model.name),
        "VAE hash": vae and vae.sha256 and vae.sha256[:10],
        "VAE": vae and public_name(vae.name),
        "Denoising strength": None if recipe.strength is None else _plain(recipe.strength),
        "Clip skip": None if recipe.clip_skip == 1 else recipe.clip_skip,
        "Token merging ratio": _plain(recipe.token_merging) or None,
        "DeepCache": None if recipe.deep_cache == 1 else recipe.deep_cache,
        "Guidance interval": None if interval == "0:1" else interval,
        "RNG": recipe.rng.upper(),
        "Emphasis": None if recipe.prompt_weights else "None",
        "Lora hashes": ", ".join(f"{alias}: {sha256[:12]}" for alias, sha256 in hashes if sha256) or None,
        "Version": f"text-to-image {recipe.version}",
    }
    tagged = {match[1].split(":")[0].strip() for match in LORA_TAG.finditer(recipe.prompt)}
    tags = [f"<lora:{_alias(lora)}:{_plain(lora.weight)}>" for lora in recipe.loras if _alias(lora) not in tagged]
    negative = f"Negative prompt: {recipe.negative_prompt}" if recipe.negative_prompt else ""
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in values.items() if value is not None)
    text = "\n".join(part for part in (" ".join([recipe.prompt, *tags]), negative, line) if part)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored


def _stem(name: str) -> str:
    name = public_name(name)
    return name[: name.rindex(".")] if name.lower().endswith(_MODEL_SUFFIXES) else name


def _alias(lora: LoraRef) -> str:
    """The name in a tag and in "Lora hashes": A1111 writes it without the characters that part its lists."""
    return re.sub(r"[:,<>]", "", _stem(lora.name))


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


# --- reading -----------------------------------------------------------------------------------------------------------


def from_text_chunks(chunks: Mapping[str, str]) -> ParsedRecipe:
    """Read a picture's recipe from its text chunks, whoever wrote it; ours first, since it is the most exact.

    Values that are not what they should be are dropped and noted, never repaired. Raises UserError (refused) when there is
    no recipe, or none that can be read.
    """
    problems: list[str] = []
    for key, read in ((RECIPE_KEY, _read_own), (PARAMETERS_KEY, read_infotext), (INVOKEAI_KEY, read_invokeai)):
        if key not in chunks:
            continue
        if len(chunks[key].encode("utf-8", "replace")) > MAX_CHUNK_BYTES:
            problems.append(f"'{key}' is longer than {MAX_CHUNK_BYTES >> 10} KiB")
        elif (parsed := read(chunks[key])) is None:
            problems.append(f"'{key}' is damaged or of another program")
        else:
            return replace(parsed, notes=(*problems, *parsed.notes))
    if problems:
        raise refused(f"the picture holds no recipe that can be read ({'; '.join(problems)}); give its settings as flags")
    raise refused(
        "the picture holds no recipe (made with --no-metadata, or stripped by an editor or website); give its settings as flags"
    )


def _read_own(text: str) -> ParsedRecipe | None:
    document = load_object(text)
    if document is None or document.get("schema") != SCHEMA:
        return None
    draft = Draft("text-to-image")
    draft.take_prompt(document.get("prompt"))
    draft.take_mode(document.get("mode"))
    draft.take(**{name: document.get(name) for name in SETTINGS})
    model, vae = (_object(document.get(key)) for key in ("model", "vae"))
    draft.take_models(model.get("name"), model.get("sha256"), vae.get("name"))
    loras = document.get("loras")
    for lora in map(_object, loras if isinstance(loras, list) else []):
        hashes = (sha256_digits(lora.get(key)) for key in ("sha256", "tensors_sha256"))
        draft.take_lora(lora.get("name"), lora.get("weight"), *hashes)
    for key in ("init_image", "mask"):
        draft.take_picture(key, _object(document.get(key)))
    torch = _object(document.get("stack")).get("torch")
    draft.take_surroundings(document.get("precision"), document.get("device"), torch, document.get("quantize"))
    if document.get("rng") != "cpu":
        draft.notes.append(f"drawn with {shown(document.get('rng'))} noise; the picture will differ")
    known = {item.name for item in fields(Recipe)} | {"schema"}
    draft.note_rest("unknown fields are not used", sorted(set(document) - known))
    return draft.finish()


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
