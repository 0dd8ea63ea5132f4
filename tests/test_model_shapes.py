"""The plain-Python sizes against the real networks: parameter counts exactly, live activations within a few percent."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from src import model_shapes
from src.errors import ExitCode, UserError
from src.memory_prediction import CPU, VAE_TILE_PX, Request, predict
from src.model_shapes import bundled_shapes, decoder_activation_bytes, read_shapes, unet_activation_bytes
from tests.tiny import pipelines

NAMES = ["sd15", "sd21", "sd21-base", "sdxl", "small-sd", "ofa-small", "embedded"]


class LiveBytes(TorchDispatchMode):
    """Follows every storage that is made under it until it dies, and remembers the most bytes alive at once."""

    def __init__(self, module: torch.nn.Module) -> None:
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


class FusedAttention(TorchFunctionMode):
    """The meta device has no fused kernel and would write out the scores. A fused kernel allocates its output alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def largest(module: torch.nn.Module) -> int:
    return max(sum(parameter.numel() for parameter in leaf.parameters(recurse=False)) for leaf in module.modules())


def trace_unet(config: dict, size: tuple[int, int], batch: int, device: str, dtype: torch.dtype) -> int:
    with torch.device(device), FusedAttention() if device == "meta" else torch.no_grad(), torch.no_grad():
        unet = UNet2DConditionModel.from_config(config).eval().to(dtype)
        added = {}
        if unet.config.addition_embed_type == "text_time":
            ids = unet.config.addition_time_embed_dim * 6
            pooled = torch.zeros(batch, unet.config.projection_class_embeddings_input_dim - ids, dtype=dtype)
            added = {"text_embeds": pooled, "time_ids": torch.zeros(batch, 6, dtype=dtype)}
        latents = torch.zeros(batch, unet.config.in_channels, *size, dtype=dtype)
        text = torch.zeros(batch, 77, unet.config.cross_attention_dim, dtype=dtype)
        with LiveBytes(unet) as live:
            unet(latents, torch.tensor(1), text, added_cond_kwargs=added, return_dict=False)
    return live.peak


def trace_decoder(config: dict, size: tuple[int, int], device: str, dtype: torch.dtype, tile_px: int | None = None) -> int:
    with torch.device(device), FusedAttention() if device == "meta" else torch.no_grad(), torch.no_grad():
        vae = AutoencoderKL.from_config(config).eval().to(dtype)
        if tile_px:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile_px, tile_px // 8
        with LiveBytes(vae) as live:
            vae.decode(torch.zeros(1, vae.config.latent_channels, *size, dtype=dtype), return_dict=False)
    return live.peak


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_largest_layer_equal_those_of_the_networks(name):
    shapes = bundled_shapes(name)
    texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        networks = {"unet": UNet2DConditionModel.from_config(shapes.unet), "vae": AutoencoderKL.from_config(shapes.vae)}
        networks |= {part: texts[part](CLIPTextConfig(**config)) for part, config in shapes.text_encoders.items()}
    for part, network in networks.items():
        assert (shapes.parameters[part], shapes.largest_layer[part]) == (count(network), largest(network)), part


@pytest.mark.parametrize("build", [pipelines.sd1, lambda: pipelines.sd1(in_channels=9, linear=True), pipelines.sdxl])
def test_a_saved_pipeline_is_read_exactly(build, tmp_path):
    pipeline = build()
    shapes = read_shapes(pipelines.save(pipeline, tmp_path))
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert shapes.parameters == {name: count(network) for name, network in networks.items()}
    assert shapes.native_px == 64


@pytest.mark.parametrize(
    "change",
    [
        {"mid_block_type": None},
        {"layers_per_block": [1, 3]},
        {"transformer_layers_per_block": [2, 3]},
        {"cross_attention_dim": [24, 40]},
        {"time_cond_proj_dim": 16},
        {"block_out_channels": [32, 96]},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"resnet_time_scale_shift": "scale_shift"},
    ],
)
def test_unusual_unets_are_counted_too(change):
    config = {
        "block_out_channels": [32, 64], "cross_attention_dim": 24, "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2, **change,
    }  # fmt: skip
    with torch.device("meta"):
        assert sum(model_shapes._unet_layers(config)) == count(UNet2DConditionModel.from_config(config))


def test_safety_checker_count():
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision["patch_size"] = 14
    with torch.device("meta"):
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=768))
    assert count(checker) == model_shapes.SAFETY_CHECKER_PARAMETERS


@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [("sd15", (64, 64), 2), ("sd15", (61, 93), 1), ("sd21", (96, 96), 2), ("small-sd", (64, 64), 2), ("sdxl", (128, 128), 2)],
)
def test_full_size_activations_equal_the_traced_peak(name, size, batch):
    shapes = bundled_shapes(name)
    traced = trace_unet(shapes.unet, size, batch, "meta", torch.float16)
    assert unet_activation_bytes(shapes.unet, size, batch, 2, workspace=False) == pytest.approx(traced, rel=0.01)
    traced = trace_decoder(shapes.vae, size, "meta", torch.float16)
    assert decoder_activation_bytes(shapes.vae, size, 2, workspace=False) == pytest.approx(traced, rel=0.01)


def test_small_activations_equal_the_traced_peak_of_real_kernels():
    shapes = bundled_shapes("embedded")
    traced = trace_unet(shapes.unet, (32, 32), 2, "cpu", torch.float32)
    assert unet_activation_bytes(shapes.unet, (32, 32), 2, 4, workspace=False) == pytest.approx(traced, rel=0.05)
    traced = trace_decoder(shapes.vae, (32, 32), "cpu", torch.float32)
    assert decoder_activation_bytes(shapes.vae, (32, 32), 4, workspace=False) == pytest.approx(traced, rel=0.05)


@pytest.mark.parametrize("side_px", [1024, 1536])
def test_tiled_decode_equals_the_traced_peak(side_px):
    shapes = bundled_shapes("sdxl")
    traced = trace_decoder(shapes.vae, (side_px // 8,) * 2, "meta", torch.float32, tile_px=VAE_TILE_PX)
    estimate = predict(shapes, Request(side_px, side_px, precision="fp32"), replace(CPU, vae_tiling=True))
    assert estimate.decode.activations_bytes == pytest.approx(traced, rel=0.05)


def test_wide_and_odd_maps_are_traced_too():
    unet = embedded_unet(block_out_channels=[16, 16, 512], mid_block_type=None, attention_head_dim=8)
    unet |= {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    traced = trace_unet(unet, (13, 9), 1, "meta", torch.float32)  # 13 -> 7 -> 4, 9 -> 5 -> 3
    assert unet_activation_bytes(unet, (13, 9), 1, 4, workspace=False) == pytest.approx(traced, rel=0.01)
    vae = {**bundled_shapes("embedded").vae, "block_out_channels": [8, 64, 64, 64]}
    traced = trace_decoder(vae, (16, 16), "meta", torch.float32)  # the last block narrows from 64 channels to 8
    assert decoder_activation_bytes(vae, (16, 16), 4, workspace=False) == pytest.approx(traced, rel=0.01)


@pytest.mark.parametrize(
    ("name", "family", "native_px"),
    [("sd15", "SD1", 512), ("sd21", "SD2", 768), ("sd21-base", "SD2", 512), ("sdxl", "SDXL", 1024), ("embedded", "SD1", 128)],
)
def test_family_and_native_size(name, family, native_px):
    shapes = bundled_shapes(name)
    assert (shapes.family, shapes.native_px) == (family, native_px)


def test_known_models_are_found_by_hub_id_and_others_are_not():
    assert bundled_shapes("stabilityai/stable-diffusion-xl-base-1.0") == bundled_shapes("sdxl")
    assert bundled_shapes("someone/else") is None
    assert bundled_shapes("../architectures/sd15") is None


def embedded_unet(**change: Any) -> dict:
    return {**bundled_shapes("embedded").unet, **change}


def broken_folder(tmp_path: Path, unet: str) -> Path:
    pipelines.save(pipelines.sd1(), tmp_path)
    (tmp_path / "unet" / "config.json").write_text(unet)
    return tmp_path


@pytest.mark.parametrize(
    "unet",
    [
        "{",
        "[]",
        "{}",
        json.dumps(embedded_unet(down_block_types=["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"])),
        json.dumps(embedded_unet(block_out_channels=[])),
        json.dumps(embedded_unet(layers_per_block="many")),
        json.dumps(embedded_unet(sample_size=None)),
    ],
)
def test_a_config_of_another_kind_is_refused_in_one_line(unet, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)) as raised:
        read_shapes(broken_folder(tmp_path, unet))
    assert raised.value.exit_code == ExitCode.REFUSED
    assert "\n" not in str(raised.value)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json") as raised:
        read_shapes(tmp_path)
    assert raised.value.exit_code == ExitCode.NOT_FOUND


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_sliced_attention_holds_two_matrices_of_half_the_heads(kind: str, monkeypatch) -> None:
    """Against the scores that diffusers makes."""
    unet = getattr(pipelines, kind)().unet
    unet.set_attention_slice("auto")
    largest = []
    made = Attention.get_attention_scores
    monkeypatch.setattr(
        Attention, "get_attention_scores",
        lambda *given: largest.append(result.numel()) or result if (result := made(*given)) is not None else result,
    )  # fmt: skip
    x, text = torch.randn(2, 4, 16, 24), torch.randn(2, 7, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 40), "time_ids": torch.full((2, 6), 64.0)} if kind == "sdxl" else None
    with torch.no_grad():
        unet(x, 1, text, added_cond_kwargs=added)
    assert model_shapes.sliced_scores_bytes(json.loads(unet.to_json_string()), (16, 24), 4) == 2 * 4 * max(largest)
