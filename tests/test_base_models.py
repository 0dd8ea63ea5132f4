"""Loading: the tiny pipelines come back pixel for pixel from a folder, from one file, from a hub; the rest is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

from src import base_models, model_files
from src.base_models import LoadedModel, StableDiffusionSafetyChecker, load, pick_device, pick_dtype
from src.config import PROJECT_FOLDER, AppConfig
from src.downloads import REFERENCE_REPOSITORIES
from src.errors import ExitCode
from tests import original_layout
from tests.hub_server import serve
from tests.tiny import pipelines as tiny
from tests.tiny.model_folders import refusal

KINDS = {"SD1": lambda: tiny.sd1(), "SD2": lambda: tiny.sd1(linear=True), "SDXL": lambda: tiny.sdxl()}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """For each family: a folder ``SD1``, a single file ``SD1.safetensors``, a folder without weights ``SD1-configs``."""
    shelf = tmp_path_factory.mktemp("shelf")
    for family, make in KINDS.items():
        pipeline = make()
        tiny.save(pipeline, shelf / family)
        original_layout.write(shelf / f"{family}.safetensors", pipeline)
        configs_of(tiny.save(pipeline, shelf / f"{family}-configs"))
    return shelf


def configs_of(folder: Path) -> Path:
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "user-cache"))
    return tmp_path


def settings(model_id: object, **model: object) -> AppConfig:
    config = AppConfig()
    config.paths.cache = "cache"
    for name, value in {"model_id": str(model_id), "device": "cpu", "precision": "fp32", "offline": True, **model}.items():
        setattr(config.model, name, value)
    return config


def picture(pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a fox", num_inference_steps=2, height=64, width=64, generator=generator, output_type="np").images


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to the last bits of fp32: the same sum is rounded differently where the weights lie differently in memory."""
    return bool(np.abs(one - other).max() < 1e-5)


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit(path: Path, change) -> None:
    """Rewrite a .safetensors file through ``change(tensors)``."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


# -- folders


@pytest.mark.parametrize("family", KINDS)
def test_a_folder_draws_what_its_pipeline_drew(here, shelf, family):
    model = load(settings(shelf / family))
    assert same(picture(model.pipeline), picture(KINDS[family]()))
    assert (model.family, model.name, model.vae_name, model.precision) == (family, family, None, "fp32")
    assert model.weights_path == shelf / family / UNET
    assert (model.device_name, model.native_size_px) == ("cpu", 64)
    assert model.scheduler_config["use_karras_sigmas"] is True
    assert not any(module.training for module in model.pipeline.components.values() if isinstance(module, torch.nn.Module))


def test_the_embedded_model_is_loaded_in_the_wanted_precision(here):
    for precision in ("bf16", "fp32"):
        model = load(settings("embedded", precision=precision))
        assert (model.name, model.precision, model.native_size_px) == ("embedded", precision, 128)
        parts = (model.pipeline.unet, model.pipeline.vae, model.pipeline.text_encoder)
        assert {tensor.dtype for part in parts for tensor in part.parameters()} == {base_models.DTYPES[precision]}


def test_the_half_precision_files_are_used_unless_fp32_is_wanted(here, shelf):
    folder = copy(shelf / "SD1", here / "both")
    half = folder / UNET.replace(".safetensors", ".fp16.safetensors")
    copy_of = {name: tensor.half() for name, tensor in load_file(folder / UNET).items()}
    copy_of["conv_in.bias"] += 1  # so that the two can be told apart
    save_file(copy_of, half)
    full, from_half = load(settings(folder)), load(settings(folder, precision="bf16"))
    assert (full.weights_path.name, from_half.weights_path.name) == (Path(UNET).name, half.name)
    moved = from_half.pipeline.unet.conv_in.bias.float() - full.pipeline.unet.conv_in.bias
    assert torch.allclose(moved, torch.ones_like(moved), atol=0.01)
    (folder / UNET).unlink()
    assert load(settings(folder)).weights_path == half  # fp32 from what there is


@pytest.mark.parametrize(("file", "name"), [(UNET, "conv_in.bias"), ("text_encoder/model.safetensors", "")])
def test_a_tensor_that_is_missing_is_never_left_random(here, shelf, file, name):
    folder = copy(shelf / "SD1", here / "torn")
    edit(folder / file, lambda tensors: tensors.pop(name or next(iter(tensors))))
    assert "1 tensors are missing" in refusal(ExitCode.REFUSED, load, settings(folder))


def test_a_cut_or_foreign_tensor_is_refused(here, shelf):
    folder = copy(shelf / "SD1", here / "cut")
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-100])
    assert "truncated" in refusal(ExitCode.REFUSED, load, settings(folder))
    folder = copy(shelf / "SD1", here / "shape")
    edit(folder / UNET, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(7)}))
    assert "conv_in.bias" in refusal(ExitCode.REFUSED, load, settings(folder))


def test_the_safety_checker_is_loaded_unless_it_is_switched_off(here, shelf):
    folder = copy(shelf / "SD1", here / "checked")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = CLIPTextConfig(**small).to_dict(), CLIPVisionConfig(**small, image_size=32, patch_size=16).to_dict()
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = load(settings(folder)).pipeline
    assert isinstance(pipeline.safety_checker, StableDiffusionSafetyChecker)
    assert torch.equal(pipeline.safety_checker.visual_projection.weight, checker.visual_projection.weight)
    assert pipeline.feature_extractor is not None
    config = settings(folder)
    config.optimization.disable_safety_checker = True
    (folder / "safety_checker" / "model.safetensors").unlink()
    assert load(config).pipeline.safety_checker is None


# -- single files


@pytest.mark.parametrize("family", KINDS)
def test_a_single_file_draws_what_its_pipeline_drew(here, shelf, family):
    model = load(settings(shelf / f"{family}.safetensors", architecture=str(shelf / f"{family}-configs")))
    assert same(picture(model.pipeline), picture(KINDS[family]()))
    assert (model.family, model.name, model.weights_path) == (family, family, shelf / f"{family}.safetensors")


def test_a_single_file_is_loaded_in_the_wanted_precision(here, shelf):
    model = load(settings(shelf / "SDXL.safetensors", architecture=str(shelf / "SDXL-configs"), precision="bf16"))
    for part in (model.pipeline.unet, model.pipeline.vae, model.pipeline.text_encoder, model.pipeline.text_encoder_2):
        assert {tensor.dtype for tensor in part.parameters()} == {torch.bfloat16}


MODEL = "model.diffusion_model."


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("SD1", lambda tensors: tensors.pop(f"{MODEL}middle_block.0.in_layers.0.weight")),
        ("SD1", lambda tensors: tensors.pop(f"{MODEL}out.2.bias")),
        ("SD1", lambda tensors: tensors.pop("first_stage_model.decoder.conv_in.weight")),
        ("SD1", lambda tensors: tensors.pop("cond_stage_model.transformer.text_model.final_layer_norm.weight")),
        ("SD1", lambda tensors: tensors.update({f"{MODEL}out.2.bias": torch.zeros(7)})),
        ("SD1", lambda tensors: tensors.update({f"{MODEL}input_blocks.9.0.in_layers.0.weight": torch.zeros(7)})),
        ("SD2", lambda tensors: tensors.pop("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight")),
        ("SDXL", lambda tensors: tensors.pop(f"{MODEL}label_emb.0.0.weight")),
        ("SDXL", lambda tensors: tensors.pop("conditioner.embedders.1.model.text_projection")),
    ],
)
def test_a_single_file_that_does_not_fit_is_refused_in_one_line(here, shelf, family, change):
    tensors = load_file(shelf / f"{family}.safetensors")
    change(tensors)
    save_file(tensors, here / "bad.safetensors")
    config = settings("bad.safetensors", architecture=str(shelf / f"{family}-configs"))
    assert "--architecture" in refusal(ExitCode.REFUSED, load, config)


def test_the_wrong_or_no_architecture(here, shelf):
    message = refusal(ExitCode.NOT_FOUND, load, settings(shelf / "SD1.safetensors", architecture="sd99"))
    assert "sd15" in message
    message = refusal(ExitCode.REFUSED, load, settings(shelf / "SD1.safetensors", architecture=str(shelf / "SD2-configs")))
    assert "--architecture" in message


@pytest.fixture
def bundled(here, shelf, monkeypatch) -> Path:
    """The tiny configurations in the place of the full-size ones."""
    for name, family, prediction in (
        ("sd15", "SD1", "epsilon"),
        ("sd21", "SD2", "v_prediction"),
        ("sd21-base", "SD2", "epsilon"),
    ):
        folder = copy(shelf / f"{family}-configs", here / "architectures" / name)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": prediction}))
    monkeypatch.setattr(model_files, "ARCHITECTURES", here / "architectures")
    return here / "architectures"


@pytest.mark.parametrize(
    ("family", "metadata", "extra", "named", "expected"),
    [
        ("SD1", {}, {}, None, "epsilon"),
        ("SD1", {}, {"v_pred": torch.zeros(0)}, None, "v_prediction"),
        ("SD1", {}, {"v_pred": torch.zeros(0)}, "sd15", "epsilon"),  # what is named is taken as it is
        ("SD2", {}, {}, None, "v_prediction"),
        ("SD2", {}, {}, "sd21-base", "epsilon"),
        ("SD2", {"modelspec.prediction_type": "epsilon"}, {}, None, "epsilon"),
        ("SD2", {"ss_v_parameterization": "True"}, {}, None, "v_prediction"),
    ],
)
def test_the_prediction_type_of_a_single_file(bundled, shelf, family, metadata, extra, named, expected):
    save_file(load_file(shelf / f"{family}.safetensors") | extra, "model.safetensors", metadata)
    model = load(settings("model.safetensors", architecture=named))
    assert model.scheduler_config["prediction_type"] == model.pipeline.scheduler.config.prediction_type == expected


def test_a_single_file_without_tokenizer_takes_that_of_its_family(bundled, shelf):
    shutil.rmtree(bundled / "sd15" / "tokenizer")
    config = settings(shelf / "SD1.safetensors")
    assert REFERENCE_REPOSITORIES["SD1"] in refusal(ExitCode.NOT_FOUND, load, config)
    storage = Path("cache") / f"models--{REFERENCE_REPOSITORIES['SD1'].replace('/', '--')}"
    copy(shelf / "SD1" / "tokenizer", storage / "snapshots" / ("a" * 40) / "tokenizer")
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text("a" * 40)
    assert same(picture(load(config).pipeline), picture(tiny.sd1()))


# -- another VAE


def test_another_vae_from_a_folder_or_a_file(here, shelf):
    reference = tiny.sd1()
    reference.vae = tiny.vae(seed=5)
    expected = picture(reference)
    reference.vae.save_pretrained("vae-folder")
    save_file(reference.vae.state_dict(), "new-names.safetensors")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = reference.vae.state_dict()
    for new, old in old_names.items():
        renamed = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in renamed.items()}
    save_file(renamed, "old-names.safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in original_layout.vae_tensors(reference.vae).items()}
    save_file(tensors, "original.safetensors")
    save_file({f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}, "prefixed.safetensors")
    for vae in ("vae-folder", "new-names.safetensors", "old-names.safetensors", "original.safetensors", "prefixed.safetensors"):
        model = load(settings(shelf / "SD1", vae=vae))
        assert same(picture(model.pipeline), expected), vae
        assert model.vae_name == Path(vae).stem
    single = settings(shelf / "SD1.safetensors", architecture=str(shelf / "SD1-configs"), vae="original.safetensors")
    assert same(picture(load(single).pipeline), expected)
    edit(here / "original.safetensors", lambda tensors: tensors.pop("decoder.conv_out.bias"))
    assert "decoder.conv_out.bias" in refusal(ExitCode.REFUSED, load, settings(shelf / "SD1", vae="original.safetensors"))


@pytest.mark.parametrize("source", ["SD1", "SD1.safetensors"])
def test_the_vae_alone_may_be_exact(here, shelf, source):
    """What a training encodes with on a card: not rounded to the precision of the rest on its way."""
    config = settings(
        shelf / source, precision="bf16", **({"architecture": str(shelf / "SD1-configs")} if "." in source else {})
    )
    model = load(config, vae_dtype=torch.float32)
    exact = tiny.sd1().vae.state_dict()
    loaded = model.pipeline.vae.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in exact.items())
    assert {item.dtype for item in model.pipeline.unet.parameters()} == {torch.bfloat16}
    other = settings(
        shelf / source,
        precision="bf16",
        vae=str(shelf / "SD1"),
        **({"architecture": str(shelf / "SD1-configs")} if "." in source else {}),
    )
    assert torch.equal(
        load(other, vae_dtype=torch.float32).pipeline.vae.state_dict()["decoder.conv_in.weight"],
        exact["decoder.conv_in.weight"],
    )


def test_a_vae_of_another_family_is_refused(here, shelf):
    vae = tiny.vae()
    vae.register_to_config(scaling_factor=0.13025)  # SDXL's
    vae.save_pretrained("sdxl-vae")
    assert "0.13025" in refusal(ExitCode.REFUSED, load, settings(shelf / "SD1", vae="sdxl-vae"))


# -- device and precision


def test_devices_that_are_not_there(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:x", "cuda:-1", "cpu:1", "cuda:", ""):
        assert "not known" in refusal(ExitCode.USAGE, pick_device, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps"):
        assert "--device cpu" in refusal(ExitCode.USAGE, pick_device, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", None)  # which kernels there are is asked elsewhere
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for name in ("auto", "cuda", "cuda:1"):
        torch.cuda.set_device(pick_device(name))  # torch's own, which refuses a card without its number
    assert chosen == [1, 1, 1]
    assert "cuda:0 to cuda:1" in refusal(ExitCode.USAGE, pick_device, "cuda:2")


@pytest.mark.parametrize(
    ("precision", "device", "abilities", "expected"),
    [
        ("auto", "cuda", {}, torch.float16),
        ("auto", "mps", {}, torch.float16),
        ("auto", "cpu", {"amx_bf16": True}, torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("auto", "cpu", {"avx512_f": True}, torch.float32),
        ("bf16", "cpu", {}, torch.bfloat16),
        ("fp32", "cuda", {}, torch.float32),
        ("fp16", "cuda", {}, torch.float16),
    ],
)
def test_precision_is_what_the_device_computes_in(monkeypatch, precision, device, abilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert pick_dtype(precision, torch.device(device)) == expected


def test_precisions_that_make_no_sense():
    assert "bf16 or fp32" in refusal(ExitCode.USAGE, pick_dtype, "fp16", torch.device("cpu"))
    assert "choose auto" in refusal(ExitCode.USAGE, pick_dtype, "int8", torch.device("cpu"))


# -- the hub, and the terminal


def test_from_the_hub_to_a_picture_and_then_offline(here, shelf, monkeypatch, capfd):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    files = {
        path.relative_to(shelf / "SD1").as_posix(): path.read_bytes() for path in (shelf / "SD1").rglob("*") if path.is_file()
    }
    with serve({"owner/fox": files}) as hub, monkeypatch.context() as online:
        online.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        online.setenv("HF_ENDPOINT", hub.endpoint)
        first = load(settings("owner/fox", offline=False))
    second = load(settings("owner/fox"))
    for model in (first, second):
        assert isinstance(model, LoadedModel)
        assert model.name == "owner/fox"
        assert same(picture(model.pipeline), picture(tiny.sd1()))
    assert capfd.readouterr() == ("", "")


def test_loading_says_nothing_unless_the_user_wants_it(shelf):
    """In a process of its own: libraries talk while they are imported, and pytest has its own filter for warnings."""
    program = f"""
import sys
from src import base_models
from src.config import AppConfig
config = AppConfig()
config.model.model_id, config.model.device = {str(shelf / "SDXL")!r}, "cpu"
base_models.load(config)
config.model.model_id, config.model.architecture = {str(shelf / "SD1.safetensors")!r}, {str(shelf / "SD1-configs")!r}
base_models.load(config)
"""
    ours = ("TRANSFORMERS_", "DIFFUSERS_", "HF_HUB_DISABLE", "HF_HUB_VERBOSITY", "TOKENIZERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    run = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_FOLDER, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
