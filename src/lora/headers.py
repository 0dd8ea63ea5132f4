"""What an adapter's header says to the programs that list it: kohya's ``ss_*`` keys, and ModelSpec 1.0.1.

All values are text. A1111 takes the family from ``ss_base_model_version``, and the words that it proposes from
``ss_tag_frequency``; SD.Next, SwarmUI and others show ``modelspec.*``.
Specification: https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from src.lora.formats import LoraLayer, Where, effective_alpha

_ARCHITECTURES = {"SD1": "stable-diffusion-v1", "SD2": "stable-diffusion-v2", "SDXL": "stable-diffusion-xl-v1-base"}
_BASE_VERSIONS = {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0"}
_SIZES_PX = {"SD1": 512, "SD2": 512, "SDXL": 1024}
ZERO_TERMINAL_SNR = "ss_zero_terminal_snr"  # "True": learnt on a noise schedule that ends in pure noise
_LEGACY_WINDOW = slice(0x100000, 0x110000)
# What is said anew by every file that is written; all other ss_* and modelspec.* keys are carried over.
_DERIVED = re.compile(
    r"ss_(network_(module|dim|alpha|args)|base_model_version|v2|output_name|resolution|sd_model_name|new_sd_model_hash|steps)"
    r"|modelspec\.(sai_model_spec|architecture|implementation|title|resolution|date|trigger_phrase|prediction_type|hash_sha256)"
)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the headers say of an adapter beside its tensors."""

    family: str  # SD1 | SD2 | SDXL
    name: str
    trigger: str | None = None
    resolution_px: int | None = None
    base_model: str = ""  # as a person would look for it
    base_sha256: str | None = None
    prediction_type: str = "epsilon"  # epsilon | v_prediction
    steps: int | None = None
    date: str | None = None  # ISO 8601; None: not said, so that equal adapters are equal files
    extra: Mapping[str, str] = field(default_factory=dict)  # more ss_* and modelspec.*, which win over what is derived


def describe(layers: Mapping[Where, LoraLayer], facts: AdapterFacts) -> dict[str, str]:
    """All header keys that do not depend on the tensors' bytes."""
    by_v = facts.prediction_type == "v_prediction"
    architecture = _ARCHITECTURES[facts.family]
    if facts.family == "SD2":
        architecture += "-768-v" if by_v else "-512"
    size_px = facts.resolution_px or (768 if facts.family == "SD2" and by_v else _SIZES_PX[facts.family])
    header = {
        **_network(layers),
        "ss_base_model_version": _BASE_VERSIONS[facts.family] + ("_v" if by_v and facts.family != "SDXL" else ""),
        "ss_v2": str(facts.family == "SD2"),
        "ss_output_name": facts.name,
        "ss_resolution": f"({size_px}, {size_px})",
        "ss_sd_model_name": facts.base_model,
        "ss_new_sd_model_hash": facts.base_sha256,
        "ss_steps": None if facts.steps is None else str(facts.steps),
        "ss_tag_frequency": json.dumps({facts.name: {facts.trigger: 1}}, ensure_ascii=False) if facts.trigger else None,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": (
            "https://github.com/Stability-AI/generative-models" if facts.family == "SDXL" else "diffusers"
        ),
        "modelspec.title": facts.name,
        "modelspec.resolution": f"{size_px}x{size_px}",
        "modelspec.date": facts.date,
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.prediction_type": "v" if by_v else "epsilon",
        **facts.extra,
    }
    return {key: value for key, value in header.items() if value}


def facts_in(metadata: Mapping[str, str], family: str, name: str) -> AdapterFacts:
    """What a header says, so that it can be said again by another file; ``name`` where the header has none."""
    size = re.search(r"\d+", metadata.get("ss_resolution") or metadata.get("modelspec.resolution") or "")
    steps = metadata.get("ss_steps") or metadata.get("ss_max_train_steps") or ""
    by_v = metadata.get("modelspec.prediction_type") == "v" or metadata.get("ss_base_model_version", "").endswith("_v")
    return AdapterFacts(
        family=family,
        name=metadata.get("modelspec.title") or metadata.get("ss_output_name") or name,
        trigger=metadata.get("modelspec.trigger_phrase"),
        resolution_px=int(size[0]) if size else None,
        base_model=metadata.get("ss_sd_model_name", ""),
        base_sha256=metadata.get("ss_new_sd_model_hash"),
        prediction_type="v_prediction" if by_v else "epsilon",
        steps=int(steps) if steps.isdecimal() else None,
        date=metadata.get("modelspec.date"),
        extra={
            key: value for key, value in metadata.items()
            if key.startswith(("ss_", "modelspec.")) and not _DERIVED.fullmatch(key)
        },
    )  # fmt: skip


def hashes(data: bytes) -> dict[str, str]:
    """kohya's two hashes and ModelSpec's, of a .safetensors file whose metadata are its ``ss_*`` keys alone.

    ``sshs_model_hash``: sha256 of all behind the header. ``sshs_legacy_hash``: the first 8 digits of the sha256 of the
    64 KiB at 1 MiB, which is empty in a smaller file.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(memoryview(data)[end:]).hexdigest()
    return {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(data[_LEGACY_WINDOW]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }


def _network(layers: Mapping[Where, LoraLayer]) -> dict[str, str]:
    """The network as kohya's tools would rebuild it: the commonest rank and alpha, convolutions apart, DoRA as LyCORIS's."""
    linear, spatial = Counter[tuple[int, float]](), Counter[tuple[int, float]]()
    for layer in layers.values():
        kind = spatial if layer.down.shape[2:].numel() > 1 else linear
        kind[layer.rank, effective_alpha(layer)] += 1
    (rank, alpha), _ = (linear or spatial).most_common(1)[0]
    arguments: dict[str, str] = {}
    if spatial:
        (conv_rank, conv_alpha), _ = spatial.most_common(1)[0]
        arguments |= {"conv_dim": str(conv_rank), "conv_alpha": f"{conv_alpha:g}"}
    magnitudes = [layer.magnitude for layer in layers.values() if layer.magnitude is not None]
    if magnitudes:
        arguments |= {"algo": "lora", "dora_wd": "True", "wd_on_output": str(magnitudes[0].ndim == 1)}
    return {
        "ss_network_module": "lycoris.kohya" if magnitudes else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(arguments) if arguments else "",
    }
