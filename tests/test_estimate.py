"""The estimate against what a run does: the same model, device, precision, adapters and refusals, and no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from src import devices
from src.config import AppConfig, load_config
from src.errors import ExitCode, UserError
from src.estimate import Answer, estimate
from src.measured_peaks import MeasuredPeaks, peak_key
from src.memory_plan import WINDOWS_RESERVE_BYTES
from src.memory_prediction import GIB, PLANS, Request, predict
from src.model_shapes import bundled_shapes
from src.request import LoraChoice, PictureRequest
from src.unet_weights import ELEMENT_BYTES
from tests.tiny.model_folders import model, safetensors

CARDS = [devices.Card("NVIDIA One", 8 * GIB, 7 * GIB, 0), devices.Card("NVIDIA Two", 24 * GIB, 20 * GIB, 1)]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine as described: cards, Apple's GPU, main memory; the working folder is empty, and so is every cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def describe(cards=(), apple=False, total_gib=16, free_gib=12, bf16=False) -> None:
        answers = {
            "detect_cards": list(cards), "has_apple_gpu": apple, "cpu_has_bf16": bf16,
            "total_memory_bytes": total_gib * GIB, "available_memory_bytes": None if apple else int(free_gib * GIB),
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(devices, name, lambda answer=answer: answer)

    describe()
    return describe


def ask(preset: str = "sd15", loras: tuple = (), prompt: str = "-", **settings: object) -> Answer:
    """The estimate for a preset with settings of any section, such as ``device="cpu"``, ``max_vram_gb=4.0``, ``width=768``."""
    config = load_config(preset)
    for name, value in settings.items():
        next(
            setattr(part, name, value) for part in (config.model, config.optimization, config.generation) if hasattr(part, name)
        )
    return estimate(config, PictureRequest.from_config(config.generation, prompt, loras=loras))


def refusal(code: ExitCode, *arguments: object, **settings: object) -> str:
    with pytest.raises(UserError) as raised:
        ask(*arguments, **settings)
    assert raised.value.exit_code == code, raised.value
    assert "\n" not in str(raised.value)
    return str(raised.value)


# -- device and precision


def test_without_a_card_it_is_the_cpu(machine):
    answer = ask(enable_sequential_cpu_offload=True)
    assert (answer.plan.placement.name, answer.plan.budget_bytes, answer.plan.fits) == ("cpu", None, True)
    assert answer.request.precision == "fp32"
    assert "CPU, 12.0 of 16.0 GiB of memory free" in answer.text()
    assert "note: sequential CPU offload has no effect without a card" in answer.text()
    assert "add --max-vram" in answer.text()
    machine(bf16=True)
    assert ask().request.precision == "bf16"


def test_a_cpu_that_is_too_small_may_swap(machine):
    machine(free_gib=2)
    answer = ask()
    assert not answer.plan.fits
    assert f"needs {answer.plan.estimate.peak_bytes / GIB:.2f} of 2.00 GiB of free memory; may swap" in answer.text()


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_the_card_that_is_named_is_planned_for(machine, device, index):
    machine(CARDS)
    answer = ask(device=device)
    assert (answer.plan.budget_bytes, answer.request.precision) == (CARDS[index].free_bytes, "fp16")
    assert CARDS[index].name in answer.text()


def test_a_cap_lowers_what_a_card_has_and_never_raises_it(machine):
    machine(CARDS)
    assert ask(max_vram_gb=3.0).plan.budget_bytes == 3 * GIB
    assert ask(max_vram_gb=80.0).plan.budget_bytes == CARDS[0].free_bytes


def test_on_windows_a_reserve_stays_free(machine, monkeypatch):
    machine(CARDS)
    monkeypatch.setattr(sys, "platform", "win32")
    answer = ask()
    assert answer.plan.budget_bytes == CARDS[0].free_bytes - WINDOWS_RESERVE_BYTES
    assert "of which 0.6 are left to Windows" in answer.text()
    assert ask(max_vram_gb=3.0).plan.budget_bytes == 3 * GIB


def test_what_a_run_measured_is_answered(machine, tmp_path):
    machine(CARDS)
    plain = ask()
    key = peak_key("NVIDIA One", plain.model, bundled_shapes("sd15"), plain.request, "txt2img", load_config("sd15"))
    MeasuredPeaks(tmp_path / "models" / "cache").remember(key, "gpu", 4 * GIB)
    answer = ask()
    assert (answer.plan.peak_bytes, answer.plan.estimate) == (4 * GIB, plain.plan.estimate)
    assert "measured peak 4.00 GiB of 7.00 GiB" in answer.text()
    facts = answer.as_json()
    assert (facts["measured_peak_bytes"], facts["plans"][0]["is_measured"], facts["plans"][1]["is_measured"]) == (
        4 * GIB,
        True,
        False,
    )
    assert ask(width=256).as_json()["measured_peak_bytes"] is None


def test_a_card_that_is_not_here_can_be_planned_for(machine):
    answer = ask(max_vram_gb=6.0)
    assert (answer.plan.budget_bytes, answer.request.precision) == (6 * GIB, "fp16")
    assert ask(max_vram_gb=6.0, device="cpu").plan.budget_bytes is None


@pytest.mark.parametrize("device", ["auto", "mps"])
def test_a_mac_is_a_card_with_two_thirds_of_the_memory(machine, device):
    machine(apple=True, total_gib=24)
    answer = ask(device=device)
    assert (answer.plan.budget_bytes, answer.request.precision) == (16 * GIB, "fp16")
    assert "two thirds of 24.0 GiB" in answer.text()
    assert ask(device=device, max_vram_gb=4.0).plan.budget_bytes == 4 * GIB


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "device 'cuda' cannot be used"),
        ({"device": "cuda:1"}, "device 'cuda:1' cannot be used"),
        ({"device": "mps"}, "only on Macs"),
        ({"device": "gpu"}, "device 'gpu' is not known"),
        ({"precision": "fp16"}, "needs a graphics card"),
        ({"precision": "int8"}, "precision 'int8' is not known"),
        ({"max_vram_gb": 0.0}, "--max-vram 0"),
        ({"max_vram_gb": float("nan")}, "--max-vram nan"),
        ({"enable_model_cpu_offload": True, "enable_sequential_cpu_offload": True}, "exclude each other"),
    ],
)
def test_what_a_run_refuses_is_refused(machine, settings, said):
    assert said in refusal(ExitCode.USAGE, **settings)


def test_a_card_that_is_not_there_is_refused_beside_others(machine):
    machine(CARDS)
    assert "cuda:0 to cuda:1" in refusal(ExitCode.USAGE, device="cuda:2")


# -- model, VAE and adapters


def test_sizes_come_from_the_model_unless_they_are_given(machine):
    assert "768x768" in ask("sd21").text()
    assert "512x768" in ask("sd21", width=512).text()
    assert "128x128" in ask("embedded").text()


def test_the_size_follows_the_picture_that_is_drawn_over(machine, tmp_path):
    Image.new("RGB", (768, 512)).save(tmp_path / "start.png")
    config = load_config("sd15")
    start = {"init_image": tmp_path / "start.png"}
    assert "768x512" in estimate(config, PictureRequest.from_config(config.generation, "-", **start)).text()
    assert "640x512" in estimate(config, PictureRequest.from_config(config.generation, "-", width=640, **start)).text()


def test_a_model_on_disk_is_checked_as_in_a_run(machine, tmp_path):
    assert "no such file or folder" in refusal(ExitCode.NOT_FOUND, model_id="./typo")
    assert ask(offline=True).model == "stable-diffusion-v1-5/stable-diffusion-v1-5"  # its shapes are bundled
    assert "not bundled" in refusal(ExitCode.NOT_FOUND, model_id="someone/else")
    (model(tmp_path / "broken") / "unet" / "config.json").unlink()
    assert "'unet' has no config.json" in refusal(ExitCode.NOT_FOUND, model_id="broken")
    safetensors(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": (4, 8)})
    assert "load it with --lora" in refusal(ExitCode.REFUSED, model_id="lora.safetensors")


def test_a_vae_that_does_without_fp32_is_planned_so(machine, tmp_path):
    machine(CARDS)
    own = dict(bundled_shapes("sdxl").vae)
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "config.json").write_text(json.dumps(own | {"force_upcast": False}))
    (tmp_path / "fixed" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    before, after = (ask("sdxl", **more).plan.estimate.decode for more in ({}, {"vae": str(tmp_path / "fixed")}))
    assert after.weights_bytes == before.weights_bytes or after.activations_bytes < before.activations_bytes
    assert after.activations_bytes == pytest.approx(before.activations_bytes / 2, rel=0.02)


def test_a_vae_is_checked_as_in_a_run(machine, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "no such file or folder" in refusal(ExitCode.NOT_FOUND, vae="./nothing")
    assert "has no config.json" in refusal(ExitCode.NOT_FOUND, vae="empty")
    assert "not a .safetensors file" in refusal(ExitCode.REFUSED, vae="text.safetensors")
    assert "pickle" in refusal(ExitCode.REFUSED, vae="vae.ckpt")


def test_adapters_are_counted_in_the_precision_of_the_run(machine, tmp_path):
    shapes = {"lora_unet_a.lora_down.weight": (4, 320), "lora_unet_a.lora_up.weight": (320, 4)}
    safetensors(tmp_path / "one.safetensors", shapes)
    (tmp_path / "models" / "lora" / "two").mkdir(parents=True)
    safetensors(tmp_path / "models" / "lora" / "two" / "pytorch_lora_weights.safetensors", shapes)
    one = LoraChoice(tmp_path / "one.safetensors")
    for precision in ("fp32", "bf16"):
        answer = ask(loras=(one,), prompt="a cat <lora:two:0.5>", precision=precision)
        assert answer.request.lora_bytes == 2 * (2 * 4 * 320) * ELEMENT_BYTES[precision]


def test_of_adapters_that_wildcards_choose_the_largest_choice_is_counted(machine, tmp_path):
    (tmp_path / "models" / "lora").mkdir(parents=True)
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "style.txt").write_text("ink\nwash\n")
    for name, width in {"ink": 320, "wash": 640}.items():
        shapes = {"lora_unet_a.lora_down.weight": (4, width), "lora_unet_a.lora_up.weight": (width, 4)}
        safetensors(tmp_path / "models" / "lora" / f"{name}.safetensors", shapes)
    for prompt in ("a cat <lora:__style__:0.5>", "a cat {<lora:ink>|<lora:wash>}"):
        answer = ask(prompt=prompt, seed=7, num_images=8, precision="fp32")
        assert answer.request.lora_bytes == 2 * 4 * 640 * ELEMENT_BYTES["fp32"]


def test_of_a_folder_with_several_forms_one_is_counted(machine, tmp_path):
    """A training's folder holds the same adapter for diffusers, PEFT and kohya, and may hold what is none."""
    shapes = {"lora_unet_a.lora_down.weight": (4, 320), "lora_unet_a.lora_up.weight": (320, 4)}
    (tmp_path / "final" / "peft").mkdir(parents=True)
    for name in ("pytorch_lora_weights", "final_kohya", "peft/adapter_model"):
        safetensors(tmp_path / "final" / f"{name}.safetensors", shapes)
    safetensors(tmp_path / "final" / "state.safetensors", {"exp_avg": (4, 320)})
    for name in ("final", "final/pytorch_lora_weights.safetensors"):
        answer = ask(loras=(LoraChoice(tmp_path / name), LoraChoice(tmp_path / "final" / ".." / name)), precision="fp32")
        assert answer.request.lora_bytes == 2 * 4 * 320 * ELEMENT_BYTES["fp32"]
    (tmp_path / "final" / "peft" / "adapter_config.json").write_text("{}")
    assert ask(loras=(LoraChoice(tmp_path / "final" / "peft"),), precision="fp32").request.lora_bytes == 2 * 4 * 320 * 4


def test_what_is_no_adapter_is_refused(machine, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.safetensors").write_text("<html>")
    safetensors(tmp_path / "unet.safetensors", {"down_blocks.0.weight": (4, 8)})
    for code, name, said in [
        (ExitCode.NOT_FOUND, "nothing.safetensors", "not found"),
        (ExitCode.NOT_FOUND, "empty", "holds no .safetensors file"),
        (ExitCode.REFUSED, "page.safetensors", "web page"),
        (ExitCode.REFUSED, "unet.safetensors", "no LoRA format"),
        (ExitCode.REFUSED, "x.ckpt", "pickle"),
    ]:
        assert said in refusal(code, loras=(LoraChoice(tmp_path / name),))
    assert "ghost" in refusal(ExitCode.NOT_FOUND, prompt="a cat <lora:ghost>")


# -- what is answered


def test_json_and_text_say_the_same(machine):
    machine(CARDS)
    answer = ask("sdxl", max_vram_gb=6.0, num_images=4, batch_size=2)
    facts = json.loads(json.dumps(answer.as_json(), allow_nan=False))
    expected = predict(bundled_shapes("sdxl"), Request(1024, 1024, batch_size=2), PLANS[3])
    assert (facts["plan"], facts["fits"], facts["budget_bytes"]) == ("model-offload+vae-tiling", True, 6 * GIB)
    assert facts["predicted_peak_bytes"] == expected.peak_bytes == max(phase["total_bytes"] for phase in facts["phases"])
    assert [phase["weights_bytes"] for phase in facts["phases"]] == [phase.weights_bytes for phase in expected.phases]
    assert [item["name"] for item in facts["plans"]] == [plan.name for plan in PLANS[:-1]]
    assert [item["fits"] for item in facts["plans"]] == [item["peak_bytes"] <= 6 * GIB for item in facts["plans"]]
    assert (facts["width"], facts["height"], facts["batch_size"], facts["guidance"]) == (1024, 1024, 2, True)
    for fact in ("1024x1024, batch size 2, guidance on", "(SDXL), fp16", f"{expected.peak_bytes / GIB:.2f} GiB of 6.00 GiB"):
        assert fact in answer.text()
    machine()
    assert ask().as_json()["budget_bytes"] is None


def test_a_disabled_safety_checker_is_not_counted(machine):
    checked, unchecked = (ask(disable_safety_checker=disabled).plan.estimate.peak_bytes for disabled in (False, True))
    assert checked - unchecked == 4 * bundled_shapes("sd15").parameters["safety_checker"]


def test_the_default_configuration_is_answered(machine):
    assert estimate(AppConfig(), PictureRequest(prompt="-")).as_json()["model"] == AppConfig().model.model_id
    assert Path("models").exists() is False  # nothing is made by asking
