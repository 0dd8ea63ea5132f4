"""Attached adapters against weights merged by hand, and against peft and diffusers where those can read the file."""

import copy
import hashlib
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from src.errors import ExitCode, UserError
from src.lora import AdapterStack, read_adapter
from src.lora_formats import original_unet_names
from tests.tiny import adapters, pipelines
from tests.tiny.adapters import ATTENTION, EVERYTHING, LINEAR, components, merged, outputs, random_layers

FAMILY = {"SD1": pipelines.sd1, "SD2": lambda: pipelines.sd1(cross_attention_dim=48, linear=True), "SDXL": pipelines.sdxl}
KOHYA_VERSION = {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0"}


@pytest.fixture(scope="module")
def sources():
    """One pipeline of each family; tests attach to copies of it, so that none can leave anything behind."""
    return {family: build() for family, build in FAMILY.items()}


@pytest.fixture(scope="module")
def bases(sources):
    """What each family puts out without an adapter."""
    return {family: outputs(components(source)) for family, source in sources.items()}


@pytest.fixture
def pipeline(sources):
    return lambda family="SD1": SimpleNamespace(**copy.deepcopy(components(sources[family])))


@pytest.fixture(scope="module")
def stacks(sources):
    """For tests that attach nothing."""
    return {family: AdapterStack(source, family) for family, source in sources.items()}


def assert_same(actual, expected, base, tolerance=2e-5):
    """Equal in every component, and every component that differs from the base is far from it: no vacuous agreement."""
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=tolerance, rtol=tolerance)
    moved = {name: (expected[name] - base[name]).abs().max().item() for name in base}
    assert max(moved.values()) > 1000 * tolerance, moved


def assert_identical(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def refusal(path, stack=None, **options):
    def use() -> None:
        adapter = read_adapter(path)
        stack.set([(adapter, 1.0)], **options)

    with pytest.raises(UserError) as caught:
        use()
    assert "\n" not in str(caught.value)
    return caught.value


# --- every format against merged weights ---


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
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_equals_the_weights_merged_by_hand(case, sources, bases, pipeline, tmp_path):
    family, choice, (dialect, write) = FORMATS[case]
    layers = random_layers(sources[family], rank=4, alpha=6.0, **choice)
    path = write(tmp_path, sources[family], layers)
    pipe, base = pipeline(family), bases[family]
    stack = AdapterStack(pipe, family)
    adapter = read_adapter(path)
    [report] = stack.set([(adapter, 0.8)])
    assert_same(outputs(components(pipe)), outputs(merged(sources[family], (layers, 0.8))), base)
    assert (adapter.name, adapter.format, report.family) == ("x", dialect, family)
    assert (report.matched, report.total, report.unmatched) == (len(layers), len(layers), ())
    assert (report.ranks, report.alphas) == ((4,), (6.0,))
    stack.clear()
    assert_identical(outputs(components(pipe)), base)


@pytest.mark.parametrize(("targets", "rank_stabilised"), [(LINEAR, True), (EVERYTHING, False)])
def test_peft_reads_the_same_folder_the_same_way(targets, rank_stabilised, sources, bases, pipeline, tmp_path):
    layers = random_layers(sources["SD1"], rank=6, alpha=3.0, targets=targets, only=UNET)
    special = layers[5].module
    layers[5].down, layers[5].up = layers[5].down[:2].clone(), layers[5].up[:, :2].clone()
    adapters.write_peft(
        tmp_path / "x", sources["SD1"], layers, use_rslora=rank_stabilised,
        rank_pattern={special: 2}, alpha_pattern={special: 5, "attn2.to_q": 1.5},
    )  # fmt: skip
    pipe, reference, base = pipeline(), pipeline(), bases["SD1"]
    reference.unet = PeftModel.from_pretrained(reference.unet, tmp_path / "x")
    AdapterStack(pipe, "SD1").set([(read_adapter(tmp_path / "x"), 1.0)])
    assert_same(outputs(components(pipe)), outputs({**components(reference), "unet": reference.unet.base_model.model}), base)


DIFFUSERS_READS = [name for name in FORMATS if FORMATS[name][2][0] != "peft" and name != "LoCon with mid"]


@pytest.mark.parametrize("case", DIFFUSERS_READS)
def test_diffusers_reads_the_same_file_the_same_way(case, sources, bases, pipeline, tmp_path):
    family, choice, (_, write) = FORMATS[case]
    layers = random_layers(sources[family], alpha=2.0, **choice)
    path = write(tmp_path, sources[family], layers)
    pipe, reference, base = pipeline(family), copy.deepcopy(sources[family]), bases[family]
    folder, name = (path, "pytorch_lora_weights.safetensors") if path.is_dir() else (path.parent, path.name)
    reference.load_lora_weights(folder, weight_name=name, local_files_only=True)
    AdapterStack(pipe, family).set([(read_adapter(path), 1.0)])
    assert_same(outputs(components(pipe)), outputs(components(reference)), base)


def test_without_an_alpha_the_scale_is_one(sources, bases, pipeline, tmp_path):
    layers = random_layers(sources["SD1"], rank=3, alpha=7.0)
    adapters.write_diffusers(tmp_path / "x", layers, settings={})
    pipe, base = pipeline(), bases["SD1"]
    AdapterStack(pipe, "SD1").set([(read_adapter(tmp_path / "x"), 1.0)])
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (layers, 1.0), scale=1.0)), base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_file_precisions_are_read_exactly(dtype, sources, bases, pipeline, tmp_path):
    layers = random_layers(sources["SD1"])
    path = adapters.write_kohya(tmp_path / "x.safetensors", layers, dtype=dtype)
    for layer in layers:
        layer.down, layer.up = layer.down.to(dtype).float(), layer.up.to(dtype).float()
    pipe, base = pipeline(), bases["SD1"]
    AdapterStack(pipe, "SD1").set([(read_adapter(path), 1.0)])
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (layers, 1.0))), base)


def test_prefixes_of_early_unets_and_of_comfyui(sources, bases, pipeline, tmp_path):
    layers = random_layers(sources["SDXL"], only=UNET, targets=ATTENTION)
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
    expected = outputs(merged(sources["SDXL"], (layers, 1.0)))
    for name in ("bare", "comfy"):
        pipe, base = pipeline("SDXL"), bases["SDXL"]
        AdapterStack(pipe, "SDXL").set([(read_adapter(tmp_path / f"{name}.safetensors"), 1.0)])
        assert_same(outputs(components(pipe)), expected, base)


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


# --- attaching, exchanging, detaching ---


def test_two_adapters_are_the_sum_of_both(sources, bases, pipeline, tmp_path):
    """Different ranks, files and targets; some modules carry one of them, some both."""
    dog = random_layers(sources["SD1"], rank=4, alpha=8.0, seed=1, targets=EVERYTHING)
    style = random_layers(sources["SD1"], rank=2, alpha=1.0, seed=2, only=UNET, targets=LINEAR)
    first = read_adapter(adapters.write_kohya(tmp_path / "dog.safetensors", dog))
    second = read_adapter(adapters.write_peft(tmp_path / "style", sources["SD1"], style))
    pipe, base = pipeline(), bases["SD1"]
    stack = AdapterStack(pipe, "SD1")
    reports = stack.set([(first, 0.7), (second, -1.3)])
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (dog, 0.7), (style, -1.3))), base)
    assert [report.name for report in reports] == ["dog", "style"]
    assert max(len(module._forward_hooks) for model in components(pipe).values() for module in model.modules()) == 1


def test_exchange_leaves_nothing_of_the_first(sources, bases, pipeline, tmp_path):
    one = adapters.write_kohya(tmp_path / "one.safetensors", random_layers(sources["SD1"], seed=1, targets=EVERYTHING))
    two = adapters.write_kohya(tmp_path / "two.safetensors", random_layers(sources["SD1"], seed=2, only=UNET))
    fresh, base = pipeline(), bases["SD1"]
    AdapterStack(fresh, "SD1").set([(read_adapter(two), 0.5)])
    pipe = pipeline()
    weights = copy.deepcopy({name: model.state_dict() for name, model in components(pipe).items()})
    stack = AdapterStack(pipe, "SD1")
    stack.set([(read_adapter(one), 1.0)])
    outputs(components(pipe))
    stack.set([(read_adapter(two), 0.5)])
    assert_identical(outputs(components(pipe)), outputs(components(fresh)))
    assert not any(module._forward_hooks for module in pipe.text_encoder.modules()), "a component without an adapter is bare"
    stack.set([(read_adapter(one), 0.0)])
    assert_identical(outputs(components(pipe)), base)
    stack.set([])
    assert_identical(outputs(components(pipe)), base)
    for name, model in components(pipe).items():
        assert_identical(model.state_dict(), weights[name])


def test_200_exchanges_leave_no_hooks_behind(sources, pipeline, tmp_path):
    layers = [random_layers(sources["SD1"], seed=seed) for seed in (1, 2)]
    pair = [read_adapter(adapters.write_kohya(tmp_path / f"{i}.safetensors", part)) for i, part in enumerate(layers)]
    pipe = pipeline()
    stack = AdapterStack(pipe, "SD1")
    modules = [module for model in components(pipe).values() for module in model.modules()]
    for turn in range(200):
        stack.set([(pair[turn % 2], 1.0)])
    assert sum(len(module._forward_hooks) for module in modules) == len(layers[0])
    hooks = [hook for module in modules for hook in module._forward_hooks.values()]
    stack.set([(pair[1], 1.0)])
    assert hooks == [hook for module in modules for hook in module._forward_hooks.values()], "the same again does nothing"
    stack.clear()
    assert sum(len(module._forward_hooks) for module in modules) == 0


def test_a_refused_adapter_leaves_the_attached_ones(sources, pipeline, tmp_path):
    good = read_adapter(adapters.write_kohya(tmp_path / "good.safetensors", random_layers(sources["SD1"])))
    other = adapters.write_kohya(tmp_path / "xl.safetensors", random_layers(sources["SDXL"]), sgm=True)
    pipe = pipeline()
    stack = AdapterStack(pipe, "SD1")
    stack.set([(good, 1.0)])
    before = outputs(components(pipe))
    assert refusal(other, stack).exit_code is ExitCode.REFUSED
    with pytest.raises(UserError, match="weight nan") as caught:
        stack.set([(good, float("nan"))])
    assert caught.value.exit_code is ExitCode.USAGE
    assert_identical(outputs(components(pipe)), before)


def test_a_bf16_model_stays_bf16(sources, pipeline, tmp_path):
    layers = random_layers(sources["SD1"], targets=EVERYTHING)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers))
    pipe = pipeline()
    for model in components(pipe).values():
        model.to(torch.bfloat16)
    base = outputs(components(pipe), torch.bfloat16)
    AdapterStack(pipe, "SD1").set([(adapter, 1.0)])
    actual = outputs(components(pipe), torch.bfloat16)
    expected = outputs(merged(sources["SD1"], (layers, 1.0)))
    for name, value in expected.items():
        assert actual[name].dtype is torch.bfloat16
        error, effect = (actual[name] - value).norm() / value.norm(), (value - base[name]).norm() / value.norm()
        assert error < 0.03 < 0.3 < effect, f"{name}: {error:.3f} against {effect:.3f}"  # bf16 has 8 bits


def test_a_moved_model_takes_its_adapter_along(sources, bases, pipeline, tmp_path):
    layers = random_layers(sources["SD1"], only=UNET)
    pipe, base = pipeline(), bases["SD1"]
    AdapterStack(pipe, "SD1").set([(read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers)), 1.0)])
    pipe.unet.double()
    outputs({"unet": pipe.unet}, torch.float64)
    pipe.unet.float()
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (layers, 1.0))), base)


def test_offloaded_weights_make_no_difference(sources, bases, pipeline, tmp_path):
    """Sequential offloading keeps weights on the meta device between calls, and replaces every forward."""
    layers = random_layers(sources["SD1"], targets=EVERYTHING)
    pipe, base = pipeline(), bases["SD1"]
    for model in components(pipe).values():
        cpu_offload(model, execution_device=torch.device("cpu"))
    stack = AdapterStack(pipe, "SD1")
    stack.set([(read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers)), 1.0)])
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (layers, 1.0))), base)
    stack.clear()
    assert_identical(outputs(components(pipe)), base)


def test_compiled_blocks_notice_every_change(sources, pipeline, tmp_path):
    layers = random_layers(sources["SD1"], only=UNET, targets="mid_block.*" + LINEAR)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers))
    pipe = pipeline()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager", fullgraph=True)
    base = outputs(components(pipe))
    stack = AdapterStack(pipe, "SD1")
    stack.set([(adapter, 1.0)])
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (layers, 1.0))), base)
    stack.clear()
    assert_identical(outputs(components(pipe)), base)


# --- what fits, and what is refused ---


@pytest.mark.parametrize("model", FAMILY)
@pytest.mark.parametrize("made_for", FAMILY)
@pytest.mark.parametrize("dialect", ["diffusers", "peft", "kohya"])
def test_families(dialect, made_for, model, sources, stacks, tmp_path):
    """Each format, made for each family, on each model: attached where it belongs, else refused in one line."""
    layers = random_layers(sources[made_for])
    if dialect == "diffusers":
        path = adapters.write_diffusers(tmp_path / "x", layers)
    elif dialect == "peft":
        path = adapters.write_peft(tmp_path / "x", sources[made_for], layers)
    else:
        metadata = {"ss_base_model_version": KOHYA_VERSION[made_for]}
        path = adapters.write_kohya(tmp_path / "x.safetensors", layers, sgm=made_for == "SDXL", metadata=metadata)
    if made_for == model:
        assert stacks[model].match(read_adapter(path)).family == model
        return
    error = refusal(path, stacks[model])
    assert error.exit_code is ExitCode.REFUSED
    if dialect == "kohya" or made_for == "SDXL":  # the others carry no sign of their family in these tiny shapes
        assert f"LoRA x is for {made_for}, the model is {model}" in str(error)


def pair(name, width, out=8, rank=2, suffixes=(".lora_down.weight", ".lora_up.weight")):
    return {name + suffixes[0]: torch.ones(rank, width), name + suffixes[1]: torch.ones(out, rank)}


PEFT_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
KOHYA_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SIGNS = {
    "SD1 by width": (pair(KOHYA_KEY, 768), {}, "SD1"),
    "SD2 by width": (pair(KOHYA_KEY, 1024), {}, "SD2"),
    "SDXL by width, header wrong": (pair(KOHYA_KEY, 2048), {"ss_base_model_version": "sd_v1"}, "SDXL"),
    "SDXL by a deep transformer": (pair(KOHYA_KEY.replace("blocks_0_attn", "blocks_7_attn"), 640), {}, "SDXL"),
    "SDXL by the second encoder": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280), {}, "SDXL"),
    "SD2 by header": (pair("lora_unet_conv_in", 4), {"ss_base_model_version": "sd_v2_v"}, "SD2"),
    "SD1 by modelspec": (pair("lora_unet_conv_in", 4), {"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD1"),
    "SDXL by modelspec": (pair("lora_unet_conv_in", 4), {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
    "unknown": (pair("lora_unet_conv_in", 4), {}, None),
    "Flux, kohya": (pair("lora_unet_double_blocks_0_img_attn_proj", 3072), {}, "Flux"),
    "Flux, diffusers": (pair("transformer.single_transformer_blocks.0.attn.to_q", 3072, suffixes=PEFT_SUFFIXES), {}, "Flux"),
    "Flux, original": (pair("diffusion_model.double_blocks.0.img_attn.proj", 3072, suffixes=PEFT_SUFFIXES), {}, "Flux"),
    "SD3, diffusers": (pair("transformer.transformer_blocks.0.attn.to_q", 1536, suffixes=PEFT_SUFFIXES), {}, "SD3"),
    "SD3, kohya": (pair("lora_unet_joint_blocks_0_context_block_attn_proj", 1536), {}, "SD3"),
}  # fmt: skip


@pytest.mark.parametrize("case", SIGNS)
def test_the_family_is_seen_in_shapes_names_and_header(case, stacks, tmp_path):
    tensors, metadata, family = SIGNS[case]
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or None)
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert adapter.family == family
    for model in FAMILY:
        if model != family:
            error = refusal(tmp_path / "x.safetensors", stacks[model])
            assert family is None or f"is for {family}, the model is {model}" in str(error)


def test_report_line(sources, stacks, tmp_path):
    layers = random_layers(sources["SD1"], alpha=1.0)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "dog.safetensors", layers))
    report = stacks["SD1"].match(adapter)
    text = sum(layer.component == "text_encoder" for layer in layers)
    assert text == 18, "three layers of six modules"
    assert report.line() == (
        f"LoRA dog: SD1, kohya, rank 4, alpha 1, {len(layers)}/{len(layers)} layers (unet {len(layers) - 18}, text encoder 18)"
    )


def test_a_partial_match_is_refused_unless_allowed(sources, bases, pipeline, tmp_path):
    layers = random_layers(sources["SD1"])
    path = adapters.write_kohya(tmp_path / "x.safetensors", layers)
    save_file({**load_file(path), **pair("lora_unet_down_blocks_9_attentions_0_proj_in", 4)}, path)
    pipe, base = pipeline(), bases["SD1"]
    stack = AdapterStack(pipe, "SD1")
    assert f"only {len(layers)} of its {len(layers) + 1} layers" in str(refusal(path, stack))
    assert_identical(outputs(components(pipe)), base)
    [report] = stack.set([(read_adapter(path), 1.0)], allow_partial=True)
    assert report.unmatched == ("unet: down_blocks_9_attentions_0_proj_in",)
    assert f"{len(layers)}/{len(layers) + 1} layers" in report.line()
    assert_same(outputs(components(pipe)), outputs(merged(sources["SD1"], (layers, 1.0))), base)


def test_a_missing_text_encoder_is_a_partial_match(sources, pipeline, tmp_path):
    path = adapters.write_kohya(tmp_path / "x.safetensors", random_layers(sources["SD1"]))
    pipe = pipeline()
    pipe.text_encoder = None
    stack = AdapterStack(pipe, "SD1")
    assert "text_encoder: text_model_encoder_layers_0" in str(refusal(path, stack))
    assert set(stack.set([(read_adapter(path), 1.0)], allow_partial=True)[0].per_component) == {"unet"}


def with_value(value):
    def spoil(tensors, layer):
        tensors[f"{layer}.lora_up.weight"][0, 0] = value

    return spoil


def extra(suffix, value=None):
    def spoil(tensors, layer):
        tensors[layer + suffix] = torch.ones(4) if value is None else value

    return spoil


def extra_whole(name):
    return lambda tensors, layer: tensors.update({name: torch.ones(4)})


def without(suffix):
    return lambda tensors, layer: tensors.pop(layer + suffix)


SPOILED = {
    "NaN": (with_value(float("nan")), "holds NaN or infinity"),
    "infinity": (with_value(float("inf")), "holds NaN or infinity"),
    "no up": (without(".lora_up.weight"), "without its counterpart"),
    "no down": (without(".lora_down.weight"), "without its counterpart"),
    "alpha alone": (extra("x.alpha", torch.tensor(1.0)), "without its counterpart"),
    "rank": (extra(".lora_up.weight", torch.ones(32, 3)), "has rank 4 in down and 3 in up"),
    "rank 0": (extra(".lora_up.weight", torch.ones(32, 0)), "which no LoRA has"),
    "one dimension": (extra(".lora_up.weight", torch.ones(32)), "which no LoRA has"),
    "whole numbers": (extra(".lora_up.weight", torch.ones(32, 4, dtype=torch.int32)), "is of type I32"),
    "double": (extra(".lora_up.weight", torch.ones(32, 4, dtype=torch.float64)), "is of type F64"),
    "alpha 0": (extra(".alpha", torch.tensor(0.0)), "must be a positive number"),
    "alpha NaN": (extra(".alpha", torch.tensor(float("nan"))), "holds NaN"),
    "two alphas": (extra(".alpha", torch.ones(2)), "is not one number"),
    "mid": (extra(".lora_mid.weight", torch.ones(3, 3, 3, 3)), "does not fit its rank 4"),
    "shape": (extra(".lora_up.weight", torch.ones(31, 4)), "is for a weight of 31x32, this SD1 model has 32x32"),
    "same twice": (lambda tensors, layer: tensors.update(
        {name.replace(layer, layer.replace("lora_te_", "lora_te1_")): tensor.clone() for name, tensor in tensors.items()}
    ), "under two names"),
    "LoHa": (extra(".hada_w1_a"), "kind LoHa"),
    "LoKr": (extra(".lokr_w1"), "kind LoKr"),
    "DoRA": (extra(".dora_scale"), "kind DoRA"),
    "DoRA, peft": (extra(".lora_magnitude_vector.weight"), "kind DoRA"),
    "OFT": (extra(".oft_blocks"), "kind OFT"),
    "BOFT": (extra(".boft_R"), "kind BOFT"),
    "IA3": (extra(".on_input"), "kind (IA)³"),
    "GLoRA": (extra(".a1.weight"), "kind GLoRA"),
    "full difference": (extra(".diff"), "kind full difference"),
    "bundle": (extra_whole("bundle_emb.dog.string_to_param.*"), "inversion bundle"),
    "whole model": (extra_whole("model.diffusion_model.out.2.weight"), "load it as the model itself"),
    "stranger": (extra(".weights"), "belongs to no LoRA format"),
    "escape code": (extra("\x1b[31m"), r"\x1b[31m"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_adapter_is_refused_in_one_line_that_says_why(case, sources, stacks, tmp_path):
    spoil, says = SPOILED[case]
    path = adapters.write_kohya(tmp_path / "x.safetensors", random_layers(sources["SD1"], only=("text_encoder",)))
    tensors = load_file(path)
    spoil(tensors, "lora_te_text_model_encoder_layers_1_self_attn_q_proj")
    save_file(tensors, path)
    error = refusal(path, stacks["SD1"])
    assert says in str(error)
    assert error.exit_code is ExitCode.REFUSED


PEFT_SPOILED = {
    "DoRA": ({"use_dora": True}, "kind DoRA"),
    "LoHa": ({"peft_type": "LOHA"}, "kind 'LOHA'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
    "alpha text": ({"lora_alpha": "8"}, "must be a positive number"),
    "alpha huge": ({"lora_alpha": 10**400}, "must be a positive number"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 3}}, "is a regular expression"),
    "pattern list": ({"alpha_pattern": [1]}, "no table"),
}


@pytest.mark.parametrize("case", PEFT_SPOILED)
def test_peft_settings_that_mean_something_else_are_refused(case, sources, tmp_path):
    settings, says = PEFT_SPOILED[case]
    adapters.write_peft(tmp_path / "x", sources["SD1"], random_layers(sources["SD1"], only=UNET), **settings)
    assert says in str(refusal(tmp_path / "x"))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800", " " * (2**20 + 1)])
def test_damaged_settings_are_refused(text, sources, tmp_path):
    adapters.write_peft(tmp_path / "x", sources["SD1"], random_layers(sources["SD1"], only=UNET))
    (tmp_path / "x" / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(tmp_path / "x").exit_code is ExitCode.REFUSED


# --- finding files ---


def test_what_a_path_may_be(sources, tmp_path):
    layers = random_layers(sources["SD1"], only=UNET)
    file = adapters.write_kohya(tmp_path / "dog.safetensors", layers)
    adapters.write_peft(tmp_path / "cat", sources["SD1"], layers)
    (tmp_path / "only").mkdir()
    adapters.write_kohya(tmp_path / "only" / "bird.safetensors", layers)
    adapters.write_diffusers(tmp_path / "cow", layers)
    assert [read_adapter(path).name for path in (file, tmp_path / "cat", tmp_path / "only", tmp_path / "cow")] == [
        "dog", "cat", "only", "cow",
    ]  # fmt: skip
    assert read_adapter(tmp_path / "cat" / "adapter_model.safetensors").format == "peft"
    assert read_adapter(tmp_path / "cow" / "pytorch_lora_weights.safetensors").name == "cow"
    assert read_adapter(str(file), name="rex").name == "rex"
    (tmp_path / "cat" / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    assert "without its adapter_config.json" in str(refusal(tmp_path / "cat" / "adapter_model.safetensors"))


def test_what_is_not_there_or_not_clear(sources, tmp_path):
    layers = random_layers(sources["SD1"], only=UNET)
    for name in ("dog", "cat"):
        adapters.write_kohya(tmp_path / f"{name}.safetensors", layers)
    error = refusal(tmp_path / "dgo.safetensors")
    assert error.exit_code is ExitCode.NOT_FOUND
    assert "did you mean 'dog.safetensors'?" in str(error)
    assert "holds 2 .safetensors files (cat.safetensors, dog.safetensors)" in str(refusal(tmp_path))
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").exit_code is ExitCode.NOT_FOUND
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02.")
    assert "can run code" in str(refusal(tmp_path / "pickled"))
    adapters.write_peft(tmp_path / "peft", sources["SD1"], layers)
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    assert "can run code" in str(refusal(tmp_path / "peft"))
    three = adapters.write_peft(
        tmp_path / "three" / "text_encoder_lora", sources["SD1"], random_layers(sources["SD1"]), "text_encoder"
    )
    adapters.write_peft(three.parent / "text_encoder", sources["SD1"], random_layers(sources["SD1"]), "text_encoder")
    assert "two adapters for the text_encoder" in str(refusal(three.parent))


def test_sha256_is_the_files_or_that_of_its_sorted_hashes(sources, tmp_path):
    layers = random_layers(sources["SD1"], only=UNET)
    file = adapters.write_kohya(tmp_path / "dog.safetensors", layers)
    assert read_adapter(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    folder = adapters.write_peft(tmp_path / "cat", sources["SD1"], layers)
    parts = sorted(hashlib.sha256(part.read_bytes()).hexdigest() for part in folder.iterdir())
    assert read_adapter(folder).sha256 == hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_300_mutations_of_a_file_either_fit_or_are_refused(sources, pipeline, tmp_path):
    layers = random_layers(sources["SD1"], only=("text_encoder",))
    sound = adapters.write_kohya(tmp_path / "x.safetensors", layers, metadata={"ss_base_model_version": "sd_v1"}).read_bytes()
    header_end = 8 + int.from_bytes(sound[:8], "little")
    stack = AdapterStack(pipeline(), "SD1")
    refused = 0
    for seed in range(300):
        dice = random.Random(seed)
        damaged = bytearray(sound)
        region = (0, header_end) if seed % 3 else (header_end, len(sound))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(*region)
            if seed % 2:  # what keeps the header's length, and so reaches deeper
                damaged[at] = dice.choice(b"0123456789._ABFlwua") if at < header_end else dice.randrange(256)
            else:
                damaged[at : at + dice.randint(0, 3)] = bytes(dice.randrange(256) for _ in range(dice.randint(0, 3)))
        (tmp_path / "y.safetensors").write_bytes(damaged)
        try:
            stack.set([(read_adapter(tmp_path / "y.safetensors"), 1.0)], allow_partial=bool(seed % 5))
        except UserError:
            refused += 1
    assert 100 < refused < 300
