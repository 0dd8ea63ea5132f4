"""What was typed -> what to do: requests and jobs; everything checked that can be without a model."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any

from src import devices, files, memory_plan, model_source
from src.arguments import FLAG_OF, apply_typed, parse_job
from src.config import AppConfig, check_machine
from src.errors import UserError, usage_error
from src.jobs import STDIN, Journal, job_id, read_job_lines, source_name, split_flags
from src.named_files import NamedFiles, tagged_loras
from src.processes import ALONE, Processes
from src.prompts import clean_prompt, unsupported_syntax, wildcard_files
from src.request import LoraChoice, PictureRequest
from src.session import Job, Wishes

JOURNAL = ".finished.jsonl"
_LATER = {
    "quantize": None, "deep_cache": 1, "token_merging": 0.0, "guidance_start": 0.0, "guidance_end": 1.0,
    "wildcards_sha256": {},
}  # fmt: skip
_SHORT_FLAGS = frozenset(name for name in FLAG_OF if not name.startswith("--"))

Say = Callable[[str], None]


def named_files(config: AppConfig) -> NamedFiles:
    """The files that the orders of this run name."""
    return NamedFiles(config.paths.folder("lora"), config.paths.folder("cache") / "hashes.json")


def read_request(config: AppConfig, typed: dict[str, Any], say: Say, named: NamedFiles | None = None) -> PictureRequest:
    """One checked request; the files that it names are there and can be read, and so are those of its prompt's tags."""
    named = named or named_files(config)
    if "generation.strength" in typed and "init_image" not in typed:
        raise usage_error("--strength says how much of a picture is redrawn; give the picture with --init-image FILE")
    request = PictureRequest.from_config(
        config.generation,
        typed.get("prompt", ""),
        loras=tuple(LoraChoice.parse(text) for text in typed.get("lora", ())),
        init_image=typed.get("init_image"),
        mask_image=typed.get("mask"),
        wildcards=typed.get("wildcards"),
    )
    for choice in request.loras:
        named.check_adapter(choice.path)
    for name in chain(*tagged_loras(request, config)):
        named.check_adapter(named.tagged(name))
    for path in (request.init_image, request.mask_image):
        if path is not None:
            named.check_picture(path)
    if request.token_merging and config.optimization.enable_torch_compile:
        raise usage_error("--token-merging and --torch-compile exclude each other; leave one of the two out")
    if request.prompt_weights and (message := unsupported_syntax(request.prompt)):
        say(f"prompt  {message}")
    for line in request.idle_settings:
        say(f"idle    {line}")
    return request


def weights_here(config: AppConfig, named: NamedFiles) -> dict[str, str]:
    """SHA-256 of a model and a VAE that lie on this disk: their names stay when they are trained on.

    Not their time of change, which another machine's copy does not share; remembered, so that it is read once.
    """
    model, cache = config.model, config.paths.folder("cache")
    found = {"model_sha256": model_source.files_of(model.model_id)}
    if found["model_sha256"]:  # what cannot be loaded is refused before it is read
        model_source.resolve(model.model_id, cache, model.offline, include_safety_checker=False)
    if model.vae:
        found["vae_sha256"] = model_source.vae_files_of(model.vae)
        if found["vae_sha256"]:
            model_source.resolve_vae(model.vae, cache, model.offline)
    return {name: named.joint_sha256(paths) for name, paths in found.items() if paths}


def job_settings(request: PictureRequest, config: AppConfig, named: NamedFiles, weights: Mapping[str, str]) -> dict[str, Any]:
    """What decides how a job's pictures look, for its id: files by their content. Another batch size draws the same.

    ``weights`` are those of ``weights_here``.
    """
    paths = {"init_image": request.init_image, "mask_image": request.mask_image}
    settings = {item.name: getattr(request, item.name) for item in fields(request) if item.name not in ("batch_size", "loras")}
    settings |= {name: path and named.sha256(path) for name, path in paths.items()}
    settings["loras"] = [[named.adapter_sha256(choice.path), choice.weight] for choice in request.loras]
    tagged = chain(*tagged_loras(request, config))
    settings["tagged"] = [[name, named.adapter_sha256(named.tagged(name))] for name in tagged]
    model = config.model
    settings |= {name: getattr(model, name) for name in ("model_id", "revision", "vae", "architecture", "precision")}
    settings |= weights
    if request.wildcards:
        texts = clean_prompt(f"{request.prompt}\n{request.negative_prompt}")
        options = wildcard_files(texts, config.paths.folder("wildcards"))
        settings["wildcards_sha256"] = {name: named.sha256(path) for name, path in options.items()}
    settings["safety_checker"] = not config.optimization.disable_safety_checker
    settings["quantize"] = config.optimization.quantize
    # Left out where they are not asked for: jobs that an earlier version finished keep their ids.
    return {name: value for name, value in settings.items() if name not in _LATER or value != _LATER[name]}


# -- jobs


def read_jobs(typed: dict[str, Any], config: AppConfig, say: Say) -> list[Job]:
    """The one request of the command line, or one a line of the job file; a line that is wrong carries its error."""
    if "prompts" not in typed:
        return [Job(read_request(config, typed, say))]
    if "prompt" in typed:
        raise usage_error("a prompt and --prompts FILE are given; the file's lines are the prompts, so leave the other out")
    lines = read_job_lines(typed["prompts"], sys.stdin)
    jobs, seen, named = [], Counter(), named_files(config)
    weights = weights_here(config, named)
    for line in lines:
        try:
            request = _read_job(line.text, typed, config, lambda text, number=line.number: say(f"line {number}: {text}"), named)
            settings = job_settings(request, config, named, weights)
        except UserError as error:
            jobs.append(Job(error=error, line=line.number))
            continue
        key = job_id(settings, 0)
        jobs.append(Job(request, line=line.number, id=job_id(settings, seen[key])))
        seen[key] += 1
    if not jobs:
        raise usage_error(f"{source_name(typed['prompts'])}: holds no job; write a prompt a line")
    return jobs


def _read_job(text: str, typed: dict[str, Any], config: AppConfig, say: Say, named: NamedFiles) -> PictureRequest:
    """A line is a prompt or flags; what it does not say is as on the command line."""
    words = split_flags(text, _SHORT_FLAGS)
    own = {"prompt": text} if words is None else parse_job(words)
    if words is None:
        for match in re.finditer(r"(?<=\s)--[\w-]+", text):
            if match[0].replace("_", "-") in FLAG_OF:
                say(f"'{match[0]}' inside a bare prompt is drawn as text; begin the line with --prompt")
    config = copy.deepcopy(config)
    apply_typed(config, own)
    shared = {name: value for name, value in typed.items() if name in ("lora", "init_image", "mask")}
    return read_request(config, {**shared, **own}, say, named)


def check_sharing(typed: dict[str, Any], processes: Processes) -> None:
    """Raise UserError (usage) for what several processes cannot do together."""
    if not processes.are_several:
        return
    if typed.get("prompts") == STDIN:
        raise usage_error(f"--prompts -: {processes.count} processes cannot read one input; write the jobs into a file")
    if "grid" in typed:
        raise usage_error(f"--grid: each of the {processes.count} processes sees its own pictures alone; leave it out")


def share(jobs: Sequence[Job], processes: Processes) -> tuple[list[Job], int]:
    """What this process draws of the jobs, and how many pictures come before: it is given consecutive ones of them all.

    A job without a seed is not divided, because its pictures hang together by one that is drawn; it goes where its first
    picture goes. A line that is wrong counts as one picture. Raises UserError (usage) for an order that cannot be shared.
    """
    if not processes.are_several:
        return list(jobs), 0
    counts = [1 if job.request is None else job.request.num_images for job in jobs]
    mine, parts, first = processes.share(sum(counts)), [], 0
    for job, count in zip(jobs, counts):
        if job.request is not None and job.request.seed is not None:
            own = range(max(mine.start - first, 0), min(mine.stop - first, count))
        else:
            own = range(count if first in mine else 0)
            if job.line is None and count > 1:
                raise usage_error(f"{processes.count} processes draw one order together only with a seed; add --seed N")
        if own:
            parts.append(replace(job, share=own))
        first += count
    return parts, mine.start


def check_surroundings(typed: dict[str, Any], config: AppConfig, processes: Processes = ALONE) -> Wishes:
    """What must be right before a model is loaded: the output folder can be written, the model's name means something."""
    if typed.get("preview", 1) < 1:
        raise usage_error(f"--preview {typed['preview']}: give the number of steps between previews, 1 or more")
    check_machine(config.model)
    memory_plan.check_switches(config.optimization)
    if config.optimization.quantize and config.model.device == "cpu":
        raise memory_plan.no_card_to_quantize_on(config.optimization.quantize)
    memory_plan.check_device(config.optimization, config.model.device)
    if config.optimization.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise usage_error("--quantize needs the package bitsandbytes; pip install bitsandbytes, or leave --quantize out")
    devices.pick_precision(config.model.precision, on_card=config.model.device != "cpu", cpu_bf16=False)
    folder = files.check_writable_folder(config.paths.folder("outputs"))
    files.check_stem(folder, config.paths.prefix, "00000000_000000_000")
    model, cache = config.model, config.paths.folder("cache")
    checker = not config.optimization.disable_safety_checker
    model_source.resolve(model.model_id, cache, model.offline, revision=model.revision, include_safety_checker=checker)
    if model.vae:
        model_source.resolve_vae(model.vae, cache, model.offline)
    journal = None
    if "prompts" in typed:
        journal = Journal(folder / JOURNAL, processes.index)
    return Wishes(
        folder,
        config.paths.prefix,
        grid="grid" in typed,
        preview_every=typed.get("preview") if processes.is_first else None,
        metadata="no_metadata" not in typed,
        debug="debug" in typed,
        journal=journal,
    )
