"""What a person is told when something cannot be done, and the exit code that goes with it."""

from __future__ import annotations

from enum import IntEnum

_OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA's own, and MPS's
    "Invalid buffer size",  # MPS, of one buffer larger than Metal makes
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # since cuDNN 9
    "unable to find an engine to execute this computation",  # cuDNN, when none of its algorithms found room
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
)


class ExitCode(IntEnum):
    """The program's exit codes; a shell script can branch on them."""

    OK = 0
    FAILURE = 1
    USAGE = 2  # a wrong flag, value or configuration
    OUT_OF_MEMORY = 3
    NOT_FOUND = 4  # a model, LoRA or file that is not there (or not cached, while offline)
    PARTLY_FAILED = 5  # some jobs of a batch failed, the others are done
    REFUSED = 6  # an input that is there but must not or cannot be used: pickle, wrong family, damaged, hostile
    DIVERGED = 7  # a training whose loss is no number any more
    INTERRUPTED = 130  # Ctrl-C
    TERMINATED = 143  # SIGTERM


class UserError(Exception):
    """A message for the person at the terminal: one line that names the thing, the cause and the next step.

    Raise it with the exit code that the command line shall end with. It is never a programming error:
    those keep their own exceptions and, with ``--debug``, their traceback.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def usage_error(message: str) -> UserError:
    """A wrong flag, value or configuration key."""
    return UserError(message, ExitCode.USAGE)


def not_found(message: str) -> UserError:
    """A file, folder, model or LoRA that is not where it was said to be."""
    return UserError(message, ExitCode.NOT_FOUND)


def refused(message: str) -> UserError:
    """An input that is there but must not or cannot be used."""
    return UserError(message, ExitCode.REFUSED)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many shapes of "out of memory", on cards and on the CPU."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def explain_unexpected(error: BaseException) -> str:
    """One line for an error that nobody foresaw: a fault of the program, to be looked at with ``--debug``."""
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {first_line}; run again with --debug to see where"
