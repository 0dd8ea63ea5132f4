"""Every adapter format against weights merged by hand, and against peft and diffusers where those can read the file."""

import copy
import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from src.errors import UserError
from src.lora.formats import original_unet_names
from src.lora.reading import read_adapter
from src.lora.stack import AdapterStack
from tests.tiny import adapters
from tests.tiny.adapters import (
    ATTENTION,
    EVERYTHING,
    FAMILIES,
    LINEAR,
    assert_identical,
    assert_same,
    base_outputs,
    components,
    fresh,
    merged,
    outputs,
    random_layers,
    source,
)


def three_folders(folder, pipe, layers):
    adapters.write_peft(folder / "unet_lora", pipe, layers, "unet")
    adapters.write_peft(folder / "text_encoder_one_lora", pipe, layers, "text_encoder")
    adapters.write_peft(folder / "text_encoder_two_lora", pipe, layers, "text_encoder_2")
    return folder


def diffusers(style="new"):
    return "diffusers", lambda to, pipe, layers: adapters.write_diffusers(to / "x", layers, style)


def peft(component):
    return "peft", lambda to, pipe, layers: adapters.write_peft(to / "x", pipe, layers, component)


def kohya(sgm=False):
    return "kohya", lambda to, pipe, layers: adapters.write_kohya(to / "x.safetensors", layers, sgm)


UNET = ("unet",)
# name: (family, what is adapted, (format, how it is written))
FORMATS = {
    "diffusers": ("SD1", {}, diffusers()),
    "diffusers SDXL": ("SDXL", {}, diffusers()),
    "diffusers lora_A": ("SDXL", {}, diffusers("lora_A")),
    "diffusers lora_A conv": ("SD1", {"targets": EVERYTHING}, diffusers("lora_A")),
    "diffusers of 2023": ("SD1", {"targets": ATTENTION}, diffusers("old")),
    "peft unet": ("SD1", {"only": UNET}, peft("unet")),
    "peft unet conv": ("SD1", {"only": UNET, "targets": EVERYTHING}, peft("unet")),
    "peft text encoder": ("SD1", {"only": ("text_encoder",)}, peft("text_encoder")),
    "peft second text encoder": ("SDXL", {"only": ("text_encoder_2",), "targets": EVERYTHING}, peft("text_encoder_2")),
    "peft, three folders": ("SDXL", {}, ("peft", lambda to, pipe, layers: three_folders(to / "x", pipe, layers))),
    "kohya SD1": ("SD1", {}, kohya()),
    "kohya SD2": ("SD2", {}, kohya()),
    "kohya SDXL": ("SDXL", {}, kohya(sgm=True)),
    "kohya SDXL, diffusers names": ("SDXL", {}, kohya()),
    "LoCon SD1": ("SD1", {"targets": EVERYTHING}, kohya()),
    "LoCon SDXL": ("SDXL", {"targets": EVERYTHING}, kohya(sgm=True)),
    "LoCon with mid": ("SD1", {"targets": EVERYTHING, "mid": True}, kohya()),
    "DoRA diffusers": ("SDXL", {"dora": 0}, diffusers()),
    "DoRA diffusers conv": ("SD1", {"dora": 0, "targets": EVERYTHING, "only": UNET}, diffusers("lora_A")),
    "DoRA peft conv": ("SD1", {"dora": 0, "targets": EVERYTHING, "only": UNET}, peft("unet")),
    "DoRA peft text encoder": ("SDXL", {"dora": 0, "only": ("text_encoder_2",)}, peft("text_encoder_2")),
    "DoRA kohya": ("SDXL", {"dora": 0, "targets": EVERYTHING, "only": UNET}, kohya(sgm=True)),
    "DoRA kohya by columns": ("SD1", {"dora": 1, "targets": EVERYTHING}, kohya()),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_equals_the_weights_merged_by_hand(case, tmp_path):
    family, choice, (dialect, write) = FORMATS[case]
    layers = random_layers(source(family), rank=4, alpha=6.0, **choice)
    path = write(tmp_path, source(family), layers)
    pipe = fresh(family)
    stack = AdapterStack(pipe, family)
    adapter = read_adapter(path)
    [report] = stack.set([(adapter, 0.8)])
    assert_same(outputs(components(pipe)), outputs(merged(source(family), (layers, 0.8))), family)
    assert (adapter.name, adapter.format, report.family) == ("x", dialect, family)
    assert (report.matched, report.total, report.unmatched) == (len(layers), len(layers), ())
    assert (report.ranks, report.alphas) == ((4,), (6.0,))
    stack.clear()
    assert_identical(outputs(components(pipe)), base_outputs(family))


@pytest.mark.parametrize(
    ("targets", "rank_stabilised", "dora"), [(LINEAR, True, None), (EVERYTHING, False, None), (EVERYTHING, True, 0)]
)
def test_peft_reads_the_same_folder_the_same_way(targets, rank_stabilised, dora, tmp_path):
    layers = random_layers(source("SD1"), rank=6, alpha=3.0, targets=targets, only=UNET, dora=dora)
    special = layers[5].module
    layers[5].down, layers[5].up = layers[5].down[:2].clone(), layers[5].up[:, :2].clone()
    adapters.write_peft(
        tmp_path / "x", source("SD1"), layers, use_rslora=rank_stabilised,
        rank_pattern={special: 2}, alpha_pattern={special: 5, "attn2.to_q": 1.5},
    )  # fmt: skip
    pipe, reference = fresh(), fresh()
    reference.unet = PeftModel.from_pretrained(reference.unet, tmp_path / "x")
    AdapterStack(pipe, "SD1").set([(read_adapter(tmp_path / "x"), 1.0)])
    assert_same(outputs(components(pipe)), outputs({**components(reference), "unet": reference.unet.base_model.model}), "SD1")


# diffusers leaves out a mid, and a DoRA's lengths in kohya's dialect.
UNREAD = ("LoCon with mid", "DoRA kohya", "DoRA kohya by columns")
DIFFUSERS_READS = [name for name in FORMATS if FORMATS[name][2][0] != "peft" and name not in UNREAD]


@pytest.mark.parametrize("case", DIFFUSERS_READS)
def test_diffusers_reads_the_same_file_the_same_way(case, tmp_path):
    family, choice, (_, write) = FORMATS[case]
    layers = random_layers(source(family), alpha=2.0, **choice)
    path = write(tmp_path, source(family), layers)
    pipe, reference = fresh(family), copy.deepcopy(source(family))
    folder, name = (path, "pytorch_lora_weights.safetensors") if path.is_dir() else (path.parent, path.name)
    reference.load_lora_weights(folder, weight_name=name, local_files_only=True)
    AdapterStack(pipe, family).set([(read_adapter(path), 1.0)])
    assert_same(outputs(components(pipe)), outputs(components(reference)), family)


def test_without_an_alpha_the_scale_is_one(tmp_path):
    layers = random_layers(source("SD1"), rank=3, alpha=7.0)
    adapters.write_diffusers(tmp_path / "x", layers, settings={})
    pipe = fresh()
    AdapterStack(pipe, "SD1").set([(read_adapter(tmp_path / "x"), 1.0)])
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0), scale=1.0)), "SD1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_file_precisions_are_read_exactly(dtype, tmp_path):
    layers = random_layers(source("SD1"))
    path = adapters.write_kohya(tmp_path / "x.safetensors", layers, dtype=dtype)
    for layer in layers:
        layer.down, layer.up = layer.down.to(dtype).float(), layer.up.to(dtype).float()
    pipe = fresh()
    AdapterStack(pipe, "SD1").set([(read_adapter(path), 1.0)])
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")


def test_prefixes_of_early_unets_and_of_comfyui(tmp_path):
    layers = random_layers(source("SDXL"), only=UNET, targets=ATTENTION)
    file = adapters.write_diffusers(tmp_path / "x", layers, settings={"lora_alpha": 8.0}) / "pytorch_lora_weights.safetensors"
    bare = {name.removeprefix("unet."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, tmp_path / "bare.safetensors", metadata={"lora_adapter_metadata": json.dumps({"lora_alpha": 8.0})})
    comfy = {}
    for layer in layers:
        block = next(block for block in adapters.SGM_BLOCKS if layer.module.startswith(block + "."))
        name = "diffusion_model." + adapters.SGM_BLOCKS[block] + layer.module.removeprefix(block)
        comfy |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        comfy[f"{name}.alpha"] = torch.tensor(8)
    save_file(comfy, tmp_path / "comfy.safetensors")
    expected = outputs(merged(source("SDXL"), (layers, 1.0)))
    for name in ("bare", "comfy"):
        pipe = fresh("SDXL")
        AdapterStack(pipe, "SDXL").set([(read_adapter(tmp_path / f"{name}.safetensors"), 1.0)])
        assert_same(outputs(components(pipe)), expected, "SDXL")


def test_original_names_of_the_full_size_unets_agree_with_diffusers():
    """diffusers turns kohya's flat original names into its own; ours, made the other way round, must come back."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    names = [name for name, part in unet.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))]
    original = original_unet_names(names)
    assert set(original) == set(names)
    assert len(set(original.values())) == len(names) == 794
    # Published names of SDXL LoRAs.
    assert original["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"] == (
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k"
    )
    assert original["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    keys = {f"lora_unet_{original[name].replace('.', '_')}.lora_down.weight": name for name in names}
    for key, name in keys.items():
        [mapped] = _maybe_map_sgm_blocks_to_diffusers({key: None}, unet.config)
        theirs = _convert_unet_lora_key(mapped).replace(".processor", "").replace("_lora.down", ".lora.down")
        theirs = re.sub(r"\.lora\.down\.weight$", "", theirs.replace("to_out.lora", "to_out.0.lora"))
        assert theirs == name, key


def test_original_names_of_sd1_are_those_of_its_checkpoint():
    """Names read from the published v1-5 file; an upsampler counts differently in a block without attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    original = original_unet_names(name for name, _ in unet.named_modules())
    assert {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "down_blocks.3.resnets.1.conv1": "input_blocks.11.0.in_layers.2",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.resnets.2.conv_shortcut": "output_blocks.11.0.skip_connection",
    }.items() <= original.items()


def pair(name, width, out=8, rank=2, suffixes=(".lora_down.weight", ".lora_up.weight")):
    return {name + suffixes[0]: torch.ones(rank, width), name + suffixes[1]: torch.ones(out, rank)}


PEFT_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
KOHYA_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SIGNS = {
    "SD1 by width": (pair(KOHYA_KEY, 768), {}, "SD1"),
    "SD2 by width": (pair(KOHYA_KEY, 1024), {}, "SD2"),
    "SDXL by width, header wrong": (pair(KOHYA_KEY, 2048), {"ss_base_model_version": "sd_v1"}, "SDXL"),
    "SDXL by a deep transformer": (pair(KOHYA_KEY.replace("blocks_0_attn", "blocks_7_attn"), 640), {}, "SDXL"),
    "SD1 by header, small and deep": (
        pair(KOHYA_KEY.replace("blocks_0_attn2_to_k", "blocks_1_attn1_to_q"), 128), {"ss_base_model_version": "sd_v1"}, "SD1",
    ),
    "SDXL by the second encoder": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280), {}, "SDXL"),
    "SD2 by header": (pair("lora_unet_conv_in", 4), {"ss_base_model_version": "sd_v2_v"}, "SD2"),
    "SD1 by modelspec": (pair("lora_unet_conv_in", 4), {"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD1"),
    "SDXL by modelspec": (pair("lora_unet_conv_in", 4), {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
    "unknown": (pair("lora_unet_conv_in", 4), {}, None),
    "Flux, kohya": (pair("lora_unet_double_blocks_0_img_attn_proj", 3072), {}, "Flux"),
    "Flux, diffusers": (pair("transformer.single_transformer_blocks.0.attn.to_q", 3072, suffixes=PEFT_SUFFIXES), {}, "Flux"),
    "Flux, original": (pair("diffusion_model.double_blocks.0.img_attn.proj", 3072, suffixes=PEFT_SUFFIXES), {}, "Flux"),
    "SD3, diffusers": (pair("transformer.transformer_blocks.0.attn.to_q", 1536, suffixes=PEFT_SUFFIXES), {}, "SD3"),
    "SD3, with text encoders": (
        pair("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 1280, suffixes=PEFT_SUFFIXES)
        | pair("transformer.transformer_blocks.0.attn.to_q", 1536, suffixes=PEFT_SUFFIXES), {}, "SD3",
    ),
    "SD3, kohya": (pair("lora_unet_joint_blocks_0_context_block_attn_proj", 1536), {}, "SD3"),
}  # fmt: skip


@pytest.mark.parametrize("case", SIGNS)
def test_the_family_is_seen_in_shapes_names_and_header(case, tmp_path):
    tensors, metadata, family = SIGNS[case]
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert adapter.family == family
    says = f"is for {family}, the model is" if family else "is for a weight of 8x4"
    for model in FAMILIES:
        if model != family:
            with pytest.raises(UserError, match=says):
                AdapterStack(source(model), model).match(adapter)
