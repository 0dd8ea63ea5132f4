"""A model id, folder, single file or ``embedded`` -> a loaded diffusers pipeline on the CPU, and what is known about it.

Components are loaded one by one with the classes that ``model_index.json`` names, after these were checked against our
lists: no code of a model is ever run, no pickle opened, and a tensor that is missing is an error and never left random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import quiet

# Before the imports, because the libraries read their variables and say their first words while being imported; here,
# because not everybody comes through the command line. What the user has set himself is respected.
quiet.silence_libraries()

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from src import cpu_memory, devices, downloads, model_files, model_source, model_weights
from src.config import AppConfig, ModelConfig, check_machine
from src.errors import refused, usage_error
from src.model_files import Family
from src.processes import from_environment
from src.tensor_files import read_header

quiet.silence_libraries()  # and after: loggers and bars that exist only now

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOKENIZERS = ("tokenizer", "tokenizer_2")
WHEELS = "https://download.pytorch.org/whl"  # of torch, a folder for each CUDA
CLASSES = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": AutoencoderKL,
    "safety_checker": StableDiffusionSafetyChecker,
    "feature_extractor": transformers.CLIPImageProcessor,
    **dict.fromkeys(TOKENIZERS, transformers.CLIPTokenizer),
}
# What the tensors' names begin with in a file in the original layout.
_UNET_WEIGHTS, _VAE_WEIGHTS = "model.diffusion_model.", ("first_stage_model.", "vae.")
_OTHER_WEIGHTS = ("cond_stage_model.", "conditioner.")
_FIRST_UNET_WEIGHT = f"{_UNET_WEIGHTS}input_blocks.0.0.weight"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A pipeline on the CPU in the precision it shall run in, and what the recipe of a picture says about it."""

    pipeline: Pipeline
    family: Family
    name: str  # hub id, or the name of a folder or file: never a path
    config_folder: Path  # with the components' configs: the model's own folder, or a single file's architecture
    weights_path: Path  # the U-Net's (first) file, or the single file: what is hashed
    vae_name: str | None  # of the VAE that replaced the model's own
    device: torch.device  # where it shall run
    dtype: torch.dtype
    scheduler_config: dict[str, Any]  # of the model's own scheduler: its noise schedule and prediction type

    @property
    def precision(self) -> str:
        """``dtype`` as configurations write it: fp16 | bf16 | fp32."""
        return precision_of(self.dtype)

    @property
    def device_name(self) -> str:
        """The card's name, or the kind of device."""
        return name_of(self.device)

    @property
    def native_size_px(self) -> int:
        """The width and height that the model was trained for."""
        size = self.pipeline.unet.config.sample_size
        return (size if isinstance(size, int) else min(size)) * self.pipeline.vae_scale_factor


def load(config: AppConfig, vae_dtype: torch.dtype | None = None) -> LoadedModel:
    """Find the model, fetch it if it is a hub id that is in no cache, and load it; nothing is moved to the device yet.

    ``vae_dtype``: of the VAE alone, straight from its file; None stands for that of all.

    Raises UserError: usage (device or precision), not found, or refused (pickle, code, other families, damaged files).
    """
    wanted = config.model
    device = pick_device(wanted.device)
    dtype = pick_dtype(wanted.precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and pinned memory, too, belong to this card
    cache = config.paths.folder("cache")
    checker = not config.optimization.disable_safety_checker
    source = model_source.resolve(
        wanted.model_id, cache, wanted.offline, revision=wanted.revision, include_safety_checker=checker
    )
    dtypes = dict.fromkeys(model_files.WEIGHT_STEMS, dtype) | {"vae": vae_dtype or dtype}
    if source.kind == "file":
        weights_path = source.path
        family, parts, folder = _load_single_file(source.path, wanted.architecture, dtypes, cache, wanted.offline)
    else:
        folder = source.path or downloads.download_model(
            wanted.model_id, cache, wanted.revision, precision=precision_of(dtype), include_safety_checker=checker
        )
        family = model_files.family_of(folder)
        classes = model_files.check_folder(folder, checker)
        weights_path = _weight_files(folder / "unet", "unet", dtype)[0]
        parts = {name: load_component(folder / name, name, kind, dtypes.get(name, dtype)) for name, kind in classes.items()}
    vae_name = None
    if wanted.vae:
        parts["vae"], vae_name = _load_other_vae(wanted.vae, parts["vae"], folder, dtypes["vae"], cache, wanted.offline)
    pipeline = _assemble(family, parts)
    cpu_memory.give_back()
    scheduler_config = dict(pipeline.scheduler.config)
    return LoadedModel(pipeline, family, source.name, folder, weights_path, vae_name, device, dtype, scheduler_config)


def unet_tensors(model: LoadedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The U-Net's tensors once more from its files, whatever became of the loaded ones. Raises UserError (refused)."""
    unet, path = model.pipeline.unet, model.weights_path
    if path.parent != model.config_folder / "unet":  # a single file in the original layout
        tensors = _read(path, dtype, (_UNET_WEIGHTS,))
        return model_weights.renamed_from_checkpoint("unet", unet, tensors)
    files = _weight_files(path.parent, "unet", model.dtype)
    tensors = {name: tensor for file in files for name, tensor in _read(file, dtype).items()}
    return model_weights.renamed(tensors, unet.state_dict())


def unet_is_finer_than_fp16(model: LoadedModel) -> bool:
    """Whether numbers of the U-Net are stored in a type that fp16 does not hold. Raises UserError (refused)."""
    path = model.weights_path
    is_single_file = path.parent != model.config_folder / "unet"
    files = [path] if is_single_file else _weight_files(path.parent, "unet", model.dtype)
    kinds = {
        info.dtype
        for file in files
        for name, info in read_header(file).tensors.items()
        if not is_single_file or name.startswith(_UNET_WEIGHTS)
    }
    return bool(kinds & {"BF16", "F32", "F64"})


def pick_device(name: str) -> torch.device:
    """``auto`` -> the first of cuda, mps and cpu that torch finds; a card with its number, the current one's if none is named.

    Raises UserError (usage) for one that is not there.
    """
    check_machine(ModelConfig(device=name))
    for_cpu_alone = torch.version.cuda is None and torch.version.hip is None
    device = torch.device(
        devices.pick_device(
            name,
            card_count=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            has_mps=torch.backends.mps.is_available(),
            why_no_card="this torch is built for the CPU alone" if for_cpu_alone else "torch finds no card",
            processes=from_environment(),
        )
    )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # set_device refuses a card without its number
    if device.type == "cuda" and torch.version.cuda is not None:
        _check_kernels(device)
    return device


def _check_kernels(device: torch.device) -> None:
    """Raises UserError (usage) for a card that this torch has no code for; torch itself loads a model first, and then fails."""
    major, minor = torch.cuda.get_device_capability(device)
    for name in torch.cuda.get_arch_list():  # sm_75 runs on 7.5 to 7.9, compute_75 on all that came later
        kind, _, number = name.rstrip("af").partition("_")
        built = divmod(int(number), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return
    version, older = torch.__version__.partition("+")[0], (major, minor) < (7, 5)
    older_build = f"pip install torch=={version}+cu126 --index-url {WHEELS}/cu126"
    way_out = older_build if older else "install a newer torch (pytorch.org)"
    raise usage_error(
        f"{torch.cuda.get_device_name(device)}: this torch has no code for compute capability {major}.{minor}; {way_out}, "
        "or use --device cpu"
    )


def idle_card(wanted: str, device: torch.device) -> str | None:
    """Why a card that is there is not used, in one line; None where none is, or another device was asked for."""
    if wanted != "auto" or device.type != "cpu" or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    card = devices.detect_card()
    if card is None:
        return None
    version = torch.__version__.partition("+")[0]
    return (
        f"{card.name} does nothing: this torch is built for the CPU alone; pip install torch=={version}+cu130 "
        f"--index-url {WHEELS}/cu130 (cu126, twice, for a card before 2018)"
    )


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` -> fp16 on a card; on a CPU bf16 where it computes in it (AMX, AVX512-BF16), else fp32.

    Raises UserError (usage) for an unknown precision, and for fp16 on a CPU.
    """
    check_machine(ModelConfig(precision=precision))
    abilities = torch.cpu.get_capabilities()
    cpu_bf16 = bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
    return DTYPES[devices.pick_precision(precision, on_card=device.type != "cpu", cpu_bf16=cpu_bf16)]


def name_of(device: torch.device) -> str:
    """The card's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def precision_of(dtype: torch.dtype) -> str:
    """As configurations write it: fp16 | bf16 | fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def load_component(folder: Path, component: str, class_name: str, dtype: torch.dtype) -> Any:
    """One component of a model folder, with every tensor that its configuration asks for."""
    library = diffusers if component == "scheduler" else transformers
    kind = CLASSES.get(component) or getattr(library, class_name, None)
    again = "take another copy of the model"
    if kind is None:
        raise refused(f"{folder}: the installed {library.__name__} knows no {class_name}; {again}")
    if component not in model_files.WEIGHT_STEMS:
        return _checked(folder, lambda: kind.from_pretrained(folder, local_files_only=True), again)
    files = _weight_files(folder, component, dtype)
    model = _checked(folder, lambda: _build(kind, folder), again)
    tensors = {name: tensor for file in files for name, tensor in _read(file, dtype).items()}
    missing = _checked(folder, lambda: model_weights.fill(model, model_weights.renamed(tensors, model.state_dict())), again)
    if missing:
        raise refused(f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}; {again}")
    return model.eval()


def _build(kind: Any, folder: Path, **changes: Any) -> Any:
    """A network by the configuration in ``folder``, without weights."""
    if issubclass(kind, diffusers.ModelMixin):
        facts = kind.load_config(folder, local_files_only=True) | changes
        return model_weights.build_empty(lambda: kind.from_config(facts))
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    return model_weights.build_empty(lambda: kind(config))


def _read(path: Path, dtype: torch.dtype, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    try:
        with cpu_memory.for_weights():
            return model_weights.read_tensors(path, dtype, prefixes)
    except OSError as error:
        raise refused(f"{path}: cannot be read ({error.strerror or error}); check its permissions and the disk") from None


def _weight_files(folder: Path, component: str, dtype: torch.dtype) -> list[Path]:
    """The .safetensors files of a component to load."""
    names = {path.name for path in folder.glob("*")}
    chosen, _ = model_files.select_weights(component, names, prefer_fp16=dtype != torch.float32)
    return [folder / name for name in chosen if name.endswith(".safetensors")]


def _load_single_file(
    path: Path, architecture: str | None, dtypes: dict[str, torch.dtype], cache: Path, offline: bool
) -> tuple[Family, dict[str, Any], Path]:
    """A checkpoint in the original layout: its family, its components, and the folder with their configurations.

    The file holds the networks alone; the tokenizer is that of the architecture's folder or of the family.
    """
    header = read_header(path)
    family = model_files.family_of_header(header, path)
    prediction = model_files.prediction_type_of(header)
    folder = model_files.architecture_folder(header, path, architecture)
    classes = model_files.read_components(folder, include_safety_checker=False)
    has_tokenizers = all(_is_whole(folder / name, name) for name in classes if name in TOKENIZERS)
    tokenizers = folder if has_tokenizers else downloads.download_tokenizer(family, cache, offline=offline)
    tensors = _read(path, dtypes["unet"], (_UNET_WEIGHTS, *_OTHER_WEIGHTS)) | _read(path, dtypes["vae"], _VAE_WEIGHTS)
    parts: dict[str, Any] = {}
    for name, kind in classes.items():
        if name in model_files.WEIGHT_STEMS:
            parts[name] = _convert(path, name, kind, tensors, folder)
        else:
            parts[name] = load_component((tokenizers if name in TOKENIZERS else folder) / name, name, kind, dtypes["unet"])
    if prediction and not architecture:
        changes = {"prediction_type": prediction} | ({"rescale_betas_zero_snr": True} if "ztsnr" in header.tensors else {})
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config, **changes)
    return family, parts, folder


def _convert(path: Path, component: str, class_name: str, tensors: dict[str, torch.Tensor], architecture: Path) -> Any:
    """One component out of a file in the original layout, with every tensor that the architecture asks for."""
    hint = f"is it a '{architecture.name}'? {model_files.architecture_hint()}"
    kind = CLASSES.get(component) or getattr(transformers, class_name)

    def build() -> tuple[Any, list[str]]:
        # An inpainting U-Net differs from its family's in this alone.
        changes = {"in_channels": tensors[_FIRST_UNET_WEIGHT].shape[1]} if component == "unet" else {}
        model = _build(kind, architecture / component, **changes)
        return model, model_weights.fill(model, model_weights.renamed_from_checkpoint(component, model, tensors))

    model, missing = _checked(path, build, hint)
    if missing:
        raise refused(f"{path}: {len(missing)} tensors are missing, such as {component}.{missing[0]}; {hint}")
    surplus = sum(name.startswith(_UNET_WEIGHTS) for name in tensors) - len(model.state_dict())
    if component == "unet" and surplus:
        raise refused(f"{path}: its U-Net has {surplus} tensors too many; {hint}")
    return model.eval()


def _is_whole(folder: Path, component: str) -> bool:
    return model_files.component_error(folder, component, {path.name for path in folder.glob("*")}) is None


def _load_other_vae(
    vae: str, own: AutoencoderKL, config_folder: Path, dtype: torch.dtype, cache: Path, offline: bool
) -> tuple[AutoencoderKL, str]:
    """The VAE that replaces a model's own, and its name: a folder, a file in either layout, or the VAE out of a checkpoint.

    A file brings no configuration and is given that of the model's own.
    """
    source = model_source.resolve_vae(vae, cache, offline)
    if source.kind == "file":
        names = read_header(source.path).tensors
        is_checkpoint = any(name.startswith(_VAE_WEIGHTS) for name in names)  # else a VAE's own file
        prefixes = _VAE_WEIGHTS if is_checkpoint else ("",)
        return _convert(source.path, "vae", "AutoencoderKL", _read(source.path, dtype, prefixes), config_folder), source.name
    folder = source.path or downloads.download_vae(vae, cache, precision=precision_of(dtype))
    other = load_component(model_files.vae_folder(folder), "vae", "AutoencoderKL", dtype)
    for fact in ("scaling_factor", "latent_channels"):
        if other.config[fact] != own.config[fact]:
            raise refused(
                f"{vae}: belongs to another family of models: its {fact} is {other.config[fact]}, "
                f"this model's is {own.config[fact]}; leave out --vae"
            )
    return other, source.name


def _assemble(family: Family, parts: dict[str, Any]) -> Pipeline:
    if family == "SDXL":
        parts = {name: part for name, part in parts.items() if name not in model_files.OF_SAFETY_CHECKER}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)  # None adds one where its package is installed
    without = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**(without | parts), requires_safety_checker=False)  # False: no lecture if there is none


def _checked(path: Path, build: Callable[[], Any], hint: str) -> Any:
    """Run a library's loader. What loaders raise over files that they cannot use has no class in common, and many lines."""
    try:
        return build()
    except Exception as error:
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        raise refused(f"{path}: cannot be loaded ({cause}); {hint}") from error
