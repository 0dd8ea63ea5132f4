"""The same drawing by stable-diffusion.cpp's ``sd-cli``, which is built from its own sources: ``--sdcpp build/bin/sd-cli``.

Weights in f16; its other attention and its direct convolutions, which are switches there, take two to three times as long on a
CPU. What it prints says how long it loaded and drew; its peak memory is the system's count of that process.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from src.bench.sides import GUIDANCE_SCALE, PROMPT, Drawing, Measured
from src.errors import UserError

SWITCHES = ("--type", "f16", "--sampling-method", "dpm++2m", "--cfg-scale", str(GUIDANCE_SCALE))


def measure(drawing: Drawing, program: Path) -> Measured:
    """Draw one picture in a process. Raises UserError."""
    sizes = ["-W", str(drawing.size_px), "-H", str(drawing.size_px), "--steps", str(drawing.steps)]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+b") as log:
        command = [
            str(program.absolute()),
            "-m",
            drawing.model,
            "-p",
            PROMPT,
            *sizes,
            *SWITCHES,
            "-t",
            str(torch.get_num_threads()),
        ]
        process = subprocess.Popen([*command, "-o", str(Path(folder, "picture.png"))], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().decode(errors="replace")
    load = re.search(r"loading tensors completed, taking ([\d.]+)s", said)
    drawn = re.search(r"generate_image completed in ([\d.]+)s", said)
    if process.returncode or not load or not drawn:
        raise UserError(f"bench: {program.name} failed: {(said.strip() or 'no message').splitlines()[-1]}")
    seconds = float(drawn[1])
    return Measured(float(load[1]), seconds, seconds, usage.ru_maxrss * 1024)
