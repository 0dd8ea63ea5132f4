"""The door of ``python -m src.scratch``: a small Stable Diffusion from nothing, phase by phase."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from src.config import parse_assignment, set_from, set_value
from src.doors import answer
from src.errors import ExitCode, usage_error
from src.flags import CommandLine, Flag, switch
from src.model_files import EMBEDDED
from src.scratch.settings import PHASES, ScratchSettings, check, model_folder
from src.terminal import Terminal

USAGE = "python -m src.scratch all|PHASE [options]"
TOOLS = ("interpolate", "reconstruct", "around")
UNPACK = "unpack"
_RECIPE = ("work", "config", "set", "quick", "restart")
TAKES: dict[str, tuple[str, ...]] = {  # the flags of each verb; others would change nothing
    **dict.fromkeys(PHASES, _RECIPE), "all": (*_RECIPE, "out"), "assemble": ("work", "config", "set", "quick", "out"),
    "interpolate": ("model", "out", "prompt", "picture", "seed", "count"), "reconstruct": ("model", "out", "picture"),
    "around": ("model", "out", "picture", "seed", "count"), UNPACK: ("model", "work", "other_scenes"),
}  # fmt: skip
DESCRIPTION = f"""Train a small Stable Diffusion from random weights on pictures that are drawn here.

phases: {", ".join(PHASES)}; each needs those before it. "all" does what is not done yet, so the same command goes on
after Ctrl-C or a kill. tools for the latent space: {", ".join(TOOLS)}; each writes one PNG.
{UNPACK}: the parts of a model that was assembled become phases again, so that its U-Net can go on learning."""
EPILOG = """examples:
  python -m src.scratch all --out models/embedded          replaces the model that ships: about four hours on two cores
  python -m src.scratch all --quick                        the lesson: 20 minutes on two cores without bf16
  python -m src.scratch vae --set steps=3000 --restart     one phase anew, with other numbers
  python -m src.scratch scenes --work outputs/more         a model that was assembled goes on learning: scenes as it had them,
  python -m src.scratch unpack --model models/mine --work outputs/more                       its parts,
  python -m src.scratch unet --work outputs/more --set begin_from=models/mine --set steps=5000      its U-Net,
  python -m src.scratch assemble --work outputs/more --out models/more                       and a model again
  python -m src.scratch interpolate --model models/embedded --prompt "a red circle on a white background" \\
      --prompt "a blue star on a white background"
  python -m src.scratch interpolate --picture a.png --picture b.png
  python -m src.scratch reconstruct --picture a.png        a picture through the VAE and back
  python -m src.scratch around --picture a.png             decoded samples around its latents

exit codes: 0 done, 1 failure, 2 wrong usage, 3 out of memory, 4 not found, 6 input refused, 7 the loss
diverged, 130 interrupted"""
FLAGS: dict[str, tuple[Flag, ...]] = {
    "folders": (
        Flag(("--out",), "the model's folder (default: WORK/model); of tools, the picture's (outputs)", metavar="DIR"),
        Flag(("--work",), "where phases keep what they learn (default: outputs/scratch, or scratch-quick)", metavar="DIR"),
    ),
    "recipe": (
        Flag(("--config",), "settings from a YAML file", metavar="FILE", repeat=True),
        Flag(("--set",), "one setting: vae.steps=3000, or steps=3000 of the named phase", metavar="NAME=VALUE", repeat=True),
        switch("--quick", "configs/scratch/quick.yaml: the lesson: small and soon done"),
        switch("--restart", "forget what the named phase has learnt"),
        switch("--other-scenes", "of unpack: the model goes on with scenes that its parts did not learn from"),
    ),
    "tools": (
        Flag(("--model",), "a model's folder (default: models/embedded)", metavar="DIR"),
        Flag(("--prompt",), "to interpolate between two of them", metavar="TEXT", repeat=True),
        Flag(("--picture",), "a picture's file; two to interpolate between them", metavar="FILE", repeat=True),
        Flag(("--seed",), "of the noise (default: 0)", kind=int, metavar="N"),
        Flag(("--count",), "pictures in the row (default: 8)", kind=int, metavar="N"),
    ),
    "answers": (switch("--help", "this text"), switch("--debug", "the traceback of an error")),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Train, or use a tool, and return the exit code."""
    return answer(argv, _run, "interrupted; the same command goes on from the last checkpoint")


def command_line() -> CommandLine:
    return CommandLine(FLAGS, prog="scratch", usage=USAGE, description=DESCRIPTION, epilog=EPILOG, words="PHASE")


def _run(argv: Sequence[str], terminal: Terminal) -> int:
    typed = command_line().parse(["--help" if word == "-h" else word for word in argv])
    if "help" in typed:
        print(command_line().help_text())
        return ExitCode.OK
    verb = typed.get("words")
    if verb not in ("all", *PHASES, *TOOLS, UNPACK):
        tools = ", ".join((*TOOLS, UNPACK))
        raise usage_error(f"'{verb or ''}' is no phase; choose all, {', '.join(PHASES)}, or a tool: {tools}")
    _check_flags(typed, verb)
    if verb in TOOLS:
        from src.scratch import latent_space

        return latent_space.run(verb, typed, terminal)
    if "restart" in typed and verb == "all":
        raise usage_error("--restart is of one phase, such as unet --restart; to begin all anew, take another --work folder")
    settings = read_settings(typed, verb)
    work_folder = Path(typed.get("work", "outputs/scratch-quick" if "quick" in typed else "outputs/scratch")).expanduser()

    from src import quiet

    quiet.silence_libraries()
    from src.scratch.learning import device_of
    from src.scratch.phases import Work

    if verb == UNPACK:
        from src.scratch.assemble import unpack

        model = model_folder(typed.get("model"))
        unpack(model, Work(work_folder, terminal.say), "other_scenes" in typed)
        terminal.say(f"{model}: its parts are in {work_folder}")
        return ExitCode.OK
    device_of(settings.machine)  # refused now if it is not there, not after an hour
    work = Work(work_folder, terminal.say)
    if settings.unet.begin_from is not None and verb in ("all", "unet") and not work.is_done("unet", settings):
        from src.scratch.card import check_begin

        check_begin(Path(settings.unet.begin_from).expanduser(), settings.unet, work)  # before anything is forgotten or learnt
    out = Path(typed.get("out", work_folder / "model")).expanduser()
    if verb in ("all", "assemble"):
        _check_out(out, work_folder)
    if "restart" in typed:
        work.inputs(verb)  # nothing is forgotten if it could not be learnt again
        work.restart(verb)
    _check_beginning(work, settings, PHASES[:2] if verb == "all" else [verb] if verb != "assemble" else ())
    for phase in PHASES if verb == "all" else (verb,):
        if phase != "assemble" and work.is_done(phase, settings):
            terminal.say(f"{phase:<9} is done ({work.of(phase) / 'final'})")
            if phase == "unet" and (count := work.result(phase).facts["settings"].get("examined")) != settings.unet.examined:
                terminal.say(
                    f"unet      was examined with {count} pictures and is not again: evaluate adherence --count N does"
                )
            continue
        work.inputs(phase)
        terminal.say(f"{phase:<9} begins")
        _do(phase, work, settings, out, terminal)
    return ExitCode.OK


def _check_beginning(work: Any, settings: ScratchSettings, phases: Sequence[str]) -> None:
    """Refuse to draw other scenes, or learn other parts, under what was learnt from those. Raises UserError (usage)."""
    from src.scratch.phases import NEEDS

    for phase in phases:
        is_there = (work.of(phase) / "final").exists() and not any(work.of(phase).glob("checkpoint-*"))  # which say more
        later = [name for name in PHASES[:-1] if phase in NEEDS[name]]
        if is_there and not work.is_done(phase, settings) and any((work.of(name) / "final").exists() for name in later):
            raise usage_error(
                f"{work.folder}: {phase} is there with other settings, and more was learnt from it; give another --work, or "
                f"run python -m src.scratch {phase} --restart --work {work.folder} first, with your settings"
            )


def _check_out(out: Path, work_folder: Path) -> None:
    """Refuse, before hours of learning, a place that would move what is needed aside. Raises UserError (usage)."""
    for needed in (work_folder, EMBEDDED.parent, Path.cwd()):
        if needed.resolve().is_relative_to(out.resolve()):
            raise usage_error(f"--out {out}: {needed} lies there and would be moved aside; name a folder of the model's own")


def _check_flags(typed: dict[str, Any], verb: str) -> None:
    """Refuse flags that would change nothing."""
    known = {*TAKES[verb], "words", "debug"}
    if verb == "interpolate" and "picture" in typed and "prompt" not in typed:  # nothing is drawn from noise
        verb, known = "interpolate between pictures", known - {"seed"}
    for name in sorted(typed.keys() - known):
        hint = "; the training's is --set unet.seed=N" if name == "seed" and verb in ("all", *PHASES) else ""
        raise usage_error(f"--{name} changes nothing for {verb}{hint}")


def read_settings(typed: dict[str, Any], verb: str) -> ScratchSettings:
    """Defaults, files and ``--set``; a bare name is of the phase that is named. Raises UserError (usage)."""
    settings = ScratchSettings()
    set_from(settings, *(["scratch/quick"] if "quick" in typed else []), *typed.get("config", ()))
    for text in typed.get("set", ()):
        name, value = parse_assignment(text)
        set_value(settings, name if "." in name or verb == "all" else f"{verb}.{name}", value)
    check(settings)
    return settings


def _do(phase: str, work: Any, settings: ScratchSettings, out: Path, terminal: Terminal) -> None:
    """Import the room of a phase, and let it work."""
    if phase == "assemble":
        from src.scratch.assemble import assemble

        assemble(work, out, terminal)
        return
    import importlib

    rooms = {
        "scenes": ("pictures", "draw_scenes"), "tokenizer": ("tokenizer", "learn_tokenizer"), "vae": ("vae", "learn_vae"),
        "clip": ("clip", "learn_clip"), "unet": ("unet", "learn_unet"),
    }  # fmt: skip
    module, function = rooms[phase]
    learn: Callable[..., dict[str, Any]] = getattr(importlib.import_module(f"src.scratch.{module}"), function)
    figures = learn(work, settings, terminal)
    terminal.say(f"{phase:<9} done: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
