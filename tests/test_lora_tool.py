"""``python -m src.lora``: from files to files, by way of its door."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.lora.__main__ import main
from src.lora.reading import read_adapter
from src.lora.stack import AdapterStack
from src.lora.writing import AdapterFacts, adapter_files
from tests.test_lora_writing import ours, put
from tests.tiny import adapters
from tests.tiny.adapters import ATTENTION, assert_same, components, fresh, merged, outputs, random_layers, source

ROOT = Path(__file__).parent.parent
UNET = ("unet",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dog (kohya, SDXL), style (diffusers, SDXL), sd1 (PEFT), dora (kohya)."""
    to = tmp_path_factory.mktemp("adapters")
    trigger = {"dog": "sks dog", "style": "ink"}
    made = {
        "dog": ("SDXL", "kohya", {"rank": 6, "alpha": 3.0, "seed": 1}), "style": ("SDXL", "diffusers", {"rank": 2, "seed": 2, "only": UNET}),
        "sd1": ("SD1", "peft", {"targets": ATTENTION}), "dora": ("SD1", "kohya", {"targets": ATTENTION, "dora": 0}),
    }  # fmt: skip
    for name, (family, form, choice) in made.items():
        extra = {"ss_seed": "5"} | ({"ss_zero_terminal_snr": "True"} if name == "style" else {})
        facts = AdapterFacts(family, name, trigger=trigger.get(name), resolution_px=640, base_model="mine", extra=extra)
        put(to / name, adapter_files(ours(random_layers(source(family), **choice)), facts, [form]))
    adapters.write_kohya(to / "bare.safetensors", random_layers(source("SD1"), targets=ATTENTION))
    return to


@pytest.fixture
def run(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)

    def go(line):
        code = main(line.replace("OUT", str(tmp_path)).split())
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return go


def drawn(path, family):
    pipe = fresh(family)
    AdapterStack(pipe, family).set([(read_adapter(path), 1.0)])
    return outputs(components(pipe))


def test_convert_keeps_the_adapter_and_what_is_known_of_it(run, tmp_path):
    code, out, _ = run("convert dog --to peft --output OUT/peft")
    assert (code, out.startswith(f"{tmp_path}/peft  peft, SDXL, rank 6")) == (0, True)
    assert run("convert OUT/peft --to diffusers --output OUT/x.safetensors --name Rex")[0] == 0
    assert run("convert OUT/x.safetensors --to kohya --output OUT/kohya/y.safetensors")[0] == 0
    dog = random_layers(source("SDXL"), rank=6, alpha=3.0, seed=1)
    assert_same(drawn(tmp_path / "kohya" / "y.safetensors", "SDXL"), outputs(merged(source("SDXL"), (dog, 1.0))), "SDXL")
    said = json.loads(run("info OUT/kohya/y.safetensors --json")[1])
    assert (said["name"], said["trigger"], said["resolution"], said["base_model"]) == ("Rex", "sks dog", "640x640", "mine")
    assert said["header"]["ss_seed"] == "5"
    assert said["alphas"] == {"6": sum(said["components"].values())}, "folded on the way through diffusers' form"


def test_merge_is_the_weighted_sum(run, tmp_path):
    assert run("merge --output OUT/sum.safetensors dog:0.8 style:-0.5 --to kohya")[0] == 0
    dog, style = (
        random_layers(source("SDXL"), rank=6, alpha=3.0, seed=1),
        random_layers(source("SDXL"), rank=2, seed=2, only=UNET),
    )
    expected = outputs(merged(source("SDXL"), (dog, 0.8), (style, -0.5)))
    assert_same(drawn(tmp_path / "sum.safetensors", "SDXL"), expected, "SDXL")
    said = json.loads(run("info OUT/sum.safetensors --json")[1])
    assert (said["trigger"], said["header"]["modelspec.merged_from"]) == ("sks dog, ink", "dog:0.8, style:-0.5")
    assert list(said["ranks"]) == ["6", "8"]
    assert said["header"]["ss_zero_terminal_snr"] == "True", "one of them was learnt so, and is to be drawn so"
    assert run("merge dog:0.8 style:-0.5 --rank 2 --output OUT/two.safetensors --precision fp16")[0] == 0
    assert {tuple(layer.down.shape[:1]) for layer in read_adapter(tmp_path / "two.safetensors").layers.values()} == {(2,)}


def test_resize_says_what_it_keeps(run, tmp_path):
    code, out, _ = run("resize dog --rank 2 --output OUT/small.safetensors")
    kept = float(re.search(r"rank 2 keeps ([\d.]+)% of the energy", out)[1]) / 100
    before = {where: layer.scale * layer.up @ layer.down for where, layer in read_adapter(Path("dog")).layers.items()}
    total = best = 0.0
    for where, layer in read_adapter(tmp_path / "small.safetensors").layers.items():
        values = torch.linalg.svdvals(before[where].double())
        total, best = total + float(values.square().sum()), best + float(values[:2].square().sum())
        torch.testing.assert_close(
            (layer.scale * layer.up @ layer.down).norm(), values[:2].norm().float(), rtol=1e-4, atol=1e-6
        )
    assert code == 0
    assert kept == pytest.approx(best / total, abs=1e-4)


def test_resize_to_a_higher_rank_says_that_nothing_was_cut(run):
    assert run("resize dog --rank 64 --output OUT/same.safetensors")[1].startswith("rank 64 cuts nothing: no layer has more\n")


def test_the_folder_of_a_training_is_told_from_its_checkpoints(run, tmp_path):
    for name in ("final", "checkpoint-10"):
        assert run(f"convert dog --to diffusers --output OUT/lora/{name}")[0] == 0
    code, _, error = run("info OUT/lora")
    assert code == 4
    assert error.endswith("name one of its folders: checkpoint-10, final\n")


def test_a_dora_for_other_programs_comes_with_a_note(run):
    assert "A1111 computes such a DoRA otherwise" in run("convert dora --to kohya --output OUT/x.safetensors")[1]
    assert "note" not in run("convert dora --to peft --output OUT/x")[1]


def test_info(run, folder):
    code, out, _ = run("info sd1")
    assert code == 0
    assert {"  form     peft, LoRA, fp32, " + re.search(r"fp32, (.+)", out)[1], "  rank     4", "  alpha    8"} <= set(
        out.splitlines()
    )
    assert "unet 48, text_encoder 12" in out
    assert "  form     kohya, DoRA, fp32" in run("info dora")[1]
    norms = json.loads(run("info dog --norms --json")[1])["norms"]
    mine = [
        layer
        for layer in random_layers(source("SDXL"), rank=6, alpha=3.0, seed=1)
        if layer.module.startswith("mid_block.attentions")
    ]
    expected = sum(float(layer.difference().square().sum()) for layer in mine) ** 0.5
    assert norms["unet mid_block.attentions"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_info_reads_alphas_of_any_type_without_torch(dtype, tmp_path):
    file = adapters.write_kohya(tmp_path / "x.safetensors", random_layers(source("SD1"), targets=ATTENTION))
    tensors = {name: value.to(dtype) if name.endswith(".alpha") else value for name, value in load_file(file).items()}
    first = next(name for name in tensors if name.endswith(".alpha"))
    save_file({**tensors, first: torch.tensor([3]).to(dtype)}, file)
    script = f"import sys; from src.lora.__main__ import main; main(['info', {str(file)!r}, '--json']); assert 'torch' not in sys.modules"
    said = json.loads(
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    )
    assert said["alphas"] == {"3": 1, "8": 59}


def test_help_names_every_flag_and_needs_no_torch():
    script = "import sys; from src.lora.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True)
    assert all(flag in done.stdout for flag in ("--output", "--to", "--rank", "--precision", "--family", "--force", "--norms"))


def test_nothing_is_overwritten_unless_forced(run, tmp_path):
    assert run("convert dog --to kohya --output OUT/x.safetensors")[0] == 0
    before = (tmp_path / "x.safetensors").read_bytes()
    code, _, err = run("resize dog --rank 1 --output OUT/x.safetensors")
    assert (code, "--force replaces it" in err, (tmp_path / "x.safetensors").read_bytes() == before) == (2, True, True)
    assert run("resize dog --rank 1 --output OUT/x.safetensors --force")[0] == 0
    assert (tmp_path / "x.safetensors").read_bytes() != before


def test_a_folder_means_the_new_adapter_alone(run, tmp_path):
    """PEFT's folders of a U-Net and its text encoder, and diffusers' file, give way to a U-Net alone; the rest stays."""
    unet = random_layers(source("SD1"), targets=ATTENTION, seed=7, only=UNET)
    put(tmp_path / "unet", adapter_files(ours(unet), AdapterFacts("SD1", "unet"), ["peft"]))
    out = tmp_path / "out"
    assert run("convert sd1 --to peft --output OUT/out")[0] == 0
    (out / "text_encoder_one_lora" / "README.md").write_text("mine")
    (out / "notes.safetensors").write_bytes(b"mine")
    (out / "unet_lora" / "adapter_config.json").unlink()  # what is left of the text encoder alone is in the way, too
    (out / "unet_lora" / "adapter_model.safetensors").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, err = run("convert OUT/unet --to peft --output OUT/out")
    assert (code, "--force replaces it" in err) == (2, True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    put(out, adapter_files(ours(random_layers(source("SD1"), targets=ATTENTION)), AdapterFacts("SD1", "old"), ["diffusers"]))
    assert run("convert OUT/unet --to peft --output OUT/out --force")[0] == 0
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "unet_lora/adapter_config.json", "unet_lora/adapter_model.safetensors", "text_encoder_one_lora/README.md", "notes.safetensors",
    }  # fmt: skip
    adapter = read_adapter(out)
    assert (adapter.format, {component for component, _ in adapter.layers}) == ("peft", {"unet"})


WRONG = {
    "": (0, ""),
    "inf dog": (2, "'inf' is no command; the first word is info, convert, merge or resize"),
    "info": (2, "give one adapter"),
    "info dog style": (2, "give one adapter"),
    "info nowhere": (4, "not found"),
    "convert dog --output OUT/y": (2, "--to is missing"),
    "convert dog --to kohya": (2, "--output is missing"),
    "convert dog --to zip --output OUT/y": (2, "choose diffusers, peft or kohya"),
    "convert dog --to peft --output OUT/y.safetensors": (2, "name a folder"),
    "convert dog --to kohya --output OUT/pytorch_lora_weights.safetensors": (2, "belongs to diffusers' form"),
    "convert dog --to kohya --output OUT/y --family SD1": (6, "is for SDXL, not SD1"),
    "convert dog --to kohya --rank 3 --output OUT/y": (2, "convert keeps the rank"),
    "resize dog --output OUT/y": (2, "--rank is missing"),
    "resize dog --rank 0 --output OUT/y": (2, "take 1 to 1024"),
    "resize dog --rank x --output OUT/y": (2, "expected a whole number"),
    "resize dora --rank 2 --output OUT/y": (6, "is a DoRA"),
    "merge dog sd1 --family SD1 --output OUT/y": (6, "is for SDXL, not SD1"),
    "merge dog:x --output OUT/y": (2, "the weight 'x' is no number"),
    "merge bare.safetensors --output OUT/y": (2, "does not tell which family it is for"),
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(line, run, tmp_path):
    code, says = WRONG[line]
    got, _, err = run(line)
    assert (got, err.count("\n")) == (code, bool(says))
    assert says in err
    assert not any(tmp_path.iterdir())
