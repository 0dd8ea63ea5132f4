"""Adapters attached, exchanged and detached, on every kind of model; what fits where, and what is refused."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from src.errors import ExitCode, UserError
from src.lora.reading import read_adapter
from src.lora.stack import AdapterStack
from tests.tiny import adapters
from tests.tiny.adapters import (
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

UNET = ("unet",)
KOHYA_VERSION = {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0"}


def refusal(path, stack):
    adapter = read_adapter(path)
    with pytest.raises(UserError) as caught:
        stack.set([(adapter, 1.0)])
    assert "\n" not in str(caught.value)
    return caught.value


def test_two_adapters_are_the_sum_of_both(tmp_path):
    """Different ranks, files and targets; some modules carry one of them, some both."""
    dog = random_layers(source("SD1"), rank=4, alpha=8.0, seed=1, targets=EVERYTHING)
    style = random_layers(source("SD1"), rank=2, alpha=1.0, seed=2, only=UNET, targets=LINEAR)
    first = read_adapter(adapters.write_kohya(tmp_path / "dog.safetensors", dog))
    second = read_adapter(adapters.write_peft(tmp_path / "style", source("SD1"), style))
    pipe = fresh()
    stack = AdapterStack(pipe, "SD1")
    reports = stack.set([(first, 0.7), (second, -1.3)])
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (dog, 0.7), (style, -1.3))), "SD1")
    assert [report.name for report in reports] == ["dog", "style"]
    assert max(len(module._forward_hooks) for model in components(pipe).values() for module in model.modules()) == 1


def test_exchange_leaves_nothing_of_the_first(tmp_path):
    one = adapters.write_kohya(tmp_path / "one.safetensors", random_layers(source("SD1"), seed=1, targets=EVERYTHING))
    two = adapters.write_kohya(tmp_path / "two.safetensors", random_layers(source("SD1"), seed=2, only=UNET))
    only_two = fresh()
    AdapterStack(only_two, "SD1").set([(read_adapter(two), 0.5)])
    pipe = fresh()
    weights = copy.deepcopy({name: model.state_dict() for name, model in components(pipe).items()})
    stack = AdapterStack(pipe, "SD1")
    stack.set([(read_adapter(one), 1.0)])
    outputs(components(pipe))
    stack.set([(read_adapter(two), 0.5)])
    assert_identical(outputs(components(pipe)), outputs(components(only_two)))
    assert not any(module._forward_hooks for module in pipe.text_encoder.modules()), "a component without an adapter is bare"
    stack.set([(read_adapter(one), 0.0)])
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))
    stack.set([])
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))
    for name, model in components(pipe).items():
        assert_identical(model.state_dict(), weights[name])


def test_200_exchanges_leave_no_hooks_behind(tmp_path):
    layers = [random_layers(source("SD1"), seed=seed) for seed in (1, 2)]
    pair = [read_adapter(adapters.write_kohya(tmp_path / f"{i}.safetensors", part)) for i, part in enumerate(layers)]
    pipe = fresh()
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


def test_a_refused_adapter_leaves_the_attached_ones(tmp_path):
    good = read_adapter(adapters.write_kohya(tmp_path / "good.safetensors", random_layers(source("SD1"))))
    other = adapters.write_kohya(tmp_path / "xl.safetensors", random_layers(source("SDXL")), sgm=True)
    pipe = fresh()
    stack = AdapterStack(pipe, "SD1")
    stack.set([(good, 1.0)])
    before = outputs(components(pipe))
    assert refusal(other, stack).exit_code is ExitCode.REFUSED
    with pytest.raises(UserError, match="weight nan") as caught:
        stack.set([(good, float("nan"))])
    assert caught.value.exit_code is ExitCode.USAGE
    assert_identical(outputs(components(pipe)), before)


def test_a_bf16_model_stays_bf16(tmp_path):
    layers = random_layers(source("SD1"), targets=EVERYTHING)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers))
    pipe = fresh()
    for model in components(pipe).values():
        model.to(torch.bfloat16)
    base = outputs(components(pipe), torch.bfloat16)
    AdapterStack(pipe, "SD1").set([(adapter, 1.0)])
    actual = outputs(components(pipe), torch.bfloat16)
    expected = outputs(merged(source("SD1"), (layers, 1.0)))
    for name, value in expected.items():
        assert actual[name].dtype is torch.bfloat16
        error, effect = (actual[name] - value).norm() / value.norm(), (value - base[name]).norm() / value.norm()
        assert error < 0.03 < 0.3 < effect, f"{name}: {error:.3f} against {effect:.3f}"  # bf16 has 8 bits


def test_a_moved_model_takes_its_adapter_along(tmp_path):
    layers = random_layers(source("SD1"), only=UNET)
    pipe = fresh()
    AdapterStack(pipe, "SD1").set([(read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers)), 1.0)])
    pipe.unet.double()
    outputs({"unet": pipe.unet}, torch.float64)
    pipe.unet.float()
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")


def test_offloaded_weights_make_no_difference(tmp_path):
    """Sequential offloading keeps weights on the meta device between calls, and replaces every forward."""
    layers = random_layers(source("SD1"), targets=EVERYTHING)
    pipe = fresh()
    for model in components(pipe).values():
        cpu_offload(model, execution_device=torch.device("cpu"))
    stack = AdapterStack(pipe, "SD1")
    stack.set([(read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers)), 1.0)])
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")
    stack.clear()
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))


def test_compiled_blocks_notice_every_change(tmp_path):
    layers = random_layers(source("SD1"), only=UNET, targets="mid_block.*" + LINEAR)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers))
    pipe = fresh()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager", fullgraph=True)
    outputs(components(pipe))
    stack = AdapterStack(pipe, "SD1")
    stack.set([(adapter, 1.0)])
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")
    stack.clear()
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("made_for", FAMILIES)
@pytest.mark.parametrize("dialect", ["diffusers", "peft", "kohya"])
def test_families(dialect, made_for, model, tmp_path):
    """Each format, made for each family, on each model: attached where it belongs, else refused in one line."""
    layers = random_layers(source(made_for))
    if dialect == "diffusers":
        path = adapters.write_diffusers(tmp_path / "x", layers)
    elif dialect == "peft":
        path = adapters.write_peft(tmp_path / "x", source(made_for), layers)
    else:
        metadata = {"ss_base_model_version": KOHYA_VERSION[made_for]}
        path = adapters.write_kohya(tmp_path / "x.safetensors", layers, sgm=made_for == "SDXL", metadata=metadata)
    if made_for == model:
        assert AdapterStack(source(model), model).match(read_adapter(path)).family == model
        return
    error = refusal(path, AdapterStack(source(model), model))
    assert error.exit_code is ExitCode.REFUSED
    if dialect == "kohya" or (dialect, made_for) == (
        "diffusers",
        "SDXL",
    ):  # the others carry no sign of it in these tiny shapes
        assert f"LoRA x is for {made_for}, the model is {model}" in str(error)


def test_report_line(tmp_path):
    layers = random_layers(source("SD1"), alpha=1.0)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "dog.safetensors", layers))
    report = AdapterStack(source("SD1"), "SD1").match(adapter)
    text = sum(layer.component == "text_encoder" for layer in layers)
    assert text == 18, "three layers of six modules"
    assert report.line() == (
        f"LoRA dog: SD1, kohya, rank 4, alpha 1, {len(layers)}/{len(layers)} layers (unet {len(layers) - 18}, text encoder 18)"
    )


def test_a_partial_match_is_refused_unless_allowed(tmp_path):
    layers = random_layers(source("SD1"))
    path = adapters.write_kohya(tmp_path / "x.safetensors", layers)
    stranger = "lora_unet_down_blocks_9_attentions_0_proj_in"
    extra = {f"{stranger}.lora_down.weight": torch.ones(4, 8), f"{stranger}.lora_up.weight": torch.ones(8, 4)}
    save_file({**load_file(path), **extra}, path)
    pipe = fresh()
    stack = AdapterStack(pipe, "SD1")
    assert f"only {len(layers)} of its {len(layers) + 1} layers" in str(refusal(path, stack))
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))
    [report] = stack.set([(read_adapter(path), 1.0)], allow_partial=True)
    assert report.unmatched == ("unet: down_blocks_9_attentions_0_proj_in",)
    assert f"{len(layers)}/{len(layers) + 1} layers" in report.line()
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")


def test_a_missing_text_encoder_is_a_partial_match(tmp_path):
    path = adapters.write_kohya(tmp_path / "x.safetensors", random_layers(source("SD1")))
    pipe = fresh()
    pipe.text_encoder = None
    stack = AdapterStack(pipe, "SD1")
    assert "text_encoder: text_model_encoder_layers_0" in str(refusal(path, stack))
    assert set(stack.set([(read_adapter(path), 1.0)], allow_partial=True)[0].per_component) == {"unet"}


# --- DoRA ---


@pytest.mark.parametrize("axis", [0, 1])
def test_a_dora_of_any_weight_and_beside_others_goes_part_of_the_way(axis, tmp_path):
    """W + w * (W' - W), and several adapters add their changes of the same W."""
    dora = random_layers(source("SD1"), rank=4, alpha=8.0, seed=1, targets=EVERYTHING, dora=axis)
    other = random_layers(source("SD1"), rank=3, alpha=2.0, seed=3, only=UNET, targets=EVERYTHING, dora=0)
    plain = random_layers(source("SD1"), rank=2, alpha=1.0, seed=2, targets=LINEAR)
    weighted = [(dora, 0.7), (plain, -0.6), (other, 1.4)]
    read = [
        (read_adapter(adapters.write_kohya(tmp_path / f"{i}.safetensors", layers)), w) for i, (layers, w) in enumerate(weighted)
    ]
    pipe = fresh()
    weights = copy.deepcopy({name: model.state_dict() for name, model in components(pipe).items()})
    stack = AdapterStack(pipe, "SD1")
    stack.set(read)
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), *weighted)), "SD1")
    stack.set([])
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))
    for name, model in components(pipe).items():
        assert_identical(model.state_dict(), weights[name])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_dora_on_offloaded_weights(axis, tmp_path):
    layers = random_layers(source("SD1"), targets=EVERYTHING, dora=axis)
    pipe = fresh()
    for model in components(pipe).values():
        cpu_offload(model, execution_device=torch.device("cpu"))
    stack = AdapterStack(pipe, "SD1")
    stack.set([(read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers)), 1.0)])
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert_same(outputs(components(pipe)), outputs(merged(source("SD1"), (layers, 1.0))), "SD1")
    assert pipe.unet.conv_in.weight.device.type == "meta"
    stack.clear()
    assert_identical(outputs(components(pipe)), base_outputs("SD1"))


def test_a_dora_in_a_compiled_module_and_in_bf16(tmp_path):
    layers = random_layers(source("SD1"), only=UNET, targets="mid_block.*" + LINEAR, dora=0)
    adapter = read_adapter(adapters.write_kohya(tmp_path / "x.safetensors", layers))
    pipe = fresh()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].compile(backend="eager", fullgraph=True)
    stack = AdapterStack(pipe, "SD1")
    stack.set([(adapter, 1.0)])
    expected = outputs(merged(source("SD1"), (layers, 1.0)))["unet"]
    torch.testing.assert_close(outputs(components(pipe))["unet"], expected, atol=2e-5, rtol=2e-5)
    pipe.unet.to(torch.bfloat16)
    actual = outputs({"unet": pipe.unet}, torch.bfloat16)["unet"]
    assert (actual - expected).norm() < 0.2 * (base_outputs("SD1")["unet"] - expected).norm()


def test_a_dora_on_quantised_weights_is_refused_with_nothing_changed(tmp_path):
    layers = random_layers(source("SD1"), only=UNET, targets="mid_block.*" + LINEAR)
    plain = read_adapter(adapters.write_kohya(tmp_path / "plain.safetensors", layers))
    dora = random_layers(source("SD1"), only=UNET, targets="mid_block.*" + LINEAR, dora=0)
    pipe = fresh()
    stack = AdapterStack(pipe, "SD1")
    stack.set([(plain, 1.0)])
    before = outputs(components(pipe))
    module = pipe.unet.mid_block.attentions[0].proj_out
    kept, module.weight = module.weight, torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert "quantised" in str(refusal(adapters.write_kohya(tmp_path / "dora.safetensors", dora), stack))
    module.weight = kept
    assert_identical(outputs(components(pipe)), before)
