"""One honest score for a checkpoint, and the rule by which the best one is named.

Fidelity to the subject and faithfulness to the prompt pull against each other: an adapter that copies its photos draws
nothing else. So both are measured, as in the evaluation of DreamBooth (Ruiz et al. 2023, section 4.2), by the features of
a CLIP (Radford et al. 2021) that is on this disk; nothing is fetched for it. What CLIP sees is coarse: to it a photo's
background is part of the likeness.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from torch import Tensor

from src.model_files import EMBEDDED
from src.model_source import cached_snapshot, is_embedded, user_cache
from src.training.history import History

# The first that is on the disk. ViT-L/14 is what published figures use; the last is its small sibling.
KNOWN_CLIPS = (
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-base-patch32",
)
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures
_LEAST_COSINE = 0.01  # a cosine below is taken for this: ratios need positive numbers
MAX_PHOTOS = 64
_BATCH = 16  # pictures at once


@dataclass(frozen=True, slots=True)
class Score:
    """Cosines of CLIP features, -1 to 1; None where there was nothing to compare."""

    clip_i: float | None  # subject: pictures with the trigger and the photos, mean over all pairs
    clip_t: float | None  # prompt: each picture and its prompt, mean


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint to take, and why, in words for the reader."""

    step: int
    reason: str


class Clip:
    """A CLIP with both towers, in fp32. A few pictures at a checkpoint are not worth its memory on a card: so on the CPU."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load a folder in the layout of transformers. Raises ValueError, and whatever the loaders raise."""
        with torch.random.fork_rng([]):
            self._model, info = transformers.CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} tensors are missing")
        self._model.eval().to(device)
        self._device = device
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise ValueError("it has no tokenizer")  # transformers would make an empty one up
        self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        config = self._model.config
        self._size_px = config.vision_config.image_size
        self._window = min(self._tokenizer.model_max_length, config.text_config.max_position_embeddings)
        self._mean, self._std = _normalisation(folder / "preprocessor_config.json")

    @property
    def dimensions(self) -> int:
        """D of both towers' features."""
        return self._model.config.projection_dim

    @torch.no_grad()
    def picture_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> unit vectors (N, D), on the CPU."""
        if not pictures:
            return torch.zeros(0, self.dimensions)
        features = []
        for start in range(0, len(pictures), _BATCH):
            pixels = torch.cat([self._pixels(item) for item in pictures[start : start + _BATCH]]).to(self._device)
            features.append(self._model.visual_projection(self._model.vision_model(pixels).pooler_output))
        return torch.nn.functional.normalize(torch.cat(features), dim=-1).cpu()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (N, D), on the CPU; what does not fit into CLIP's window is cut off."""
        options = {"truncation": True, "max_length": self._window, "return_tensors": "pt"}
        ids = [self._tokenizer(text, **options).input_ids.to(self._device) for text in texts]
        features = [self._model.text_projection(self._model.text_model(item).pooler_output) for item in ids]
        return torch.nn.functional.normalize(torch.cat(features), dim=-1).cpu()

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than CLIP's window."""
        return len(self._tokenizer(text).input_ids) > self._window

    def _pixels(self, picture: Image.Image) -> Tensor:
        """The shorter side to CLIP's size, bicubic, and the middle cut out, as CLIP learnt: (1, 3, S, S)."""
        size = self._size_px
        scale = size / min(picture.size)
        width, height = (max(size, int(side * scale)) for side in picture.size)
        small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        values = numpy.array(small.crop((left, top, left + size, top + size)), dtype=numpy.float32) / 255
        return torch.from_numpy((values - self._mean) / self._std).permute(2, 0, 1)[None]


class Scorer:
    """Judges pictures of fixed prompts against the photos of one training."""

    def __init__(self, clip: Clip, photos: Sequence[Image.Image], prompts: Sequence[str], trigger: str | None) -> None:
        """``photos`` beyond ``MAX_PHOTOS`` are passed over, evenly."""
        self._clip = clip
        self._photos = clip.picture_features(some_photos(photos))
        self._texts = clip.text_features([without_trigger(prompt, trigger) for prompt in prompts]) if prompts else None
        self._shows_subject = shows_subject(prompts, trigger)

    def score(self, pictures: Sequence[Image.Image | None]) -> Score:
        """One picture for each prompt, None where there is none."""
        drawn = [index for index, picture in enumerate(pictures) if picture is not None]
        if not drawn:
            return Score(None, None)
        features = self._clip.picture_features([pictures[index] for index in drawn])  # (N, D)
        subject = features[[self._shows_subject[index] for index in drawn]]
        clip_i = fidelity(subject, self._photos).mean().item() if len(subject) and len(self._photos) else None
        return Score(clip_i, faithfulness(features, self._texts[drawn]).mean().item())


def fidelity(pictures: Tensor, photos: Tensor) -> Tensor:
    """CLIP-I of each picture, its mean cosine with the photos: unit vectors (N, D) and (M, D) -> (N,)."""
    return (pictures @ photos.T).mean(dim=-1)


def faithfulness(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T of each picture, its cosine with its own prompt: unit vectors (N, D) and (N, D) -> (N,)."""
    return (pictures * texts).sum(dim=-1)


def some_photos(photos: Sequence[Any]) -> Sequence[Any]:
    """At most ``MAX_PHOTOS`` of them, evenly chosen."""
    count = len(photos)
    return [photos[index * count // MAX_PHOTOS] for index in range(MAX_PHOTOS)] if count > MAX_PHOTOS else photos


def names_subject(prompt: str, trigger: str | None) -> bool:
    """Whether a prompt holds the made-up word, as a word of its own."""
    return bool(trigger and trigger.split() and re.search(_words(trigger), prompt, re.IGNORECASE))


def shows_subject(prompts: Sequence[str], trigger: str | None) -> list[bool]:
    """Whether each prompt asks for the subject: it holds the trigger; where none does, all of them."""
    named = [names_subject(prompt, trigger) for prompt in prompts]
    return named if any(named) else [True] * len(prompts)


def find_clip(model_id: str, cache: Path) -> Path | None:
    """The folder of a CLIP that can judge a model's pictures: ``CACHE/clip``, then the known ones in the two hub caches.

    The embedded model draws what no photo shows; only the CLIP that learnt with it can judge that.
    """
    if is_embedded(model_id):
        return EMBEDDED / "clip" if has_both_towers(EMBEDDED / "clip") else None
    return first_on_disk(cache / "clip", KNOWN_CLIPS, cache, has_both_towers)


def first_on_disk(own: Path, names: Sequence[str], cache: Path, fits: Callable[[Path], bool]) -> Path | None:
    """The first folder that fits: ``own``, then the models of these names in the two hub caches. None where none does."""
    known = [cached_snapshot(name, store) for name in names for store in (cache, user_cache())]
    return next((folder for folder in [own, *known] if folder is not None and fits(folder)), None)


def load_clip(model_id: str, cache: Path, say: Callable[[str], None]) -> Clip | None:
    """The CLIP that ``find_clip`` finds; None, and a line that says why, where there is none that can be used."""
    folder = find_clip(model_id, cache)
    if folder is None:
        hint = "" if is_embedded(model_id) else f"; put one into {cache / 'clip'} for scores (such as {KNOWN_CLIPS[0]})"
        say(f"scores  none: no CLIP with an image tower is on this disk{hint}")
        return None
    try:
        return Clip(folder)
    except Exception as error:  # what loaders raise has no class in common; without scores a training is still a training
        say(f"scores  none: {folder} cannot be loaded ({' '.join(str(error).split())[:120]})")
        return None


def without_trigger(prompt: str, trigger: str | None) -> str:
    """The prompt as CLIP can know it: a made-up word means nothing to it.

    A trigger of several words is a made-up word before the name of a class, "sks dog", and leaves that name; one of a
    single word is taken out. DreamBooth's evaluation does the same.
    """
    if trigger is None or not trigger.split():
        return prompt
    words = trigger.split()
    pattern = re.compile(_words(trigger), re.IGNORECASE)
    replaced = pattern.sub(lambda found: found[0].split()[-1] if len(words) > 1 else "", prompt)
    return " ".join(replaced.split())


def _words(trigger: str) -> str:
    """A pattern of the trigger as words of their own: "cat" is not in "scattered"."""
    return r"(?<!\w)" + r"\s+".join(map(re.escape, trigger.split())) + r"(?!\w)"


def balance(score: Score, base: Score | None) -> float | None:
    """sqrt(fidelity * faithfulness), each relative to the base model where that was scored; above 1 is better than it.

    The geometric mean: a tenth of the one is worth a tenth of the other, and the base only sets the scale, so that the
    order of two checkpoints does not depend on it.
    """
    if score.clip_i is None or score.clip_t is None:
        return None
    ratios = [max(score.clip_i, _LEAST_COSINE), max(score.clip_t, _LEAST_COSINE)]
    if base is not None and base.clip_i is not None and base.clip_t is not None:
        ratios = [ratio / max(value, _LEAST_COSINE) for ratio, value in zip(ratios, (base.clip_i, base.clip_t))]
    return math.sqrt(ratios[0] * ratios[1])


def scores_of(history: History) -> dict[int, Score]:
    """The scores that were noted of pictures drawn as the last ones were, by step; step 0 is the base model."""
    records = [(record.step, record.values) for record in history.read("score")]
    last = records[-1][1].get("drawn") if records else None
    return {  # older versions did not say how
        step: Score(values.get("clip_i"), values.get("clip_t")) for step, values in records if values.get("drawn", last) == last
    }


def choose_best(history: History, steps: Collection[int]) -> Best | None:
    """The best of the checkpoints at ``steps``; of equals the earliest. None for no steps.

    With scores, the highest :func:`balance`; else the lowest validation loss; else the last, which is no judgement. A
    checkpoint has the newest number that was measured up to it and after the checkpoint before.
    """
    steps = sorted(steps)
    if not steps:
        return None
    scores = scores_of(history)
    balances = {step: value for step, score in scores.items() if (value := balance(score, scores.get(0))) is not None}
    if found := _newest_of_each(balances, steps):
        step = max(found, key=found.get)
        base = " (the base model: 1)" if 0 in balances else ""
        return Best(step, f"highest balance of subject fidelity and prompt faithfulness by CLIP, {found[step]:.3f}{base}")
    if found := _newest_of_each(dict(history.curve("validation", "loss")), steps):
        step = min(found, key=found.get)
        return Best(step, f"lowest validation loss, {found[step]:.4g}")
    return Best(steps[-1], "the last one, for want of held-out pictures or scores: a default, not a judgement")


def _newest_of_each(values: dict[int, float], steps: Sequence[int]) -> dict[int, float]:
    """For each step, ascending, the newest value after the step before."""
    found: dict[int, float] = {}
    before = 0
    for step in steps:
        measured = [at for at in values if before < at <= step]
        if measured:
            found[step] = values[max(measured)]
        before = step
    return found


def has_both_towers(folder: Path) -> bool:
    """Whether a folder holds what ``Clip`` loads, by its config and the names in it."""
    config = _read_json(folder / "config.json")
    has_weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return config.get("model_type") == "clip" and "vision_config" in config and has_weights


def _normalisation(path: Path) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mean and deviation of the pixels' channels, (3,) each."""
    config = _read_json(path)
    mean, std = (
        numpy.array(config.get(name, usual), dtype=numpy.float32)
        for name, usual in (("image_mean", _MEAN), ("image_std", _STD))
    )
    if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
        raise ValueError(f"{path.name} holds no mean and deviation of three channels")
    return mean, std


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
