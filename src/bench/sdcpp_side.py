"""The same drawing by stable-diffusion.cpp's ``sd-cli``, which is built from its own sources: ``--sdcpp build/bin/sd-cli``.

Weights in f16; its other attention and its direct convolutions, which are switches there, take two to three times as long on a
CPU. What it prints says how long it loaded and drew. Its peak memory is the system's count; a child's begins with its parent's,
so that a small process of its own starts it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from src.bench.sides import GUIDANCE_SCALE, PROMPT, Drawing, Measured
from src.errors import UserError

SWITCHES = ("--type", "f16", "--sampling-method", "dpm++2m", "--cfg-scale", str(GUIDANCE_SCALE))
STARTER = """
import os, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print("peak", usage.ru_maxrss, "kB", flush=True)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
SAID = (r"loading tensors completed, taking ([\d.]+)s", r"generate_image completed in ([\d.]+)s", r"peak (\d+) kB")


def measure(drawing: Drawing, program: Path) -> Measured:
    """Draw one picture in a process. Raises UserError."""
    sizes = ["-W", str(drawing.size_px), "-H", str(drawing.size_px), "--steps", str(drawing.steps)]
    asked = ["-m", drawing.model, "-p", PROMPT, *sizes, *SWITCHES, "-t", str(os.cpu_count())]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-S", "-c", STARTER, str(program.absolute()), *asked, "-o", str(Path(folder, "picture.png"))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    said = f"{done.stderr}\n{done.stdout}"
    found = [re.search(pattern, said) for pattern in SAID]
    if done.returncode or not all(found):
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith("peak ")]
        raise UserError(f"bench: {program.name} failed: {lines[-1] if lines else 'no message'}")
    load_s, seconds, peak_kib = (float(match[1]) for match in found)
    return Measured(load_s, seconds, seconds, int(peak_kib) * 1024, plan=" ".join(SWITCHES))
