"""One process or several, as a launcher (accelerate, torchrun, mpirun) says in the environment; torch only to wait, and to
be told its threads.

Several processes share out a run's pictures without a word between them: the share follows from what was typed alone, and
not from what is finished already, which each would see at another moment. So none is drawn twice and none is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from src.errors import usage_error

# The names that accelerate itself looks for, in its order: torchrun's, then those of Intel MPI, Open MPI and MVAPICH2.
_INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_INDEX = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

PATIENCE = timedelta(days=7)  # for the process that has the longest share
LAUNCHER_PATIENCE = timedelta(seconds=60)  # the launcher's own store answers at once, or the launcher is gone
LOOK_EVERY_S = 0.1
ONE_ALONE = "share   accelerate started one process alone; --multi_gpu starts as many as are asked for, on a CPU, too"
MAX_POOL = 61  # that Windows lets one process wait for: a pool of more is refused there
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Processes:
    """Where this process stands among those of its run; counted from 0. The defaults are those of a process alone."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # on this machine, which is also the number of its card
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks for all of what all do alike."""
        return self.index == 0

    @property
    def are_several(self) -> bool:
        return self.count > 1

    def share(self, total: int) -> range:
        """The part of ``range(total)`` that is this process's: consecutive numbers, the same count within one."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def cpu_threads(self, environment: Mapping[str, str] = os.environ) -> int | None:
        """Threads to compute with, so that together the processes use every core once; None: leave it as it is.

        accelerate and torchrun set OMP_NUM_THREADS to 1 where nobody has chosen, which leaves the other cores idle; accelerate
        also for a process alone. Launchers of MPI bind each process to cores of its own, fewer than they have themselves: those
        are not divided again. A container's quota, of time on cores, is not seen by torch: it would start a thread for each
        core of the machine, and they would wait for each other.
        """
        chosen, is_alone = environment.get("OMP_NUM_THREADS"), self.local_count == 1
        if chosen is not None and (chosen != "1" or (is_alone and "ACCELERATE_MIXED_PRECISION" not in environment)):
            return None
        import psutil

        usable, of_launcher = _usable_cores(0), _usable_cores(os.getppid())
        cores = max(1, min(usable, psutil.cpu_count(logical=False) or usable))
        quota = quota_cores()
        if is_alone and chosen is None:  # torch takes every core by itself
            return quota if quota is not None and quota < cores else None
        own = cores if usable < of_launcher else max(1, cores // self.local_count)
        return own if quota is None else min(own, max(1, quota // self.local_count))

    def set_threads(self) -> None:
        """Let torch compute with ``cpu_threads``."""
        if (threads := self.cpu_threads()) is not None:
            import torch

            torch.set_num_threads(threads)

    def meet(self) -> None:
        """Wait until every process has come here.

        A launcher that sees one process fail ends the others at once, in the middle of their pictures: so nobody leaves
        before all are done. Processes that were started by hand have no address to meet at, and nobody who would end them.
        """
        if not self.are_several or "MASTER_ADDR" not in os.environ:
            return
        from torch.distributed import rendezvous

        own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # then the first process keeps it
        with contextlib.suppress(RuntimeError):  # torch's DistError: whoever kept the store was killed
            patience = PATIENCE if own_store else LAUNCHER_PATIENCE
            store, _, _ = next(rendezvous("env://", self.index, self.count, timeout=patience))
            names = ("here", "leaving") if own_store and self.is_first else ("here",)  # others still have to ask the store
            for name in ("here", "leaving"):
                arrived = store.add(name, 1)
                while name in names and arrived < self.count:  # and not store.wait, which Ctrl-C cannot end
                    time.sleep(LOOK_EVERY_S)
                    arrived = store.add(name, 0)

    def end_with_launcher(self) -> None:
        """Let a launcher that is killed take this process with it: a second start would draw the same pictures beside it."""
        if self.are_several and "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _usable_cores(process: int) -> int:
    """How many cores a process may use; 0 stands for this one. Where that cannot be asked, all."""
    try:
        return len(os.sched_getaffinity(process))
    except (AttributeError, OSError):  # macOS and Windows; a launcher that has ended
        return os.cpu_count() or 1


def control_groups(kind: str, cgroup: str | None = None, root: Path = CONTROL_GROUPS) -> Iterator[Path]:
    """Folders in which the limits of this process's control group stand, a container's for one; the nearest first.

    ``cgroup`` stands for the text of /proc/self/cgroup. Of version 2, and of version 1 where that is mounted; there ``kind``
    ("memory", "cpu") has a folder of its own.
    """
    lines = (system_text(Path("/proc/self/cgroup")) if cgroup is None else cgroup).splitlines()
    own = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "")
    yield from (root / own.lstrip("/"), root, root / kind)


def quota_cores(cgroup: str | None = None, root: Path = CONTROL_GROUPS) -> int | None:
    """Cores' worth of time that a control group is given, rounded up; None where none has a limit. As ``control_groups``."""
    found = []
    for folder in control_groups("cpu", cgroup, root):
        names = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        for words in (" ".join(system_text(folder / name) for name in group).split() for group in names):
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # "max", -1: no limit
                found.append(math.ceil(int(words[0]) / int(words[1])))
    return min(found, default=None)


def system_text(path: Path) -> str:
    """The text of a file in which the system tells of itself; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


ALONE = Processes()


def from_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """Which of how many processes this is. Raises UserError (usage) where the environment contradicts itself."""
    count = _number(_COUNT, 1, environment)
    index = _number(_INDEX, None if count > 1 else 0, environment)
    local_count = _number(_LOCAL_COUNT, count, environment)
    local_index = _number(_LOCAL_INDEX, index % max(1, local_count), environment)
    if not 0 <= index < count or not 0 <= local_index < local_count:
        raise usage_error(
            f"the environment says process {index} of {count}, on this machine {local_index} of {local_count}, counted from 0; "
            "unset RANK and WORLD_SIZE, or start the processes with accelerate launch"
        )
    return Processes(index, count, local_index, local_count)


def is_one_of_many_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate was asked for several processes and started this one alone, as it does with ``--cpu``."""
    was_asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    return was_asked and not any(name in environment for name in _COUNT)


def _number(names: tuple[str, ...], default: int | None, environment: Mapping[str, str]) -> int:
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        if default is None:
            raise usage_error(
                f"the environment says {_number(_COUNT, 1, environment)} processes and not which this is; set RANK, "
                "or unset WORLD_SIZE"
            )
        return default
    try:
        return int(environment[name])
    except ValueError:
        raise usage_error(f"{name}={environment[name]!a} in the environment is not a number; unset it") from None
