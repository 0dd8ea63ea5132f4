"""What an adapter's files tell of it without their weights: read in milliseconds, and without torch."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from src.errors import refused
from src.files import sha256_of
from src.lora.formats import ScaleRule, Where, guess_family
from src.lora.reading import AdapterPart, form_of, name_of, read_parts
from src.tensor_files import TensorInfo

_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_FLOATS = {"F16": "<e", "F32": "<f", "F64": "<d"}


@dataclass(frozen=True, slots=True)
class Listing:
    """An adapter as its headers describe it."""

    name: str
    form: str  # diffusers | peft | kohya
    family: str | None
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    size_bytes: int
    dtypes: tuple[str, ...]
    components: dict[str, int]  # layers of each
    ranks: dict[str, int]  # rank -> layers of it
    alphas: dict[str, int]
    dora: bool
    rank_stabilised: bool
    trigger: str | None
    base_model: str | None
    base_sha256: str | None
    resolution: str | None
    prediction_type: str | None
    header: dict[str, str]  # everything it says, word for word

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        kind = " ".join(
            word for word in ("rank-stabilised" if self.rank_stabilised else "", "DoRA" if self.dora else "LoRA") if word
        )
        where = ", ".join(f"{component} {count}" for component, count in self.components.items())
        size = f"{self.size_bytes / 1e6:.1f} MB" if self.size_bytes >= 1e5 else f"{self.size_bytes:,} bytes"
        facts = {
            "family": self.family or "not told by its shapes, names or header",
            "form": f"{self.form}, {kind}, {'/'.join(_DTYPES.get(dtype, dtype) for dtype in self.dtypes)}, {size}",
            "layers": f"{sum(self.components.values())} ({where})",
            "rank": _counted(self.ranks),
            "alpha": _counted(self.alphas),
            "trigger": self.trigger,
            "base": self.base_model and self.base_model + (f" (sha256 {self.base_sha256[:16]}...)" if self.base_sha256 else ""),
            "trained": ", ".join(filter(None, (self.resolution, self.prediction_type))),
        }  # fmt: skip
        lines = [self.name, *(f"  {key:<8} {value}" for key, value in facts.items() if value)]
        return lines + [f"  file     {file}\n  sha256   {digest}" for file, digest in zip(self.files, self.sha256)]


def list_adapter(path: Path) -> Listing:
    """Describe the adapter at ``path``. Raises UserError as `reading.read_adapter` does, except for what weights alone show."""
    parts = read_parts(path)
    header = parts[0].header.metadata
    outlines = {where: outline for part in parts for where, outline in _outlines(part).items()}
    files = [file for part in parts for file in part.files]
    infos = [(name, info) for part in parts for name, info in part.header.tensors.items()]
    return Listing(
        name=header.get("modelspec.title") or header.get("ss_output_name") or name_of(path),
        form=form_of(parts[0]),
        family=guess_family(outlines, header),
        files=tuple(map(str, files)),
        sha256=tuple(map(sha256_of, files)),
        size_bytes=sum(file.stat().st_size for file in files),
        dtypes=tuple(sorted({info.dtype for name, info in infos if not name.endswith(".alpha")})),
        components=dict(Counter(component for component, _ in outlines)),
        ranks=_tally(outline.rank for outline in outlines.values()),
        alphas=_tally(outline.alpha for outline in outlines.values()),
        dora=any(outline.dora for outline in outlines.values()),
        rank_stabilised=any(rule.rank_stabilised for part in parts for rule in part.rules.values()),
        trigger=header.get("modelspec.trigger_phrase"),
        base_model=header.get("ss_sd_model_name"),
        base_sha256=header.get("ss_new_sd_model_hash"),
        resolution=header.get("modelspec.resolution") or header.get("ss_resolution"),
        prediction_type=header.get("modelspec.prediction_type"),
        header=dict(header),
    )


@dataclass(frozen=True, slots=True)
class _Outline:
    """A layer's shapes, under the names that a layer has."""

    down: TensorInfo
    up: TensorInfo
    alpha: float
    dora: bool

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def _outlines(part: AdapterPart) -> dict[Where, _Outline]:
    roles: dict[Where, dict[str, str]] = {}
    for name, (component, module, role) in part.names.items():
        roles.setdefault((component, module), {})[role] = name
    infos = part.header.tensors
    alphas = _numbers(part.file, {mine["alpha"] for mine in roles.values() if "alpha" in mine})
    outlines: dict[Where, _Outline] = {}
    for (component, module), mine in roles.items():
        if "down" not in mine or "up" not in mine or len(infos[mine["down"]].shape) < 2:
            raise refused(f"{part.file}: layer {module!r} is not whole; the file is damaged")
        down = infos[mine["down"]]
        alpha = alphas.get(mine.get("alpha", ""))
        if alpha is None:
            alpha = part.rules.get(component, ScaleRule()).alpha_of(module, down.shape[0])
        dora = "dora_scale" in mine or "lora_magnitude_vector" in mine
        outlines[component, module] = _Outline(down, infos[mine["up"]], alpha, dora)
    return outlines


def _numbers(file: Path, names: set[str]) -> dict[str, float]:
    """The values of tensors that are one number, read straight from their place in the file."""
    if not names:
        return {}
    with file.open("rb") as data:
        start = 8 + int.from_bytes(data.read(8), "little")
        entries = json.loads(data.read(start - 8))
        values: dict[str, float] = {}
        for name in sorted(names):
            begin, end = entries[name]["data_offsets"]
            data.seek(start + begin)
            raw, dtype = data.read(end - begin), entries[name]["dtype"]
            if dtype == "BF16":
                raw, dtype = b"\0\0" + raw, "F32"
            if dtype in _FLOATS and len(raw) == struct.calcsize(_FLOATS[dtype]):
                [values[name]] = struct.unpack(_FLOATS[dtype], raw)
            elif dtype[0] in "IU":
                values[name] = float(int.from_bytes(raw, "little", signed=dtype[0] == "I"))
    return values


def _tally(values: Iterable[float]) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def _counted(tally: dict[str, int]) -> str:
    """``4``, or ``4 (100 layers), 16 (28)``."""
    if len(tally) == 1:
        return next(iter(tally))
    return ", ".join(f"{value} ({count} layers)" for value, count in tally.items())
