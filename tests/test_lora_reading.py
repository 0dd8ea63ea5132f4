"""Adapter files that are damaged, hostile, of another kind, hard to find or not there: one line each, never a traceback."""

import hashlib
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.errors import ExitCode, UserError
from src.lora.reading import read_adapter
from src.lora.stack import AdapterStack
from tests.tiny import adapters
from tests.tiny.adapters import fresh, random_layers, source

UNET = ("unet",)


def refusal(path, stack=None):
    def use() -> None:
        adapter = read_adapter(path)
        stack.match(adapter)

    with pytest.raises(UserError) as caught:
        use()
    assert "\n" not in str(caught.value)
    return caught.value


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
    "DoRA": (extra(".dora_scale"), "lengths of shape (4,), which fit no weight"),
    "DoRA, peft": (extra(".lora_magnitude_vector.weight"), "lengths of shape (4,), which fit no weight"),
    "DoRA alone": (extra("x.dora_scale"), "without its counterpart"),
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
def test_a_spoiled_adapter_is_refused_in_one_line_that_says_why(case, tmp_path):
    spoil, says = SPOILED[case]
    path = adapters.write_kohya(tmp_path / "x.safetensors", random_layers(source("SD1"), only=("text_encoder",)))
    tensors = load_file(path)
    spoil(tensors, "lora_te_text_model_encoder_layers_1_self_attn_q_proj")
    save_file(tensors, path)
    error = refusal(path, AdapterStack(source("SD1"), "SD1"))
    assert says in str(error)
    assert error.exit_code is ExitCode.REFUSED


PEFT_SPOILED = {
    "DoRA": ({"use_dora": True}, "has no lengths"),
    "LoHa": ({"peft_type": "LOHA"}, "kind 'LOHA'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
    "alpha text": ({"lora_alpha": "8"}, "must be a positive number"),
    "alpha huge": ({"lora_alpha": 10**400}, "must be a positive number"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 3}}, "is a regular expression"),
    "pattern list": ({"alpha_pattern": [1]}, "no table"),
}


@pytest.mark.parametrize("case", PEFT_SPOILED)
def test_peft_settings_that_mean_something_else_are_refused(case, tmp_path):
    settings, says = PEFT_SPOILED[case]
    adapters.write_peft(tmp_path / "x", source("SD1"), random_layers(source("SD1"), only=UNET), **settings)
    assert says in str(refusal(tmp_path / "x"))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800", " " * (2**20 + 1)])
def test_damaged_settings_are_refused(text, tmp_path):
    adapters.write_peft(tmp_path / "x", source("SD1"), random_layers(source("SD1"), only=UNET))
    (tmp_path / "x" / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(tmp_path / "x").exit_code is ExitCode.REFUSED


# --- finding files ---


def test_what_a_path_may_be(tmp_path):
    layers = random_layers(source("SD1"), only=UNET)
    file = adapters.write_kohya(tmp_path / "dog.safetensors", layers)
    adapters.write_peft(tmp_path / "cat", source("SD1"), layers)
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


def test_what_is_not_there_or_not_clear(tmp_path):
    layers = random_layers(source("SD1"), only=UNET)
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
    adapters.write_peft(tmp_path / "peft", source("SD1"), layers)
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    assert "can run code" in str(refusal(tmp_path / "peft"))
    three = adapters.write_peft(
        tmp_path / "three" / "text_encoder_lora", source("SD1"), random_layers(source("SD1")), "text_encoder"
    )
    adapters.write_peft(three.parent / "text_encoder", source("SD1"), random_layers(source("SD1")), "text_encoder")
    assert "two adapters for the text_encoder" in str(refusal(three.parent))


def test_sha256_is_the_files_or_that_of_its_sorted_hashes(tmp_path):
    layers = random_layers(source("SD1"), only=UNET)
    file = adapters.write_kohya(tmp_path / "dog.safetensors", layers)
    assert read_adapter(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    folder = adapters.write_peft(tmp_path / "cat", source("SD1"), layers)
    parts = sorted(hashlib.sha256(part.read_bytes()).hexdigest() for part in folder.iterdir())
    assert read_adapter(folder).sha256 == hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_300_mutations_of_a_file_either_fit_or_are_refused(tmp_path):
    layers = random_layers(source("SD1"), only=("text_encoder",))
    sound = adapters.write_kohya(tmp_path / "x.safetensors", layers, metadata={"ss_base_model_version": "sd_v1"}).read_bytes()
    header_end = 8 + int.from_bytes(sound[:8], "little")
    stack = AdapterStack(fresh(), "SD1")
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
