"""Every form that is written, read by this program, by plain diffusers and by peft: all must draw as the weights merged by hand."""

import copy
import functools
import hashlib
import json
import math
import re

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from src.errors import ExitCode, UserError
from src.lora.formats import LoraLayer
from src.lora.names import canonical, kohya_name
from src.lora.reading import parse_adapter, read_adapter
from src.lora.stack import AdapterStack
from src.lora.writing import FORMATS, PEFT_FOLDERS, AdapterFacts, adapter_files, diffusers_file, kohya_file
from tests.tiny import adapters
from tests.tiny.adapters import (
    ATTENTION,
    EVERYTHING,
    assert_same,
    components,
    fresh,
    merged,
    outputs,
    random_layers,
    source,
)

UNET = ("unet",)
FILES = {"diffusers": "pytorch_lora_weights.safetensors", "peft": "", "kohya": "sks_dog.safetensors"}
CASES = {
    "SD1": ("SD1", {"targets": ATTENTION}),
    "SD1, everything": ("SD1", {"targets": EVERYTHING, "alpha": 6.0}),
    "SD1, rank-stabilised": ("SD1", {"alpha": 6.0, "stabilised": True}),
    "SD1, ranks and alphas of all sorts": ("SD1", {"targets": EVERYTHING, "alpha": 6.0, "mixed": True}),
    "SD1, one text encoder layer": ("SD1", {"targets": r"encoder\.layers\.1\.mlp\.fc1", "alpha": 1.0}),
    "SD2": ("SD2", {"alpha": 1.0}),
    "SDXL": ("SDXL", {"alpha": 7.3}),
    "SDXL, everything": ("SDXL", {"targets": EVERYTHING, "alpha": 6.0}),
    "DoRA SD1, everything": ("SD1", {"targets": EVERYTHING, "alpha": 6.0, "dora": 0}),
    "DoRA SDXL, rank-stabilised": ("SDXL", {"alpha": 6.0, "dora": 0, "stabilised": True}),
}  # fmt: skip


def facts(family, **more):
    return AdapterFacts(family, "sks dog", **more)


@functools.cache
def made(case):
    """The layers of a case as the tests' own, as the program's, and what the model with them puts out."""
    family, choice = CASES[case]
    choice = dict(choice)
    stabilised, mixed = choice.pop("stabilised", False), choice.pop("mixed", False)
    layers = random_layers(source(family), **{"rank": 4, "alpha": 4.0, **choice})
    for layer in layers[::5] if mixed else ():
        layer.down, layer.up, layer.alpha = layer.down[:3].clone(), layer.up[:, :3].clone(), 2.0
    scale = layers[0].alpha / 2 if stabilised else None  # 2 is the root of 4
    return layers, ours(layers, stabilised), outputs(merged(source(family), (layers, 1.0), scale=scale))


def ours(layers, stabilised=False):
    found = {}
    for layer in layers:
        rank = layer.down.shape[0]
        magnitude = layer.magnitude
        if magnitude is not None and magnitude.shape[0] > 1:
            magnitude = magnitude.flatten()
        scale = layer.alpha / (math.sqrt(rank) if stabilised else rank)
        found[layer.component, layer.module] = LoraLayer(layer.down, layer.up, layer.alpha, scale, magnitude)
    return found


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    return folder


def drawn_by_us(path, family):
    pipe = fresh(family)
    [report] = AdapterStack(pipe, family).set([(read_adapter(path), 1.0)])
    assert report.matched == report.total
    return outputs(components(pipe))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_each_form_draws_as_the_merged_weights(case, form, tmp_path):
    family = CASES[case][0]
    _, layers, expected = made(case)
    put(tmp_path, adapter_files(layers, facts(family), [form]))
    adapter = read_adapter(tmp_path / FILES[form])
    assert (adapter.format, len(adapter.layers)) == (form, len(layers))
    assert_same(drawn_by_us(tmp_path / FILES[form], family), expected, family)


@pytest.mark.parametrize("case", CASES)
def test_plain_diffusers_draws_the_same(case, tmp_path):
    family = CASES[case][0]
    _, layers, expected = made(case)
    put(tmp_path, adapter_files(layers, facts(family), ["diffusers", "kohya"]))
    for form in ["diffusers"] if "DoRA" in case else ["diffusers", "kohya"]:  # it drops the lengths of kohya's form
        reference = copy.deepcopy(source(family))
        reference.load_lora_weights(tmp_path, weight_name=FILES[form], local_files_only=True)
        assert_same(outputs(components(reference)), expected, family)


@pytest.mark.parametrize("case", CASES)
def test_peft_draws_the_same(case, tmp_path):
    family = CASES[case][0]
    _, layers, expected = made(case)
    put(tmp_path, adapter_files(layers, facts(family), ["peft"]))
    parts = copy.deepcopy(components(source(family)))
    for component in parts:
        if (tmp_path / PEFT_FOLDERS[component]).is_dir():
            parts[component] = PeftModel.from_pretrained(parts[component], tmp_path / PEFT_FOLDERS[component]).base_model.model
    assert_same(outputs(parts), expected, family)


def test_a_name_that_is_no_text_is_written_all_the_same():
    """That of a folder in Latin-1, as Python gives it."""
    _, layers, _ = made("SD1, one text encoder layer")
    files = adapter_files(layers, AdapterFacts("SD1", "caf\udce9", extra={"ss_dataset_dirs": '{"caf\udce9": 1}'}), FORMATS)
    assert set(parse_adapter(files)) == set(FORMATS)
    head = files[FILES["diffusers"]]
    header = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")].decode("utf-8"))["__metadata__"]
    assert (header["modelspec.title"], header["ss_dataset_dirs"]) == ("caf?", '{"caf?": 1}')


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("case", ["SDXL, everything", "DoRA SD1, everything"])
def test_from_every_form_to_every_form(case, first, tmp_path):
    family = CASES[case][0]
    _, layers, expected = made(case)
    put(tmp_path / first, adapter_files(layers, facts(family), [first]))
    again = adapter_files(read_adapter(tmp_path / first / FILES[first]).layers, facts(family), FORMATS)
    put(tmp_path / "again", {name if name in FILES.values() else f"peft/{name}": data for name, data in again.items()})
    for form in FORMATS:
        read = read_adapter(tmp_path / "again" / FILES[form] if FILES[form] else tmp_path / "again" / "peft")
        pipe = fresh(family)
        AdapterStack(pipe, family).set([(read, 1.0)])
        assert_same(outputs(components(pipe)), expected, family)


def test_bytes_are_read_back_as_they_were():
    _, layers, _ = made("DoRA SDXL, rank-stabilised")
    forms = parse_adapter(adapter_files(layers, facts("SDXL"), FORMATS))
    assert set(forms) == set(FORMATS)
    for form, found in forms.items():
        named = {(component, canonical(component, module)): layer for (component, module), layer in found.items()}
        assert set(named) == set(layers)
        for where, layer in layers.items():
            assert torch.equal(named[where].down, layer.down)
            assert torch.equal(named[where].up, layer.up * 3.0 if form == "diffusers" else layer.up)
            assert torch.equal(named[where].magnitude, layer.magnitude)
            assert named[where].scale == (1.0 if form == "diffusers" else 3.0)
            assert named[where].alpha == {"diffusers": 4.0, "peft": 6.0, "kohya": 12.0}[form]


def test_equal_adapters_are_equal_files():
    """In whatever order the layers come, also where two ranks are equally common."""
    layers = {
        ("unet", module): LoraLayer(torch.ones(rank, 3), torch.ones(5, rank), 3.0, 3.0 / rank)
        for module, rank in {"conv_in": 1, "conv_out": 2, "time_embedding.linear_1": 1, "time_embedding.linear_2": 2}.items()
    }
    backwards = dict(reversed(list(layers.items())))
    assert adapter_files(layers, facts("SDXL"), FORMATS) == adapter_files(backwards, facts("SDXL"), FORMATS)


# --- kohya ---


@pytest.mark.parametrize("case", ["SD1, everything", "SD2", "SDXL, everything"])
def test_kohya_merges_by_hand_to_equal_weights(case, tmp_path):
    """Names written by hand, alpha out of its tensor: W + alpha / r * up @ down."""
    family = CASES[case][0]
    mine, layers, _ = made(case)
    put(tmp_path, adapter_files(layers, facts(family), ["kohya"]))
    tensors = load_file(tmp_path / FILES["kohya"])
    expected = merged(source(family), (mine, 1.0))
    for layer in mine:
        name = adapters.kohya_name(layer, two_encoders=family == "SDXL", sgm=family == "SDXL")
        down, up, alpha = (tensors.pop(f"{name}{end}") for end in (".lora_down.weight", ".lora_up.weight", ".alpha"))
        base = adapters.in_model(components(source(family))[layer.component], layer.module).weight.double()
        change = (up.double().flatten(1) @ down.double().flatten(1)).reshape(base.shape)
        weight = adapters.in_model(expected[layer.component], layer.module).weight
        torch.testing.assert_close((base + alpha.item() / down.shape[0] * change).float(), weight, atol=1e-6, rtol=1e-6)
    assert not tensors


def full_size(**config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **config)
    return unet, [name for name, part in unet.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))]


SDXL_CONFIG = dict(
    block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def test_kohya_names_of_the_full_size_sdxl_are_those_that_diffusers_reads():
    unet, names = full_size(**SDXL_CONFIG)
    flat = {name: kohya_name("unet", name, "SDXL") for name in names}
    assert len(set(flat.values())) == len(names) == 794
    for name, key in flat.items():
        assert canonical("unet", key.removeprefix("lora_unet_")) == name
        [mapped] = _maybe_map_sgm_blocks_to_diffusers({f"{key}.lora_down.weight": None}, unet.config)
        theirs = _convert_unet_lora_key(mapped).replace(".processor", "").replace("_lora.down", ".lora.down")
        assert re.sub(r"\.lora\.down\.weight$", "", theirs.replace("to_out.lora", "to_out.0.lora")) == name
    # Published names of SDXL LoRAs.
    assert flat["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"] == (
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k"
    )
    assert flat["up_blocks.1.upsamplers.0.conv"] == "lora_unet_output_blocks_5_2_conv"


def test_every_name_of_sd1_comes_back_from_its_flat_form():
    _, names = full_size(cross_attention_dim=768, attention_head_dim=8)
    assert len(names) == 282
    for name in names:
        assert kohya_name("unet", name, "SD1") == "lora_unet_" + name.replace(".", "_")
        assert canonical("unet", name.replace(".", "_")) == name
    for name, part in components(source("SDXL"))["text_encoder_2"].named_modules():
        if isinstance(part, torch.nn.Linear):
            assert canonical("text_encoder_2", name.replace(".", "_")) == name
    assert canonical("text_encoder", "encoder.layers.0.mlp.fc1") == "text_model.encoder.layers.0.mlp.fc1"
    # Original names with fewer layers than the block could have: an upsampler counts differently without attention.
    assert canonical("unet", "output_blocks_2_1_conv") == "up_blocks.0.upsamplers.0.conv"


# --- diffusers ---


def test_the_names_are_those_that_comfyui_looks_for(tmp_path):
    """ComfyUI (comfy/lora.py): ``unet.`` + name with ``.to_`` -> ``.processor.to_``, a last ``.0`` of to_out left out; scale 1."""
    mine, layers, _ = made("SDXL, everything")
    put(tmp_path, {"x.safetensors": diffusers_file(layers, facts("SDXL"))})
    tensors = load_file(tmp_path / "x.safetensors")
    ends = {"_lora.": 0, ".lora.": 0, ".lora_linear_layer.": 0}
    for layer in mine:
        stem = f"{layer.component}.{layer.module}"
        if layer.component == "unet":
            stem = stem.replace(".to_", ".processor.to_")
            stem = stem[:-2] if stem.endswith(".to_out.0") else stem
        [end] = [end for end in ends if f"{stem}{end}up.weight" in tensors]
        ends[end] += 1
        down, up = tensors.pop(f"{stem}{end}down.weight"), tensors.pop(f"{stem}{end}up.weight")
        change = (up.double().flatten(1) @ down.double().flatten(1)).reshape(layer.difference().shape)
        torch.testing.assert_close(change, layer.difference(), atol=1e-6, rtol=1e-6)
    assert not tensors
    assert all(ends.values())


def test_alpha_stands_in_the_header_as_the_rank():
    _, layers, _ = made("SD1, ranks and alphas of all sorts")
    settings = json.loads(header(diffusers_file(layers, facts("SD1")))["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["unet.use_rslora"]) == (4, 4, False)
    assert set(settings["unet.rank_pattern"].values()) == {3}
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"]
    assert "encoder.layers.0.mlp.fc1" in settings["text_encoder.target_modules"]


# --- headers ---


def header(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_headers_say_what_other_programs_look_for():
    _, layers, _ = made("SDXL, everything")
    data = kohya_file(
        layers, facts("SDXL", trigger="sks dög", resolution_px=768, base_model="sdxl", base_sha256="ab" * 32, steps=20,
                      extra={"ss_learning_rate": "0.0001"}),
    )  # fmt: skip
    said = header(data)
    assert {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora", "ss_network_dim": "4",
        "ss_network_alpha": "6", "ss_resolution": "(768, 768)", "ss_sd_model_name": "sdxl", "ss_new_sd_model_hash": "ab" * 32,
        "ss_output_name": "sks dog", "ss_v2": "False", "ss_steps": "20", "ss_learning_rate": "0.0001",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models", "modelspec.title": "sks dog",
        "modelspec.resolution": "768x768", "modelspec.trigger_phrase": "sks dög", "modelspec.prediction_type": "epsilon",
    }.items() <= said.items()  # fmt: skip
    assert json.loads(said["ss_tag_frequency"]) == {"sks dog": {"sks dög": 1}}
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "6"}
    assert "modelspec.date" not in said


@pytest.mark.parametrize(
    ("family", "prediction", "version", "architecture"),
    [
        ("SD1", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("SD1", "v_prediction", "sd_v1_v", "stable-diffusion-v1/lora"),
        ("SD2", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("SD2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("SDXL", "v_prediction", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_family_in_the_header(family, prediction, version, architecture):
    _, layers, _ = made("SD1")
    for data in (
        kohya_file(layers, facts(family, prediction_type=prediction)),
        diffusers_file(layers, facts(family, prediction_type=prediction)),
    ):
        said = header(data)
        assert (said["ss_base_model_version"], said["modelspec.architecture"]) == (version, architecture)
        assert said["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")


def test_hashes_are_computed_as_kohya_does(tmp_path):
    """sd-scripts, library/train_util.py: of a file that has the ss_ keys alone; sha256 behind the header, 64 KiB at 1 MiB."""
    layers = {("unet", "conv_in"): LoraLayer(torch.randn(200, 1000), torch.randn(800, 200), 200.0, 1.0)}
    (tmp_path / "x.safetensors").write_bytes(kohya_file(layers, facts("SD1", trigger="x")))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    theirs = safetensors.torch.save(tensors, {key: value for key, value in said.items() if key.startswith("ss_")})
    assert len(theirs) > 0x110000
    start = int.from_bytes(theirs[:8], "little") + 8
    assert said["sshs_model_hash"] == hashlib.sha256(theirs[start:]).hexdigest()
    assert said["sshs_legacy_hash"] == hashlib.sha256(theirs[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]


def test_a_dora_is_lycoris_s_in_kohya_s_header():
    _, layers, _ = made("DoRA SD1, everything")
    said = header(kohya_file(layers, facts("SD1")))
    assert said["ss_network_module"] == "lycoris.kohya"
    assert {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}.items() <= json.loads(said["ss_network_args"]).items()


# --- precision and refusals ---


def test_precision():
    _, layers, _ = made("SD1")
    for name, data in adapter_files(layers, facts("SD1"), FORMATS, torch.float16).items():
        if name.endswith(".safetensors"):
            tensors = safetensors.torch.load(data)
            assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {torch.float16}


def changed(**parts):
    _, layers, _ = made("SD1")
    where, layer = next(iter(layers.items()))
    fields = {"down": layer.down, "up": layer.up, "alpha": layer.alpha, "scale": layer.scale, "magnitude": None} | parts
    return {**layers, where: LoraLayer(**fields)}


REFUSED = {
    "NaN": (lambda: changed(up=torch.full((32, 4), float("nan"))), FORMATS, "holds NaN", ExitCode.FAILURE),
    "more than fp16": (lambda: changed(up=torch.full((32, 4), 1e6)), FORMATS, "more than float16 can hold", ExitCode.FAILURE),
    "nothing": (dict, FORMATS, "has no layers", ExitCode.REFUSED),
    "half a DoRA": (lambda: changed(magnitude=torch.ones(32)), ["diffusers"], "some are not", ExitCode.REFUSED),
    "a DoRA by columns": (lambda: changed(magnitude=torch.ones(1, 32)), ["peft"], "only kohya's form can hold", ExitCode.REFUSED),
    "another model's": (
        lambda: {("transformer", "attn.to_q"): next(iter(changed().values()))}, ["peft"], "which no SD model has", ExitCode.REFUSED,
    ),
    "an encoder that SD1 lacks": (
        lambda: {("text_encoder_2", "text_projection"): next(iter(changed().values()))}, ["kohya"], "which no SD1 model", ExitCode.REFUSED,
    ),
    "a name of nothing": (
        lambda: {("unet", "double_blocks_0_img_mlp"): next(iter(changed().values()))}, ["kohya"], "no layer of an SD1", ExitCode.REFUSED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_in_one_line(case):
    layers, forms, says, code = REFUSED[case]
    for form in forms:
        with pytest.raises(UserError, match=says) as caught:
            adapter_files(layers(), facts("SD1"), [form], torch.float16)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code is code


def test_file_names_are_safe():
    _, layers, _ = made("SD1")
    for name, file in {"../../a b": "a_b", "": "lora", "CON:\\": "CON_lora", "ünï": "ünï"}.items():
        assert set(adapter_files(layers, AdapterFacts("SD1", name), ["kohya"])) == {f"{file}.safetensors"}
