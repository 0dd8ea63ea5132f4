"""What makes a folder or a file a whole model of a supported kind: classes, configurations, weights, family. No torch.

A model folder is the diffusers layout: ``model_index.json`` names the class of each component, and each component has
its folder. Classes are checked against the lists below before any library sees them: a model is data, not a program.
The family is read from the U-Net's configuration or tensors, never from a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from src.config import PRESETS_FOLDER, PROJECT_FOLDER
from src.errors import UserError, not_found, refused
from src.tensor_files import Header, quoted, read_header

Family = Literal["SD1", "SD2", "SDXL"]

EMBEDDED = PROJECT_FOLDER / "models" / "embedded"  # the model that is shipped
ARCHITECTURES = PRESETS_FOLDER / "architectures"  # component configs without weights, for single files
SUPPORTED = "supported are Stable Diffusion 1.5, 2.1 and SDXL"
MAX_JSON_BYTES = 1 << 20
PICKLED = (
    "has only pickled weights (.bin), which can run code and are never read; take a safetensors copy, "
    "or let https://huggingface.co/spaces/safetensors/convert make one"
)

PIPELINES = frozenset(f"StableDiffusion{kind}{task}Pipeline" for kind in ("", "XL") for task in ("", "Img2Img", "Inpaint"))
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
_TEXT_ENCODERS = frozenset({"CLIPTextModel", "CLIPTextModelWithProjection"})
_IMAGE_PROCESSORS = frozenset({"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"})
CLASSES: dict[str, frozenset[str]] = {
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL"}),
    "text_encoder": _TEXT_ENCODERS,
    "text_encoder_2": _TEXT_ENCODERS,
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
    "scheduler": frozenset(),  # any diffusers scheduler
    "safety_checker": frozenset({"StableDiffusionSafetyChecker"}),
    "feature_extractor": _IMAGE_PROCESSORS,
}
_SCHEDULER = re.compile(r"[A-Z]\w*Scheduler", re.ASCII)
_NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_NEEDED_BY_SDXL = (*_NEEDED, "text_encoder_2", "tokenizer_2")
OF_SAFETY_CHECKER = frozenset({"safety_checker", "feature_extractor"})

# Configuration files of a component: one of these sets must be there. Weights: the stem of their file name.
_VOCABULARY = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
CONFIG_FILES: dict[str, tuple[set[str], ...]] = {
    "tokenizer": _VOCABULARY,
    "tokenizer_2": _VOCABULARY,
    "scheduler": ({"scheduler_config.json"},),
    "feature_extractor": ({"preprocessor_config.json"},),
}
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "safety_checker": "model",
}


def check_folder(folder: Path, include_safety_checker: bool = True) -> dict[str, str]:
    """Check that a diffusers folder is a whole model of a supported kind; return component -> class name.

    Raises UserError: not found for what is missing, refused for pickles, code, foreign classes and other model families.
    """
    components = read_components(folder, include_safety_checker)
    script = next((path for pattern in ("*.py", "*/*.py") for path in folder.glob(pattern)), None)
    if script:
        raise refused(f"{folder}: holds code ({quoted(script.name)}), but a model must be data alone; remove it if it is yours")
    for component in components:
        error = component_error(folder, component, {path.name for path in (folder / component).glob("*")})
        if error:
            raise error
    return components


def read_components(folder: Path, include_safety_checker: bool = True) -> dict[str, str]:
    """Read ``model_index.json``: component -> class name, without those that are null. Every class is on our lists."""
    index = read_json(folder / "model_index.json", "so it is no model; name a folder with one, or a .safetensors file")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise refused(f"{folder}: its pipeline is code of its own ({quoted(str(pipeline))}), which is never run")
    if pipeline not in PIPELINES:
        raise refused(f"{folder}: a {quoted(pipeline)} model is not supported; {SUPPORTED}")
    components: dict[str, str] = {}
    for name, value in index.items():
        # Plain values are options. An image encoder serves image prompts, which are not drawn here.
        if not isinstance(value, list) or value in ([], [None, None]) or name == "image_encoder":
            continue
        kind = value[1] if len(value) == 2 and isinstance(value[1], str) else str(value)
        if kind not in CLASSES.get(name, ()) and not (name == "scheduler" and _SCHEDULER.fullmatch(kind)):
            raise refused(f"{folder}: component {quoted(name)} is a {quoted(kind)}, which is not known here; {SUPPORTED}")
        components[name] = kind
    if "text_encoder" not in components and "text_encoder_2" in components:
        raise _refiner(folder)
    for name in _NEEDED_BY_SDXL if "XL" in pipeline else _NEEDED:
        if name not in components:
            raise refused(f"{folder}: model_index.json names no {name}; take a complete copy of the model")
    return {name: kind for name, kind in components.items() if include_safety_checker or name not in OF_SAFETY_CHECKER}


def component_error(model: Path | str, component: str, files: Collection[str]) -> UserError | None:
    """Why these files are no whole component, or None. Works on names alone, so also on a listing of the hub."""
    way_out = "draw with --no-safety-checker" if component in OF_SAFETY_CHECKER else "take a complete copy of the model"
    if not files:
        return not_found(f"{model}: component '{component}' is missing; {way_out}")
    choices = CONFIG_FILES.get(component, ({"config.json"},))
    if not any(choice <= set(files) for choice in choices):
        wanted = " or ".join(" + ".join(sorted(choice)) for choice in choices)
        return not_found(f"{model}: component '{component}' has no {wanted}; {way_out}")
    if component not in WEIGHT_STEMS or select_weights(component, files)[0]:
        return None
    if any(name.endswith(".bin") for name in files):
        return refused(f"{model}: component '{component}' {PICKLED}")
    return not_found(f"{model}: component '{component}' has no complete .safetensors weights; {way_out}")


def select_weights(component: str, files: Collection[str], prefer_fp16: bool = False) -> tuple[list[str], str | None]:
    """The weight files to use of a component, and their variant (``"fp16"`` or None); an empty list if none are whole.

    A model may come in one file or in shards ``-00001-of-00002`` with an index, and each as full or half precision.
    """
    stem = WEIGHT_STEMS[component]
    for variant in ("fp16", None) if prefer_fp16 else (None, "fp16"):
        dot = f".{variant}" if variant else ""
        if f"{stem}{dot}.safetensors" in files:
            return [f"{stem}{dot}.safetensors"], variant
        index = f"{stem}.safetensors.index{dot}.json"
        # Older diffusers wrote the variant behind the shard's number, newer write it before.
        shard = re.compile(rf"{stem}(?:{re.escape(dot)}-\d+-of-(\d+)|-\d+-of-(\d+){re.escape(dot)})\.safetensors")
        counts = {name: int(match[1] or match[2]) for name in files if (match := shard.fullmatch(name))}
        if index in files and counts and set(counts.values()) == {len(counts)}:
            return [index, *sorted(counts)], variant
    return [], None


def vae_folder(folder: Path) -> Path:
    """The folder of the VAE itself, checked to be complete: ``folder``, or ``folder/vae`` of a whole model."""
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    check_vae_config(folder)
    error = component_error(folder, "vae", {path.name for path in folder.glob("*")})
    if error:
        raise error
    return folder


def check_vae_config(folder: Path) -> None:
    """Refuse a folder whose ``config.json`` is not that of an AutoencoderKL."""
    config = read_json(folder / "config.json", "so it is no VAE; name a folder with one, or a .safetensors file")
    kind = config.get("_class_name")
    if kind not in CLASSES["vae"]:
        raise refused(f"{folder}: holds a {quoted(str(kind))}, not the AutoencoderKL that is needed; {SUPPORTED}")


def family_of(path: Path) -> Family:
    """The family of a model folder or single file, from its U-Net's configuration or its tensors' names and shapes."""
    if not path.is_dir():
        return family_of_header(read_header(path), path)
    config = read_json(path / "unet" / "config.json", "so the model is incomplete; take a complete copy")
    _check_in_channels(config.get("in_channels", 4), path, config.get("out_channels", 4))
    if config.get("addition_embed_type") == "text_time":
        return "SDXL"
    return "SD2" if config.get("use_linear_projection") else "SD1"


# Files that people mistake for a model, by the beginning of a tensor's name.
_FOREIGN_FILES = {
    "is a LoRA, not a model; load it with --lora": ("lora_unet_", "lora_te", "unet.", "text_encoder."),
    "is a VAE, not a model; load it with --vae": ("encoder.down", "decoder.up", "decoder.mid"),
    "holds a U-Net alone; take the full checkpoint, or the model's folder": ("down_blocks.", "input_blocks."),
    f"is a Flux model; {SUPPORTED}": ("double_blocks.", "model.diffusion_model.double_blocks."),
    f"is a Stable Diffusion 3 model; {SUPPORTED}": ("joint_blocks.", "model.diffusion_model.joint_blocks."),
}


_FIRST_UNET_WEIGHT = "model.diffusion_model.input_blocks.0.0.weight"


def family_of_header(header: Header, path: Path) -> Family:
    """The family of a single file in the original layout (CompVis, Stability AI), by its text encoders."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in header.tensors)

    for verdict, prefixes in _FOREIGN_FILES.items():
        if has(*prefixes):
            raise refused(f"{path}: {verdict}")
    conv_in = header.tensors.get(_FIRST_UNET_WEIGHT)
    if conv_in is None or len(conv_in.shape) != 4:
        raise refused(f"{path}: is no Stable Diffusion checkpoint, for it has no 'model.diffusion_model' tensors; {SUPPORTED}")
    _check_in_channels(conv_in.shape[1], path)
    if has("conditioner.embedders.1.model."):
        return "SDXL"
    if has("conditioner.embedders.0.model."):
        raise _refiner(path)
    if has("cond_stage_model.model."):
        return "SD2"
    if has("cond_stage_model.transformer."):
        return "SD1"
    raise refused(f"{path}: holds a U-Net but no text encoder; take the full checkpoint")


def in_channels_of(header: Header) -> int:
    """How many channels the U-Net of a single file takes: 9 for inpainting. Its family was found before."""
    return header.tensors[_FIRST_UNET_WEIGHT].shape[1]


def prediction_type_of(header: Header) -> Literal["epsilon", "v_prediction"] | None:
    """What a single file says of its training target, if anything: a ``v_pred`` tensor (v-prediction SDXL models), or
    the metadata of Stability's modelspec or of sd-scripts."""
    modelspec = header.metadata.get("modelspec.prediction_type", "").lower()
    sd_scripts = header.metadata.get("ss_v_parameterization", "").lower()
    if "v_pred" in header.tensors or modelspec.startswith("v") or sd_scripts == "true":
        return "v_prediction"
    return "epsilon" if modelspec.startswith("eps") or sd_scripts == "false" else None


def architecture_folder(header: Header, path: Path, named: str | None = None) -> Path:
    """The folder with the component configs of a single file: ``named`` (bundled, or any folder), else its family's.

    SD 2.1 exists for 768 px with v-prediction and as a "base" for 512 px with epsilon, with tensors of the same names and
    shapes. A file whose metadata says nothing is taken for the former; ``--architecture sd21-base`` names the latter.
    """
    family = family_of_header(header, path)
    usual = {"SD1": "sd15", "SD2": "sd21-base" if prediction_type_of(header) == "epsilon" else "sd21", "SDXL": "sdxl"}
    for folder in (ARCHITECTURES / (named or usual[family]), Path(named or usual[family]).expanduser()):
        if folder.is_dir():
            return folder
    raise not_found(f"architecture '{named}': neither bundled nor a folder; {architecture_hint()}")


def architecture_hint() -> str:
    return f"--architecture takes a folder or {', '.join(sorted(path.parent.name for path in ARCHITECTURES.glob('*/unet')))}"


def read_json(path: Path, if_missing: str) -> dict[str, Any]:
    """Read a small JSON object. Raises UserError: not found, or refused when it is damaged or no object."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError:
        raise not_found(f"{path.parent}: has no {path.name}, {if_missing}") from None
    try:
        content = json.loads(data.decode("utf-8")) if len(data) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise refused(f"{path}: is not the JSON object it should be; copy or download it again")
    return content


def _check_in_channels(in_channels: object, path: Path, latent_channels: int = 4) -> None:
    """Refuse U-Nets that take anything but noisy latents, or these of 4 channels with a mask and a picture (9)."""
    if in_channels not in (latent_channels, 9):
        cause = f"its U-Net takes {in_channels} channels, not {latent_channels}: it is no text-to-image model"
        raise refused(f"{path}: {cause}; {SUPPORTED}")


def _refiner(path: Path) -> UserError:
    return refused(f"{path}: is the SDXL refiner, which cannot draw on its own; take the SDXL base model")
