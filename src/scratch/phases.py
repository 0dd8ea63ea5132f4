"""What the phases leave on the disk for each other: ``WORK/<phase>/final``, whole, with what it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src import files, folders
from src.checkpoints import MANIFEST, Checkpoint, CheckpointFolder, read_manifest
from src.errors import UserError, not_found, usage_error
from src.scratch.settings import ADDED, NOT_LEARNT, ScratchSettings
from src.training.history import finite

NEEDS = {
    "scenes": (), "tokenizer": ("scenes",), "vae": ("scenes",), "clip": ("scenes", "tokenizer"),
    "unet": ("scenes", "tokenizer", "vae", "clip"), "assemble": ("scenes", "tokenizer", "vae", "clip", "unet"),
}  # fmt: skip
LATENTS = "latents-"  # folders of a U-Net's pictures, encoded: not learnt, and they know what they were made from


@dataclass(frozen=True)
class Work:
    """The folder of one model in the making."""

    folder: Path
    say: Callable[[str], None]

    def of(self, phase: str) -> Path:
        return self.folder / phase

    def result(self, phase: str) -> Checkpoint:
        """What a phase has published. Raises UserError (not found) if it has not, (refused) if it is damaged."""
        final = self.of(phase) / "final"
        if not final.exists():
            raise not_found(
                f"{self.folder}: has no {phase} yet; run python -m src.scratch {phase} --work {self.folder}, with your settings"
            )
        return read_manifest(final)

    def inputs(self, phase: str) -> dict[str, str]:
        """The identity of everything that a phase builds on, which must fit together.

        Raises UserError (usage) when one of them was made from another version of a third.
        """
        found = {need: self.result(need) for need in NEEDS[phase]}
        known = {need: identity(result) for need, result in found.items()}
        for need, result in found.items():
            for below, made_from in result.facts["inputs"].items():
                if below in known and known[below] != made_from:
                    raise usage_error(
                        f"{self.of(need)}: was made from another {below} than is there now; run python -m src.scratch {need} "
                        f"--restart --work {self.folder}, with your settings"
                    )
        return known

    def is_done(self, phase: str, settings: ScratchSettings) -> bool:
        """Whether the result is there, from these settings and from the inputs as they are."""
        try:
            facts = self.result(phase).facts
            is_same = as_learnt(facts["settings"]) == as_learnt(settings_of(settings, phase))
            return is_same and facts["inputs"] == self.inputs(phase)
        except UserError:
            return False

    def publish(
        self, phase: str, settings: ScratchSettings, contents: Mapping[str, bytes], figures: Mapping[str, Any],
        inputs: Mapping[str, str],
    ) -> Path:  # fmt: skip
        """Write the result of a phase, in place of an older one. ``inputs`` are those that it was learnt from."""
        facts = {
            "settings": settings_of(settings, phase),
            "inputs": dict(inputs),
            "figures": {name: finite(value) for name, value in figures.items()},
        }
        return CheckpointFolder(self.of(phase), self.say).publish("final", contents, facts)

    def restart(self, phase: str) -> None:
        """Forget a phase, checkpoints and all; what came after it no longer fits and is refused by name. Latents stay.

        Raises UserError (refused) while another process learns it.
        """
        if self.of(phase).is_dir():
            with CheckpointFolder(self.of(phase), self.say).lock():
                entries = list(self.of(phase).iterdir())
                for entry in entries:
                    if entry.name.startswith(LATENTS):
                        continue
                    if entry.is_dir():
                        folders.remove_folder(entry)
                    elif entry.name != folders.LOCK_NAME:  # it is open, and with it the folder cannot be renamed on Windows
                        files.delete_files([entry])
            if not any(entry.name.startswith(LATENTS) for entry in entries):
                folders.remove_folder(self.of(phase))


def identity(result: Checkpoint) -> str:
    """A hash of all that a published folder holds."""
    return digest((result.folder / MANIFEST).read_bytes())


def digest(data: bytes) -> str:
    """Sixteen digits that no other data has."""
    return hashlib.sha256(data).hexdigest()[:16]


def as_learnt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what is learnt, also of settings written by a version that lacked some."""
    return {name: value for name, value in (ADDED | dict(settings)).items() if name not in NOT_LEARNT}


def settings_of(settings: ScratchSettings, phase: str) -> dict[str, Any]:
    """A phase's settings as JSON gives them back."""
    section = asdict(getattr(settings, phase)) if hasattr(settings, phase) else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in section.items()}
