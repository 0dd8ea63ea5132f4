"""The predicted memory of a training against real training steps, traced tensor by tensor; and the plans made of it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from src.config import PROJECT_FOLDER
from src.memory_plan import GIB
from src.model_shapes import bundled_shapes, encoder_activation_bytes
from src.train_arguments import build_run
from src.train_config import TrainConfig
from src.training import speed
from src.training.network import LoraNetwork
from src.training_memory import (
    TrainingNeed,
    adapter_numbers,
    predict,
    step_activation_bytes,
    text_activation_bytes,
)
from src.training_plan import choose, describe, estimate
from src.unet_weights import unet_bytes

MB = 1_000_000
CARDS = sorted((PROJECT_FOLDER / "configs" / "train").glob("*gb.yaml"))


class LiveBytes(TorchDispatchMode):
    """Follows every storage that is made under it until it dies, and remembers the most bytes alive at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class FusedAttention(torch.autograd.Function):
    """What a fused kernel on a card keeps; the meta device has none, and would write out the scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:3], device=query.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@pytest.fixture(autouse=True)
def meta_device(monkeypatch) -> None:
    """Neither fused attention nor autocast is known there."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value, *_, **__: FusedAttention.apply(query, key, value))  # fmt: skip
    monkeypatch.setattr(speed, "_is_autocast", lambda x: False)


def build(config: dict, train: TrainConfig) -> tuple[UNet2DConditionModel, LoraNetwork]:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).to(torch.bfloat16)
    network = LoraNetwork({"unet": unet}, train, computes_in=torch.bfloat16)
    network.models["unet"].to("meta")
    speed.exchange_layers(unet, torch.device("meta"), torch.bfloat16)
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train(), network


def trace_step(unet: UNet2DConditionModel, size: int, batch: int) -> int:
    dtype, added = torch.bfloat16, {}
    with torch.device("meta"):
        if unet.config.addition_embed_type:
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            added = {"text_embeds": torch.zeros(batch, pooled, dtype=dtype), "time_ids": torch.zeros(batch, 6, dtype=dtype)}
        latents, noise = torch.zeros(batch, 4, size, size, dtype=dtype), torch.zeros(batch, 4, size, size)
        text = torch.zeros(batch, 77, unet.config.cross_attention_dim, dtype=dtype)
        with LiveBytes(unet) as live:
            prediction = unet(latents, torch.zeros(batch), text, added_cond_kwargs=added, return_dict=False)[0]
            F.mse_loss(prediction.float(), noise).backward()
    return live.peak


CASES = [
    ("sd15", 512, 1, "attention", 4), ("sd15", 512, 4, "kohya", 64), ("sd15", 512, 1, "conv", 4), ("sd21", 768, 1, "attention", 4),
    ("sdxl", 1024, 1, "attention", 8), ("small-sd", 512, 2, "attention", 4),
    *(pytest.param("sdxl", 1024, 1, targets, 8, marks=pytest.mark.slow) for targets in ("kohya", "conv")),
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "px", "batch", "targets", "rank"), CASES)
def test_a_traced_training_step_needs_what_is_predicted(name, px, batch, targets, rank, checkpointing) -> None:
    shapes = bundled_shapes(name)
    unet, network = build(shapes.unet, TrainConfig(targets=targets, rank=rank, gradient_checkpointing=checkpointing))
    need = TrainingNeed(px, batch, rank, targets, gradient_checkpointing=checkpointing)
    assert adapter_numbers(shapes, need) == sum(parameter.numel() for parameter in network.trainable().values())
    predicted = step_activation_bytes(shapes.unet, (px // 8, px // 8), need)
    assert predicted == pytest.approx(trace_step(unet, px // 8, batch), rel=0.06)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "small-sd", "embedded"])
def test_quantised_weights_are_the_matrices_of_the_network(name) -> None:
    shapes = bundled_shapes(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(shapes.unet)
    matrices = sum(module.weight.numel() for module in unet.modules() if isinstance(module, nn.Linear))
    whole = 2 * sum(parameter.numel() for parameter in unet.parameters())
    assert unet_bytes(shapes, "bf16", None) == whole
    assert unet_bytes(shapes, "bf16", "nf4") == pytest.approx(whole - matrices * (2 - 0.5625), abs=1)
    rows = sum(module.out_features for module in unet.modules() if isinstance(module, nn.Linear))
    assert unet_bytes(shapes, "bf16", "int8") == whole - matrices + 4 * rows


@pytest.mark.parametrize(("name", "px"), [("sd15", 512), ("sdxl", 1024)])
def test_encoding_a_picture_needs_what_is_predicted(name, px) -> None:
    shapes = bundled_shapes(name)
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(shapes.vae).eval()
        with LiveBytes(vae) as live:
            vae.encode(torch.zeros(1, 3, px, px))
    predicted = encoder_activation_bytes(shapes.vae, (px // 8, px // 8), 4, workspace=False)
    assert predicted == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("targets", ["attention", "kohya"])
def test_text_encoders_that_learn_keep_what_is_predicted(targets) -> None:
    shapes = bundled_shapes("sdxl")
    need = TrainingNeed(1024, targets=targets, text_encoders=True, gradient_checkpointing=False)
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        models = {name: kinds[name](CLIPTextConfig(**shapes.text_encoders[name])).to(torch.bfloat16) for name in kinds}
        unet = UNet2DConditionModel.from_config(shapes.unet).to(torch.bfloat16)
    network = LoraNetwork(models | {"unet": unet}, TrainConfig(targets=targets), computes_in=torch.bfloat16)
    assert adapter_numbers(shapes, need) == sum(parameter.numel() for parameter in network.trainable().values())
    for name, model in models.items():
        model.to("meta").train()
        speed.exchange_layers(model, torch.device("meta"), torch.bfloat16)
        with torch.device("meta"), LiveBytes(model) as live:
            output = model(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
            (output.hidden_states[-2].sum() + output[0].sum()).backward()
        assert text_activation_bytes(shapes.text_encoders[name], need) == pytest.approx(live.peak, rel=0.12)


def test_checkpointing_is_chosen_only_where_it_is_needed() -> None:
    shapes, need = bundled_shapes("sdxl"), TrainingNeed(1024, rank=8)
    wide, narrow = choose(shapes, need, 16 * GIB), choose(shapes, need, 8 * GIB)
    assert (wide.need.gradient_checkpointing, narrow.need.gradient_checkpointing) == (False, True)
    assert wide.fits
    assert narrow.fits
    assert wide.peak_bytes > 8 * GIB
    forced = choose(shapes, TrainingNeed(1024, gradient_checkpointing=True), 80 * GIB)
    assert forced.need.gradient_checkpointing


def test_a_card_encodes_and_decodes_in_fp32_whatever_it_computes_in() -> None:
    shapes = bundled_shapes("sdxl")
    peaks = {kind: predict(shapes, TrainingNeed(1024, precision=kind, samples=True)) for kind in ("fp16", "bf16")}
    assert peaks["fp16"] == peaks["bf16"]
    on_cpu = predict(shapes, TrainingNeed(1024, precision="bf16"), on_card=False)
    assert on_cpu[0].weights_bytes < peaks["bf16"][0].weights_bytes


def test_samples_that_do_not_fit_are_no_reason_to_compute_twice() -> None:
    plan = choose(bundled_shapes("sd15"), TrainingNeed(512, samples=True), 3 * GIB)
    assert not plan.fits
    assert not plan.need.gradient_checkpointing
    assert "--no-samples" in plan.advice


def test_what_does_not_fit_says_which_switch_would() -> None:
    shapes = bundled_shapes("sdxl")
    plan = choose(shapes, TrainingNeed(1024, rank=8), 5 * GIB)
    assert not plan.fits
    assert plan.advice == ("--quantize int8", "--quantize nf4")
    assert "does not fit, --quantize int8 or --quantize nf4 would" in describe(plan)
    batch = choose(bundled_shapes("sd15"), TrainingNeed(512, batch_size=32), 3 * GIB)
    assert "--batch_size 1" in batch.advice
    hopeless = choose(shapes, TrainingNeed(1024, batch_size=4), GIB)
    assert not hopeless.fits
    assert "does not fit (--batch_size 1 and --quantize nf4 come to" in describe(hopeless)
    single = choose(shapes, TrainingNeed(256), GIB)
    assert "does not fit (--quantize nf4 comes to" in describe(single)


@pytest.mark.parametrize(
    ("model", "rank", "quantize", "gib"),
    [("sd15", 4, None, 4), ("sd15", 4, None, 3), ("sdxl", 8, None, 8), ("sdxl", 8, "int8", 6), ("sdxl", 8, "nf4", 6)],
)
def test_the_promised_trainings_fit(model, rank, quantize, gib) -> None:
    shapes = bundled_shapes(model)
    assert choose(shapes, TrainingNeed(shapes.native_px, rank=rank, precision="fp16", quantize=quantize), gib * GIB).fits


def test_more_of_anything_never_needs_less() -> None:
    shapes = bundled_shapes("sd15")
    base = {"resolution_px": 512, "gradient_checkpointing": False}

    def peak(**change: Any) -> int:
        return predict(shapes, TrainingNeed(**base | change))[1].total_bytes

    changes = [{"batch_size": 2}, {"resolution_px": 576}, {"rank": 64}, {"targets": "conv"}, {"use_dora": True}, {"ema": True},
               {"text_encoders": True}, {"precision": "fp32"}, {"optimizer": "prodigy"}]  # fmt: skip
    for change in changes:
        assert peak(**change) > peak(), change
    assert peak(optimizer="adafactor") < peak()
    assert peak(quantize="nf4") < peak(quantize="int8") < peak()
    assert peak(gradient_checkpointing=True) < peak()


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_each_card_setting_loads_and_fits(card) -> None:
    run = build_run({"config": [str(card)]})
    run.model.offline = True
    answer = estimate(run)
    assert f"{run.train.max_vram_gb:g}gb" in card.stem
    assert answer.plan.fits, answer.text()
    assert f"--config configs/train/{card.name}" in card.read_text(encoding="utf-8")
    assert build_run({"config": [str(card)], "set": ["train.rank=16"]}).train.rank == 16


def test_the_answer_says_the_same_to_people_and_programs() -> None:
    run = build_run({"model": "sdxl", "train.max_vram_gb": 8.0, "train.rank": 4, "train.sample_prompts": ("a dog",)})
    answer = estimate(run)
    facts = answer.as_json()
    assert facts["adapter_numbers"] == 5_806_080
    assert [phase["name"] for phase in facts["phases"]] == ["encode", "train", "samples"]
    assert facts["predicted_peak_bytes"] == max(phase["total_bytes"] for phase in facts["phases"])
    assert "gradient checkpointing, predicted peak" in answer.text()
    assert f"{facts['predicted_peak_bytes'] / GIB:.2f} of 8.00 GiB" in answer.text()
