"""What a model name means, and which folders and files are a model: on small hand-made folders, without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from src.errors import ExitCode, UserError
from src.model_files import check_folder, family_of, prediction_type_of, select_weights, vae_folder
from src.model_source import EMBEDDED, Source, resolve, resolve_vae, user_cache
from src.tensor_files import read_header

SD1 = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
}
CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
SDXL = {
    **SD1,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def model(
    folder: Path, parts: dict = SD1, pipeline: object = "StableDiffusionPipeline", dot: str = "", unet: dict | None = None
) -> Path:
    """A diffusers folder: real names, empty weights."""
    write(folder / "model_index.json", json.dumps({"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts}))
    for name, value in parts.items():
        if not isinstance(value, list) or value[1] is None:
            continue
        match name.removesuffix("_2"):
            case "unet" | "vae":
                write(folder / name / "config.json", json.dumps({"_class_name": value[1], **(unet or {})}))
                write(folder / name / f"diffusion_pytorch_model{dot}.safetensors")
            case "text_encoder" | "safety_checker":
                write(folder / name / "config.json")
                write(folder / name / f"model{dot}.safetensors")
            case "tokenizer":
                write(folder / name / "vocab.json")
                write(folder / name / "merges.txt")
            case "scheduler":
                write(folder / name / "scheduler_config.json")
            case "feature_extractor":
                write(folder / name / "preprocessor_config.json")
    return folder


def cached(cache: Path, model_id: str, **options: object) -> Path:
    """The same folder as a snapshot in the layout of a Hugging Face cache."""
    storage = cache / f"models--{model_id.replace('/', '--')}"
    write(storage / "refs" / "main", COMMIT)
    return model(storage / "snapshots" / COMMIT, **options)


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file of zeros, written by the format's description."""
    entries, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        size = 1
        for item in shape:
            size *= item
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    return path


def refusal(code: ExitCode, call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert caught.value.exit_code == code, message
    assert "\n" not in message
    assert len(message) < 400, message
    return message


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with no Hugging Face cache of the user, and the network allowed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return tmp_path


# -- names


def test_embedded_is_the_shipped_model_and_whole(here):
    assert resolve("embedded", Path("c"), offline=True) == Source("folder", EMBEDDED, "embedded")
    check_folder(EMBEDDED)
    assert family_of(EMBEDDED) == "SD1"


@pytest.mark.parametrize("text", ["my model", "./my model", "my model/", "../here/my model", "~/my model"])
def test_a_folder_is_found_however_it_is_spelled(tmp_path, monkeypatch, text):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    model(tmp_path / "here" / "my model")
    source = resolve(text, Path("c"), offline=True)
    assert (source.kind, source.name) == ("folder", "my model")
    assert source.path.samefile(tmp_path / "here" / "my model")


def test_names_hold_no_folder(here):
    model(here / "secret" / "client" / "portraits")
    safetensors(here / "secret" / "v1-5.safetensors", {"a": (1,)})
    assert resolve(str(here / "secret/client/portraits"), Path("c"), offline=True).name == "portraits"
    assert resolve("secret/v1-5.safetensors", Path("c"), offline=True) == Source(
        "file", Path("secret/v1-5.safetensors"), "v1-5"
    )


def test_a_local_folder_wins_over_the_hub(here):
    model(here / "owner" / "name")
    assert resolve("owner/name", Path("c"), offline=False).kind == "folder"


@pytest.mark.parametrize(
    "text",
    [
        "models/sd51",
        "./nothing",
        "/nothing/there",
        "~/nothing",
        "C:\\models\\sd15",
        "C:/x",
        "a\\b",
        "x.safetensors",
        "a/b/c",
        "../x/y",
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_network(here, text):
    (here / "models").mkdir()
    assert "no such file or folder" in refusal(ExitCode.NOT_FOUND, resolve, text, Path("c"), offline=False)


def test_the_nearest_name_is_offered(here):
    model(here / "models" / "sd15")
    assert "did you mean 'models/sd15'" in refusal(ExitCode.NOT_FOUND, resolve, "models/sd51", Path("c"), offline=False)
    assert "did you mean 'models'" in refusal(ExitCode.NOT_FOUND, resolve, "./modles/sd15", Path("c"), offline=False)


def test_of_a_folder_only_models_are_listed_and_a_next_step_is_given(here):
    for clutter in ("models/notes.txt", "models/outputs/x.png", "models/.hidden/model_index.json", "h.py"):
        write(here / clutter)
    message = refusal(ExitCode.NOT_FOUND, resolve, "./zzz", Path("c"), offline=False)
    assert message == "./zzz: no such file or folder; check the path, or name a hub id such as owner/name"
    model(here / "models" / "sd15")
    write(here / "models" / "v1-5.safetensors")
    message = refusal(ExitCode.NOT_FOUND, resolve, "models/turbo", Path("c"), offline=False)
    assert "; 'models' holds sd15, v1-5.safetensors; check the path, or name a hub id such as owner/name" in message
    assert "did you mean" not in refusal(ExitCode.NOT_FOUND, resolve, "models/notes.text", Path("c"), offline=False)


@pytest.mark.parametrize("text", ["", " ", "embeded", "no-such-preset", "sd 15"])
def test_a_bare_word_is_neither_path_nor_hub_id(here, text):
    message = refusal(ExitCode.NOT_FOUND, resolve, text, Path("c"), offline=False)
    assert "presets are chosen with --model NAME or --config NAME" in message
    assert ("did you mean 'embedded'" in message) == (text == "embeded")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickles_are_refused_with_a_way_out(here, suffix):
    (here / f"model{suffix}").write_bytes(b"\x80\x04.")
    assert "safetensors/convert" in refusal(ExitCode.REFUSED, resolve, f"model{suffix}", Path("c"), offline=True)


def test_other_files_are_refused(here):
    write(here / "model.txt")
    assert ".safetensors" in refusal(ExitCode.REFUSED, resolve, "model.txt", Path("c"), offline=True)


# -- hub ids and caches


def test_a_hub_id_is_looked_for_in_our_cache_then_in_the_users(here):
    assert resolve("owner/name", Path("c"), offline=False) == Source("hub", None, "owner/name")
    theirs = cached(here / "user-cache", "owner/name")
    assert resolve("owner/name", Path("c"), offline=True) == Source("hub", theirs, "owner/name")
    ours = cached(Path("c"), "owner/name")
    assert resolve("owner/name", Path("c"), offline=True) == Source("hub", ours, "owner/name")


def test_a_revision_is_a_branch_or_a_commit_of_its_own(here):
    snapshot = cached(Path("c"), "owner/name")
    assert resolve("owner/name", Path("c"), offline=True, revision=COMMIT).path == snapshot
    for other in ("fp16", "f" * 40, "../../x"):
        refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("c"), offline=True, revision=other)
        assert resolve("owner/name", Path("c"), offline=False, revision=other).path is None


@pytest.mark.parametrize(
    "missing",
    ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
     "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_a_partial_download_is_no_model(here, missing):
    (cached(Path("c"), "owner/name") / missing).unlink()
    assert resolve("owner/name", Path("c"), offline=False).path is None
    message = refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("c"), offline=True)
    assert "only partly in c" in message
    assert missing.partition("/")[0] in message
    assert "run once without --offline" in message


def test_offline_says_what_to_do(here, monkeypatch):
    message = refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("models/cache"), offline=True)
    assert message == "owner/name: not in models/cache; run once without --offline"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "without HF_HUB_OFFLINE" in refusal(ExitCode.NOT_FOUND, resolve, "owner/name", Path("c"), offline=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_users_cache_is_where_huggingface_hub_has_it(monkeypatch, variables, expected):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert user_cache() == Path(expected)


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
