"""Keep the libraries' warnings, bars and chatter off the terminal: what a person reads there is ours, line by line.

diffusers, transformers and huggingface_hub read environment variables when they are imported and keep a logger with a
handler of their own afterwards; some also raise Python warnings and draw bars. So this is called before they are
imported (the variables) and once more after (what the variables do not reach). A variable that the user has set is left
as it is, and so is his choice of warnings (``python -W``, ``PYTHONWARNINGS``).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Library -> the variable that sets its log level (debug | info | warning | error | critical), where it has one.
LIBRARIES = {
    "diffusers": "DIFFUSERS_VERBOSITY",
    "transformers": "TRANSFORMERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "accelerate": "",
    "peft": "",
    "torch": "",
    "bitsandbytes": "",
    "matplotlib": "",
}
SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # src/downloads.py draws its own
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise a warning at every fork
}
_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}

_verbose = False


def silence_libraries(verbose: bool = False) -> None:
    """Let the libraries report errors only. May be called any number of times.

    ``verbose=True`` leaves them as they are, now and in every later call: modules that must be quiet when they are used
    without a command line call this with False, and must not undo a ``--verbose``.
    """
    global _verbose
    _verbose = _verbose or verbose
    if _verbose:
        return
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    for library, variable in LIBRARIES.items():
        level = _LEVELS.get(os.environ.setdefault(variable, "error") if variable else "error", logging.ERROR)
        logging.getLogger(library).setLevel(level)
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        imported = sys.modules.get(f"{library}.utils.logging")
        if level >= logging.ERROR and hasattr(imported, "disable_progress_bar"):
            imported.disable_progress_bar()
