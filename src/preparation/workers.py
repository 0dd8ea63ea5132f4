"""A function over many inputs on several processes: results in order, few in flight, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from typing import Any

from src.errors import ExitCode, UserError
from src.processes import MAX_POOL

MAX_WORKERS = 4  # each takes 75 MB, and 160 MB while it decodes 12 megapixels: all together must stay below 1 GB
_IN_FLIGHT = 8  # for each worker
AGAIN = "run again with --workers 1: what is done stays done"

_state: Any = None
_turn: Any = threading.Lock()  # in a worker: one that all workers share


def process_count(wanted: int | None, items: int) -> int:
    """Processes for so many pictures: as wanted, or one a core that this process may use, at most four; few for few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or min(cores, MAX_WORKERS), (items + 3) // 4))


def work(
    function: Callable[..., Any], state: Any, inputs: Iterable[tuple[Any, ...]], processes: int, again: str = AGAIN
) -> Iterator[Any]:
    """Yield ``function(state, *input)`` for each input, in their order.

    New processes, not forked ones: a fork copies whatever threads and locks the program holds. With one process all is
    done in this one. Raises what ``function`` raises; UserError (out of memory), which ends with ``again``, when a process was
    killed.
    """
    if processes == 1:
        for item in inputs:
            yield function(state, *item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, MAX_POOL), context, _start, (state, context.Lock()))
    try:
        waiting = deque()
        for item in inputs:
            waiting.append(pool.submit(_call, function, item))
            if len(waiting) >= processes * _IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, most likely for want of memory; {again}", ExitCode.OUT_OF_MEMORY
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def taking_turns(if_large: bool) -> Iterator[None]:
    """What is ``if_large`` is done by one worker at a time, so that their memory does not add up."""
    with _turn if if_large else nullcontext():
        yield


def _start(state: Any, turn: Any) -> None:
    """In a new worker: Ctrl-C is for the parent to answer, and a parent that was killed takes its workers with it."""
    global _state, _turn
    _state, _turn = state, turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., Any], item: tuple[Any, ...]) -> Any:
    return function(_state, *item)
