"""Sampler names -> diffusers schedulers: the names people know from A1111, and diffusers' own.

A name is a sampler and, optionally, a schedule: ``dpm++_2m_karras`` = sampler ``dpm++_2m`` + schedule ``karras`` =
A1111's "DPM++ 2M Karras", in old files one name, in new ones "Sampler: DPM++ 2M, Schedule type: Karras". Any sampler may
be joined with any schedule that its diffusers class can do. Source of the pairs: diffusers, docs/source/en/api/schedulers/overview.md.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from src.config import GenerationConfig
from src.errors import usage_error

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# A sampler must not inherit these from the scheduler a model ships with: Stable Diffusion never clips, its first alpha is not 1.
_DDIM_LIKE = {"clip_sample": False, "set_alpha_to_one": False}
_ANY_SIGMAS = ("karras", "exponential", "beta")


@dataclass(frozen=True, slots=True)
class Sampler:
    """One row of the table: our key, A1111's name, diffusers' class, its options, the schedules and the steps it can do."""

    key: str
    label: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    max_steps: int | None = None  # None: as many as a request may ask for


@dataclass(frozen=True, slots=True)
class SamplerChoice:
    """A sampler with a schedule ("" is the sampler's own)."""

    sampler: Sampler
    schedule: str = ""

    @property
    def key(self) -> str:
        return f"{self.sampler.key}_{self.schedule}" if self.schedule else self.sampler.key

    @property
    def label(self) -> str:
        """A1111's one-line name, e.g. "DPM++ 2M Karras"."""
        return f"{self.sampler.label} {self.schedule_label}" if self.schedule else self.sampler.label

    @property
    def schedule_label(self) -> str | None:
        """A1111's "Schedule type"; None for the sampler's own."""
        return SCHEDULES[self.schedule].label if self.schedule else None


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the noise levels are spaced: A1111's name and the scheduler options that give it."""

    label: str
    options: Mapping[str, Any]


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "karras": Schedule("Karras", {"use_karras_sigmas": True}),
        "exponential": Schedule("Exponential", {"use_exponential_sigmas": True}),
        "beta": Schedule("Beta", {"use_beta_sigmas": True}),
        "sgm_uniform": Schedule("SGM Uniform", {"timestep_spacing": "trailing"}),
    }
)
_TRAILING = "sgm_uniform"
_MULTISTEP = "DPMSolverMultistepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_DISTILLED_STEPS = 50  # diffusers' original_inference_steps: these samplers take some of the steps that the teacher took

SAMPLERS: tuple[Sampler, ...] = (
    Sampler("dpm++_2m", "DPM++ 2M", _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("dpm++_2m_sde", "DPM++ 2M SDE", _MULTISTEP, {**_SDE, "solver_order": 2}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("dpm++_3m_sde", "DPM++ 3M SDE", _MULTISTEP, {**_SDE, "solver_order": 3}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("dpm++_sde", "DPM++ SDE", "DPMSolverSinglestepScheduler", {**_SDE, "lower_order_final": True}, _ANY_SIGMAS),
    Sampler("dpm++_2s", "DPM++ 2S", "DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}, _ANY_SIGMAS),
    Sampler("euler", "Euler", "EulerDiscreteScheduler", {}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler", {}, (_TRAILING,)),
    Sampler("heun", "Heun", "HeunDiscreteScheduler", {"clip_sample": False}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("lms", "LMS", "LMSDiscreteScheduler", {}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("dpm2", "DPM2", "KDPM2DiscreteScheduler", {}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("dpm2_a", "DPM2 a", "KDPM2AncestralDiscreteScheduler", {}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("unipc", "UniPC", "UniPCMultistepScheduler", {}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("deis", "DEIS", "DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}, (*_ANY_SIGMAS, _TRAILING)),
    Sampler("ddim", "DDIM", "DDIMScheduler", _DDIM_LIKE, (_TRAILING,)),
    Sampler("ddpm", "DDPM", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}, (_TRAILING,)),
    Sampler("pndm", "PLMS", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, (_TRAILING,)),
    Sampler("lcm", "LCM", "LCMScheduler", _DDIM_LIKE, max_steps=_DISTILLED_STEPS),
    Sampler("tcd", "TCD", "TCDScheduler", _DDIM_LIKE, max_steps=_DISTILLED_STEPS),
)  # fmt: skip

# Other programs' names for the same thing, spelled as _plain() gives them.
_ALIASES = {
    "plms": "pndm",
    "dpmpp_2m_sde_gpu": "dpm++_2m_sde",
    "dpmsolver++": "dpm++_2m",
    "dpmsolver_multistep": "dpm++_2m",
    "dpmsolver_singlestep": "dpm++_2s",
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_heun": "heun",
    "k_lms": "lms",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2_a",
    "kdpm_2": "dpm2",
    "kdpm_2_a": "dpm2_a",
    "unipc_bh2": "unipc",
    "uni_pc": "unipc",
}
# A1111's "Simple" takes every T/n-th timestep from the noisiest one on, which diffusers calls trailing.
_SCHEDULE_ALIASES = {"k": "karras", "simple": _TRAILING, "normal": "", "uniform": "", "automatic": "", "sgm": _TRAILING}


@dataclass(frozen=True, slots=True)
class Preset:
    """Steps, guidance and spacing that a few-step model or LoRA was distilled for; guidance 1 draws without guidance."""

    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    note: str


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "lcm": Preset(6, 1.5, "lcm", "LCM models, or the LCM LoRA over any SD1/SDXL model"),
        "turbo": Preset(2, 1.0, "euler_a_sgm_uniform", "SD-Turbo, SDXL-Turbo"),
        "lightning": Preset(4, 1.0, "euler_sgm_uniform", "SDXL-Lightning (4-step model or LoRA)"),
        "hyper": Preset(8, 1.0, "ddim_sgm_uniform", "Hyper-SD (8-step LoRA)"),
    }
)


def find_sampler(name: str) -> SamplerChoice:
    """Resolve a sampler name in any of the known spellings. Raises UserError (usage) with the nearest name."""
    plain = _plain(name)
    by_key = {sampler.key: sampler for sampler in SAMPLERS}
    by_key |= {alias: by_key[key] for alias, key in _ALIASES.items()}
    for suffix in ("", *SCHEDULES, *_SCHEDULE_ALIASES):
        stem = plain.removesuffix(f"_{suffix}") if suffix else plain
        if (suffix and stem == plain) or stem not in by_key:
            continue
        schedule = _SCHEDULE_ALIASES.get(suffix, suffix)
        sampler = by_key[stem]
        if schedule and schedule not in sampler.schedules:
            can = ", ".join(SCHEDULES[item].label for item in sampler.schedules) or "none but its own"
            label = SCHEDULES[schedule].label
            wanted = label if suffix == schedule else f"{suffix.title()} ({label})"
            raise usage_error(f"scheduler '{name}': {sampler.label} cannot do the {wanted} schedule; it can do: {can}")
        return SamplerChoice(sampler, schedule)
    known = [*by_key, *(f"{sampler.key}_{schedule}" for sampler in SAMPLERS for schedule in sampler.schedules)]
    close = difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see --list-schedulers"
    raise usage_error(f"unknown scheduler '{name}'; {hint}")


def build_scheduler(choice: SamplerChoice, model_config: Mapping[str, Any]) -> SchedulerMixin:
    """Make the sampler for a model: noise schedule and prediction type are the model's, all else the sampler's.

    ``model_config`` is the config of the scheduler that the model ships with. What its file does not say, and diffusers
    filled in from that class's defaults, is no fact of the model: PNDM's "leading" spacing would start Euler too late.
    """
    import inspect

    import diffusers  # the table above is read without torch

    kind = getattr(diffusers, choice.sampler.class_name)
    known = inspect.signature(kind.__init__).parameters
    # Only the model's own facts: from_config() would also carry over the solver options of a foreign class of scheduler.
    filled_in = model_config.get("_use_default_values", ())
    options = {
        name: model_config[name] for name in _MODEL_FACTS if model_config.get(name) is not None and name not in filled_in
    }
    options |= choice.sampler.options
    if choice.schedule:
        options |= SCHEDULES[choice.schedule].options
    scheduler = kind(**{name: value for name, value in options.items() if name in known})
    if choice.sampler.class_name == "KDPM2DiscreteScheduler":
        _mend_precision(scheduler)
    if "timestep_spacing" in known:
        _mend_spacing(scheduler, is_spaced_anew=choice.schedule in _ANY_SIGMAS)
    return scheduler


def _mend_precision(scheduler: SchedulerMixin) -> None:
    """Let ``set_timesteps`` make its numbers on the CPU where the device is a Mac's: float64, which that does not know."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def mended(num_inference_steps: int, device: Any = None, **named: Any) -> None:
        is_mac = str(device).startswith("mps")
        set_timesteps(num_inference_steps, device="cpu" if is_mac else device, **named)
        for name, value in list(vars(scheduler).items()) if is_mac else ():
            if hasattr(value, "is_floating_point") and value.is_floating_point():
                setattr(scheduler, name, value.float().to(device))

    scheduler.set_timesteps = mended


def _mend_spacing(scheduler: SchedulerMixin, is_spaced_anew: bool) -> None:
    """Let ``set_timesteps`` begin at noise with a single step, too, and give no more steps than it is asked for.

    diffusers spaces a single "linspace" or "leading" step at the clean end, where hardly any noise is taken away. Its
    "trailing" steps are numpy.arange(T, 0, -T / n), whose rounding makes one more of some n (61), at timestep -1: not where
    their noise levels are spaced anew, as Karras are.
    """
    set_timesteps, spacing = scheduler.set_timesteps, scheduler.config.timestep_spacing
    last = scheduler.config.num_train_timesteps

    @functools.wraps(set_timesteps)  # diffusers looks at the signature
    def mended(num_inference_steps: int, *rest: Any, **named: Any) -> None:
        steps = num_inference_steps
        is_trailing = steps == 1 or spacing == "trailing"
        scheduler.register_to_config(timestep_spacing="trailing" if is_trailing else spacing)
        if is_trailing and not is_spaced_anew and math.ceil(last / (last / steps)) > steps:
            set_timesteps(math.nextafter(steps, 0), *rest, **named)  # the same spacing, but for a hair
            scheduler.num_inference_steps = steps
        else:
            set_timesteps(steps, *rest, **named)

    scheduler.set_timesteps = mended


_MODEL_FACTS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
)


def apply_preset(generation: GenerationConfig, name: str) -> None:
    """Set the preset's steps, guidance and scheduler. Raises UserError (usage) for an unknown preset."""
    if name not in PRESETS:
        raise usage_error(f"unknown preset '{name}'; there are: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    generation.num_inference_steps = preset.num_inference_steps
    generation.guidance_scale = preset.guidance_scale
    generation.scheduler = preset.scheduler


def list_schedulers() -> str:
    """The table that ``--list-schedulers`` prints."""
    default = find_sampler(GenerationConfig().scheduler)
    lines = [f"{'--scheduler':<15} {'also known as':<14} {'diffusers class':<33} schedules (append _NAME)"]
    for item in SAMPLERS:
        lines.append(f"{item.key:<15} {item.label:<14} {item.class_name:<33} {' '.join(item.schedules) or '-'}")
    lines += ["", f"Default: {default.key} ({default.label}). Names are read as A1111 or diffusers write them.", "", "--preset"]
    for name, preset in PRESETS.items():
        settings = f"{preset.num_inference_steps} steps, guidance {preset.guidance_scale:g}, {preset.scheduler}"
        lines.append(f"{name:<15} {settings:<44} {preset.note}")
    return "\n".join(lines)


def _plain(name: str) -> str:
    """Bring a spelling to our form: "DPM++ 2M Karras", "dpmpp-2m-karras" and "EulerDiscreteScheduler" alike."""
    for sampler in SAMPLERS:
        if name.strip() == sampler.class_name:
            return sampler.key
    plain = re.sub(r"[\s-]+", "_", name.strip().lower()).replace("dpmpp", "dpm++").removesuffix("_scheduler")
    return re.sub(r"^dpm\+\+(?=\d)", "dpm++_", plain)
