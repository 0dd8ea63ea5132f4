"""What lies in a model folder or a single file: components, weights, family, and what is refused."""

from __future__ import annotations

import pytest

from src.errors import ExitCode
from src.model_files import check_folder, family_of, prediction_type_of, select_weights, vae_folder
from src.model_source import resolve_vae
from src.tensor_files import read_header
from tests.tiny.model_folders import CHECKER, SD1, SDXL, model, refusal, safetensors, write

# -- folders


@pytest.mark.parametrize("dot", ["", ".fp16"])
@pytest.mark.parametrize(("parts", "pipeline"), [(SD1, "StableDiffusionPipeline"), (SDXL, "StableDiffusionXLInpaintPipeline")])
def test_whole_folders_pass(tmp_path, dot, parts, pipeline):
    expected = {name: value[1] for name, value in parts.items() if isinstance(value, list) and value[1]}
    assert check_folder(model(tmp_path, parts, pipeline, dot)) == expected


def test_the_safety_checker_may_be_left_out_on_request_only(tmp_path):
    folder = model(tmp_path, {**SD1, **CHECKER})
    assert "safety_checker" in check_folder(folder)
    (folder / "safety_checker" / "model.safetensors").unlink()
    assert "--no-safety-checker" in refusal(ExitCode.NOT_FOUND, check_folder, folder)
    assert CHECKER.keys().isdisjoint(check_folder(folder, include_safety_checker=False))


def test_no_model_index(tmp_path):
    message = refusal(ExitCode.NOT_FOUND, check_folder, tmp_path)
    assert "has no model_index.json" in message
    assert "; name a folder with one, or a .safetensors file" in message
    assert "; name a folder with one, or a .safetensors file" in refusal(ExitCode.NOT_FOUND, vae_folder, tmp_path)
    assert "; take a complete copy" in refusal(ExitCode.NOT_FOUND, family_of, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\x00", "{'a': 1}"])
def test_model_index_is_json(tmp_path, text):
    write(tmp_path / "model_index.json", text)
    refusal(ExitCode.REFUSED, check_folder, tmp_path)


@pytest.mark.parametrize(
    ("parts", "pipeline", "said"),
    [
        (SD1, "FluxPipeline", "FluxPipeline"),
        (SD1, "StableDiffusion3Pipeline", "StableDiffusion3Pipeline"),
        (SD1, "KandinskyPipeline", "not supported"),
        (SD1, ["my_pipeline", "Evil"], "code of its own"),
        (SD1, None, "never run"),
        ({**SD1, "unet": ["my_unet", "EvilUNet"]}, "StableDiffusionPipeline", "EvilUNet"),
        ({**SD1, "unet": ["diffusers", "UNet2DConditionModel", "more"]}, "StableDiffusionPipeline", "unet"),
        ({**SD1, "scheduler": ["os", "system"]}, "StableDiffusionPipeline", "system"),
        ({**SD1, "scheduler": ["diffusers", "../../EvilScheduler"]}, "StableDiffusionPipeline", "EvilScheduler"),
        ({**SD1, "prior": ["diffusers", "PriorTransformer"]}, "StableDiffusionPipeline", "PriorTransformer"),
        ({**SD1, "vae": [None, None]}, "StableDiffusionPipeline", "names no vae"),
        (SD1, "StableDiffusionXLPipeline", "names no text_encoder_2"),
        ({**SDXL, "text_encoder": [None, None]}, "StableDiffusionXLImg2ImgPipeline", "refiner"),
    ],
)  # fmt: skip
def test_foreign_and_hostile_folders_are_refused(tmp_path, parts, pipeline, said):
    assert said in refusal(ExitCode.REFUSED, check_folder, model(tmp_path, parts, pipeline))


@pytest.mark.parametrize("place", ["pipeline.py", "unet/model.py"])
def test_code_is_refused(tmp_path, place):
    write(model(tmp_path) / place, "print('canary')")
    assert "code" in refusal(ExitCode.REFUSED, check_folder, tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (model(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(ExitCode.REFUSED, check_folder, tmp_path)
    assert "'unet'" in message
    assert "pickled" in message


def test_a_missing_component_is_named(tmp_path):
    (model(tmp_path) / "vae").rename(tmp_path / "elsewhere")
    assert "component 'vae' is missing" in refusal(ExitCode.NOT_FOUND, check_folder, tmp_path)


STEM = "diffusion_pytorch_model"
INDEX, INDEX_16 = f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"
SHARDS = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
NEW_16 = [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
OLD_16 = [f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
ONE, ONE_16 = f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"


@pytest.mark.parametrize(
    ("files", "prefer_fp16", "expected"),
    [
        ([ONE, ONE_16], False, ([ONE], None)),
        ([ONE, ONE_16], True, ([ONE_16], "fp16")),
        ([ONE], True, ([ONE], None)),
        ([ONE_16], False, ([ONE_16], "fp16")),
        ([INDEX, *SHARDS], True, ([INDEX, *SHARDS], None)),
        ([INDEX_16, *NEW_16], False, ([INDEX_16, *NEW_16], "fp16")),
        ([INDEX_16, *OLD_16, INDEX, *SHARDS], True, ([INDEX_16, *OLD_16], "fp16")),
        ([INDEX, SHARDS[0]], True, ([], None)),
        (SHARDS, True, ([], None)),
        ([f"{STEM}.non_ema.safetensors", f"{STEM}.bin", "model.safetensors", f"{STEM}.onnx"], True, ([], None)),
    ],
)
def test_weights_are_one_file_or_all_shards(files, prefer_fp16, expected):
    assert select_weights("unet", files, prefer_fp16) == expected


def test_a_vae_folder_is_its_own_or_that_of_a_model(tmp_path):
    assert vae_folder(model(tmp_path)) == tmp_path / "vae"
    assert vae_folder(tmp_path / "vae") == tmp_path / "vae"
    assert resolve_vae(str(tmp_path), tmp_path, offline=True).path == tmp_path
    assert "UNet2DConditionModel" in refusal(ExitCode.REFUSED, vae_folder, tmp_path / "unet")


# -- family


@pytest.mark.parametrize(
    ("unet", "family"),
    [
        ({}, "SD1"),
        ({"use_linear_projection": True}, "SD2"),
        ({"use_linear_projection": True, "addition_embed_type": "text_time"}, "SDXL"),
        ({"in_channels": 4}, "SD1"),
    ],
)
def test_family_of_a_folder_is_in_its_unet(tmp_path, unet, family):
    assert family_of(model(tmp_path / "sdxl-by-name", unet=unet)) == family


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
CLIP_L = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
CLIP_H = "cond_stage_model.model.ln_final.weight"
XL_L, XL_G = (
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "conditioner.embedders.1.model.ln_final.weight",
)
U_NET = {CONV_IN: (8, 4, 3, 3)}


@pytest.mark.parametrize(("names", "family"), [([CLIP_L], "SD1"), ([CLIP_H], "SD2"), ([XL_L, XL_G], "SDXL")])
def test_family_of_a_file_is_in_its_text_encoders(tmp_path, names, family):
    assert family_of(safetensors(tmp_path / "x.safetensors", {**U_NET, **dict.fromkeys(names, (8,))})) == family


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({CONV_IN: (8, 8, 3, 3), CLIP_L: (8,)}, "8 channels"),
        ({**U_NET, "conditioner.embedders.0.model.ln_final.weight": (8,)}, "refiner"),
        (U_NET, "no text encoder"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, "--lora"),
        ({"unet.down_blocks.0.lora_A.weight": (4, 8)}, "--lora"),
        ({"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)}, "--vae"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "--vae"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "U-Net alone"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "Flux"),
        ({"model.diffusion_model.joint_blocks.0.x": (8,)}, "Stable Diffusion 3"),
        ({"something": (8,)}, "no Stable Diffusion checkpoint"),
        ({}, "no Stable Diffusion checkpoint"),
    ],
)
def test_files_that_are_no_model_are_named(tmp_path, shapes, said):
    assert said in refusal(ExitCode.REFUSED, family_of, safetensors(tmp_path / "x.safetensors", shapes))


def test_inpainting_models_keep_their_family(tmp_path):
    assert family_of(model(tmp_path, unet={"in_channels": 9})) == "SD1"
    file = safetensors(tmp_path / "x.safetensors", {CONV_IN: (8, 9, 3, 3), CLIP_L: (8,)})
    assert family_of(file) == "SD1"


def test_a_model_of_eight_latent_channels_is_one_but_not_one_that_edits_pictures(tmp_path):
    assert family_of(model(tmp_path, unet={"in_channels": 8, "out_channels": 8})) == "SD1"
    edits = model(tmp_path / "instruct-pix2pix", unet={"in_channels": 8, "out_channels": 4})  # latents and the picture's
    assert "takes 8 channels, not 4" in refusal(ExitCode.REFUSED, family_of, edits)


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        ({}, {}, None),
        ({"v_pred": (0,)}, {}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({}, {"ss_v_parameterization": "True"}, "v_prediction"),
        ({}, {"ss_v_parameterization": "False"}, "epsilon"),
    ],
)
def test_prediction_type_is_what_the_file_says(tmp_path, shapes, metadata, expected):
    assert prediction_type_of(read_header(safetensors(tmp_path / "x.safetensors", shapes, metadata))) == expected
