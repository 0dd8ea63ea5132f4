"""What a picture says of itself, read from other programs' notes: A1111's text and InvokeAI's JSON.

A recipe is data from a stranger: fields are allow-listed, types and ranges checked, and no path in it is kept. What does
not pass is dropped with a note. Formats: A1111 ``modules/infotext_utils.py`` (parse_generation_parameters),
InvokeAI ``invokeai/app/invocations/metadata.py`` (core_metadata).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from src.config import PRECISIONS, QUANTIZATIONS

MODES = ("txt2img", "img2img", "inpaint")
MAX_NOTES = 20
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LORA_TAG = re.compile(r"<lora:([^<>]+)>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA by the stem of its file name. Hashes are 64 hex digits; A1111's text holds the first 12 of the second.

    ``sha256`` is that of the whole file, ``tensors_sha256`` of the bytes behind the safetensors header (A1111's LoRA hash,
    which survives a change of the file's notes). ``matched_keys`` of ``total_keys`` found their place in the model.
    """

    name: str
    weight: float
    sha256: str | None = None
    matched_keys: int | None = None
    total_keys: int | None = None
    tensors_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class PictureRef:
    """A picture that went into this one: its file's name and SHA-256 (None if it was in memory), never where it lay."""

    name: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a picture was drawn on; None where the writer does not say. The texts are a stranger's, checked to be printable."""

    precision: str | None = None  # fp16 | bf16 | fp32
    device: str | None = None
    torch: str | None = None  # version
    quantize: str | None = None  # int8 | nf4: the U-Net's matrices


@dataclass(frozen=True, slots=True)
class ParsedRecipe:
    """A picture's recipe in our names; what is missing or unusable is absent from ``settings``.

    ``settings`` has field names of ``GenerationConfig``; ``scheduler`` is the sampler's name as the writer spells it.
    ``prompt`` and ``negative_prompt`` are as written, with ``<lora:...>`` tags and any characters: clean before printing.
    ``loras`` holds the tagged ones too. Names are names, not places: look them up among the user's own files.
    ``model_sha256`` is 10 to 64 hex digits. ``notes`` say, one line each, what will not be as it was.
    """

    dialect: str  # text-to-image | a1111 | invokeai
    mode: str
    prompt: str
    settings: dict[str, Any]
    model_name: str | None = None
    model_sha256: str | None = None
    vae_name: str | None = None
    loras: tuple[LoraRef, ...] = ()
    init_image: PictureRef | None = None
    mask: PictureRef | None = None
    drawn_on: Surroundings = Surroundings()
    notes: tuple[str, ...] = ()


# --- checks: a value comes back in its type, or a ValueError says what was expected ---------------------------------------


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high} is expected")
        return value

    return check


def _number(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # false for NaN
            raise ValueError(f"a number from {low:g} to {high:g} is expected")
        return float(value)

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text is expected")
    return value


def _name(value: Any) -> str:
    """A name without a path: what comes from a picture must not say where to look."""
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable() or re.search(r"^\.+$|[/\\]", value):
        raise ValueError("a plain name is expected")
    return value


def _model_name(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 200 and HUB_ID.fullmatch(value) else _name(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is expected")
    return value


def sha256_digits(value: Any) -> str | None:
    """A SHA-256 or its first digits; None for all else, since programs store other hashes under that name."""
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{10,64}", value) else None


SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "width": _whole(8, 8192),
    "height": _whole(8, 8192),
    "num_inference_steps": _whole(1, 1000),
    "guidance_scale": _number(0, 100),
    "negative_prompt": _text,
    "scheduler": _name,
    "seed": _whole(0, 2**32 - 1),
    "clip_skip": _whole(1, 32),
    "strength": _number(0, 1),
    "prompt_weights": _flag,
    "deep_cache": _whole(1, 50),
    "token_merging": _number(0, 0.75),
    "guidance_start": _number(0, 1),
    "guidance_end": _number(0, 1),
}
_LORA_WEIGHT = _number(-100, 100)


@dataclass(slots=True)
class Draft:
    """A recipe while it is read: what passed its check, and notes on what did not."""

    dialect: str
    mode: str = "txt2img"
    prompt: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    model_name: str | None = None
    model_sha256: str | None = None
    vae_name: str | None = None
    loras: list[LoraRef] = field(default_factory=list)
    init_image: PictureRef | None = None
    mask: PictureRef | None = None
    drawn_on: Surroundings = Surroundings()
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def noting(self, label: str, value: Any) -> Iterator[None]:
        """Turn a failed check into a note."""
        try:
            yield
        except ValueError as error:
            self.notes.append(f"{label} {shown(value)} is not used: {error}")

    def take(self, **values: Any) -> None:
        """Keep each setting that passes its check; None means that the writer does not say."""
        for name, value in values.items():
            if value is not None:
                with self.noting(name, value):
                    self.settings[name] = SETTINGS[name](value)

    def take_prompt(self, prompt: Any) -> None:
        with self.noting("prompt", prompt):
            self.prompt = _text(prompt)

    def take_mode(self, mode: Any) -> None:
        with self.noting("mode", mode):
            if mode not in MODES:
                raise ValueError(f"{', '.join(MODES)} are known")
            self.mode = mode

    def take_models(self, name: Any, sha256: Any, vae: Any) -> None:
        if name is not None:
            with self.noting("model", name):
                self.model_name = _model_name(name)
        if vae is not None:
            with self.noting("VAE", vae):
                self.vae_name = _model_name(vae)
        self.model_sha256 = sha256_digits(sha256)

    def take_lora(self, name: Any, weight: Any, sha256: str | None = None, tensors_sha256: str | None = None) -> None:
        with self.noting("LoRA", name):
            self.loras.append(LoraRef(_name(name), _LORA_WEIGHT(weight), sha256, tensors_sha256=tensors_sha256))

    def take_picture(self, name: str, picture: Mapping[str, Any]) -> None:
        """``name`` is init_image or mask; without a SHA-256 there is nothing to know it by."""
        if (sha256 := sha256_digits(picture.get("sha256"))) is not None:
            with self.noting(name, picture.get("name")):
                setattr(self, name, PictureRef(_name(picture.get("name")), sha256))

    def take_surroundings(self, precision: Any, device: Any, torch: Any, quantize: Any = None) -> None:
        texts = (
            text if isinstance(text, str) and text.isprintable() and len(text) <= 100 else None for text in (device, torch)
        )
        known = [value if value in names else None for value, names in ((precision, PRECISIONS[1:]), (quantize, QUANTIZATIONS))]
        self.drawn_on = Surroundings(known[0], *texts, known[1])

    def note_rest(self, label: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            self.notes.append(f"{label}: {', '.join(shown(name)[1:-1] for name in names[:12])}{more}")

    def finish(self) -> ParsedRecipe:
        if len(self.notes) > MAX_NOTES:
            self.notes[MAX_NOTES:] = [f"and {len(self.notes) - MAX_NOTES} more of this kind"]
        return ParsedRecipe(
            self.dialect, self.mode, self.prompt, self.settings, self.model_name, self.model_sha256, self.vae_name,
            tuple(self.loras), self.init_image, self.mask, self.drawn_on, tuple(self.notes),
        )  # fmt: skip


def shown(value: Any) -> str:
    """A stranger's value for a note: escaped, on one line, short."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}...{text[-1]}"


def load_object(text: str) -> dict[str, Any] | None:
    """Parse strict JSON (no NaN, no Infinity) that holds an object; None for anything else."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


# --- A1111 -------------------------------------------------------------------------------------------------------------

_PAIR = re.compile(r'(\w[\w /-]{1,63}):\s*("(?:[^"\\]|\\.)+"|[^,]*)(?:,|$)')
_MIN_PAIRS = 3  # with fewer, the last line belongs to the prompt
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_NEGATIVE = "Negative prompt:"
_A1111_READ = {
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "Denoising strength", "RNG"),
    *("Model", "Model hash", "VAE", "VAE hash", "Lora hashes", "Emphasis", "Hashes", "Version", "User"),
    *("Token merging ratio", "DeepCache", "Guidance interval"),
}
_AUTOMATIC = {  # A1111's own schedule of a sampler since 1.9, where it is not the plain one: modules/sd_samplers_kdiffusion.py
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a"), "Karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "Exponential"),
}


def read_infotext(text: str) -> ParsedRecipe | None:
    """Read A1111's ``parameters`` text, also as Forge, SD.Next, stable-diffusion.cpp and we write it; None if it is not one.

    Old files say "Sampler: DPM++ 2M Karras", new ones "Sampler: DPM++ 2M, Schedule type: Karras", or "Automatic", which is
    Karras there: all give the first.
    """
    *lines, last = text.strip().split("\n")
    pairs = {key: _unquote(value.strip()) for key, value in _PAIR.findall(last)}
    if len(pairs) < _MIN_PAIRS:
        return None
    draft = Draft("a1111")
    prompt, negative = _split_prompts(lines)
    draft.take_prompt(prompt)
    has_strength = "Denoising strength" in pairs and not any(key.startswith(("Hires", "First pass")) for key in pairs)
    _take_infotext_settings(draft, pairs, negative, has_strength)
    is_inpaint = has_strength and any(key.startswith(("Mask", "Inpaint")) for key in pairs)
    draft.take_mode("inpaint" if is_inpaint else "img2img" if has_strength else "txt2img")
    draft.take_models(pairs.get("Model"), pairs.get("Model hash"), pairs.get("VAE"))
    _take_tagged_loras(draft, pairs.get("Lora hashes", ""))
    if pairs.get("RNG", "GPU").upper() != "CPU":
        draft.notes.append("drawn with GPU noise; the picture will differ")
    if (emphasis := pairs.get("Emphasis", "Original")) not in ("Original", "None"):
        applied = "; the prompt's weights are applied here" if emphasis == "Ignore" else ""
        draft.notes.append(f"not reproduced: Emphasis {shown(emphasis)}{applied}")
    draft.note_rest("not reproduced", [key for key in pairs if key not in _A1111_READ])
    return draft.finish()


def _split_prompts(lines: list[str]) -> tuple[str, str]:
    lines = [line.strip() for line in lines]
    start = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = [line.removeprefix(_NEGATIVE).strip() for line in lines[start:]]
    return "\n".join(lines[:start]), "\n".join(negative).lstrip("\n")


def _take_infotext_settings(draft: Draft, pairs: Mapping[str, str], negative: str, has_strength: bool) -> None:
    sampler, schedule = pairs.get("Sampler"), pairs.get("Schedule type", "")
    if schedule == "Automatic":
        schedule = _AUTOMATIC.get(sampler, "")
    if sampler and schedule and not sampler.endswith(schedule):
        sampler = f"{sampler} {schedule}"
    size = _SIZE.fullmatch(pairs.get("Size", ""))
    start, _, end = pairs.get("Guidance interval", ":").partition(":")
    draft.take(
        width=int(size[1]) if size else None, height=int(size[2]) if size else None,
        num_inference_steps=_parse_number(pairs.get("Steps")), guidance_scale=_parse_number(pairs.get("CFG scale")),
        negative_prompt=negative, scheduler=sampler, seed=_parse_number(pairs.get("Seed")),
        clip_skip=_parse_number(pairs.get("Clip skip", "1")), prompt_weights=pairs.get("Emphasis") != "None",
        strength=_parse_number(pairs.get("Denoising strength")) if has_strength else None,
        deep_cache=_parse_number(pairs.get("DeepCache")), token_merging=_parse_number(pairs.get("Token merging ratio")),
        guidance_start=_parse_number(start or None), guidance_end=_parse_number(end or None),
    )  # fmt: skip


def _take_tagged_loras(draft: Draft, hashes_text: str) -> None:
    entries = (entry.rpartition(":") for entry in hashes_text.split(","))
    hashes = {name.strip(): sha256_digits(digits.strip()) for name, _, digits in entries}
    for match in LORA_TAG.finditer(draft.prompt):
        name, *weights = (part.strip() for part in match[1].split(":"))
        weight = _parse_number(weights[0]) if weights else 1.0
        draft.take_lora(name, weight, tensors_sha256=hashes.get(name.replace(",", "")))


def _parse_number(text: str | None) -> int | float | str | None:
    """A number as A1111 writes it; other text as it is, for the check to refuse."""
    if text and re.fullmatch(r"[+-]?\d{1,30}", text):
        return int(text)
    return float(text) if text and re.fullmatch(r"[+-]?(\d+\.\d*|\.?\d+)(e[+-]?\d+)?", text, re.IGNORECASE) else text


def _unquote(value: str) -> str:
    if len(value) < 2 or not value.startswith('"') or not value.endswith('"'):
        return value
    try:
        return str(json.loads(value))
    except (ValueError, RecursionError):
        return value


# --- InvokeAI ----------------------------------------------------------------------------------------------------------

_INVOKEAI_READ = {
    *("positive_prompt", "negative_prompt", "width", "height", "seed", "rand_device", "cfg_scale", "steps", "scheduler"),
    *("clip_skip", "model", "loras", "strength", "vae", "init_image", "generation_mode", "app_version"),
}
_COMPEL_WEIGHT = re.compile(r"[\w)][+-]{2}|\)[+\d-]")


def read_invokeai(text: str) -> ParsedRecipe | None:
    """Read InvokeAI's ``invokeai_metadata``, version 3 and later; None if it is not one."""
    document = load_object(text)
    if document is None or "positive_prompt" not in document:
        return None
    draft = Draft("invokeai")
    draft.take_prompt(document["positive_prompt"])
    draft.take_mode(_invokeai_mode(document.get("generation_mode")))
    skipped = document.get("clip_skip")
    draft.take(
        width=document.get("width"), height=document.get("height"), num_inference_steps=document.get("steps"),
        guidance_scale=document.get("cfg_scale"), negative_prompt=document.get("negative_prompt"),
        scheduler=document.get("scheduler"), seed=document.get("seed"),
        clip_skip=skipped + 1 if type(skipped) is int else skipped,  # it counts the layers left out, we count from 1
        strength=None if draft.mode == "txt2img" else document.get("strength"),
    )  # fmt: skip
    model = document.get("model")
    algorithm, _, digits = str(_member(model, "hash")).partition(":")  # mostly "blake3:..."
    draft.take_models(_model_label(model), digits if algorithm == "sha256" else None, _model_label(document.get("vae")))
    loras = document.get("loras")
    for item in loras if isinstance(loras, list) else []:
        draft.take_lora(_model_label(_member(item, "model", "lora")), _member(item, "weight"))
    if document.get("rand_device") not in (None, "cpu"):
        draft.notes.append("drawn with GPU noise; the picture will differ")
    if _COMPEL_WEIGHT.search(draft.prompt):
        draft.notes.append("the prompt's weights are InvokeAI's, such as word++; write them as (word:1.2)")
    draft.note_rest("not reproduced", [key for key in document if key not in _INVOKEAI_READ and document[key]])
    return draft.finish()


def _invokeai_mode(mode: Any) -> Any:
    plain = "txt2img" if mode is None else str(mode).removeprefix("sdxl_")
    return "inpaint" if plain == "outpaint" else plain


def _member(value: Any, *names: str) -> Any:
    """The first of these members that an object has; None for anything that is not an object."""
    return next((value[name] for name in names if name in value), None) if isinstance(value, dict) else None


def _model_label(value: Any) -> Any:
    """A model is an object with a name (version 3: "model_name"), in old files its name alone."""
    return _member(value, "name", "model_name") if isinstance(value, dict) else value
