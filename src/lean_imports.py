"""Imports diffusers and transformers without what drawing never calls: a third of the time, in a process that is ours alone.

Both libraries import much for other purposes: torch's compiler, sharding over machines, statistics, adapters for training.
While they are imported, stand-ins answer in place of those; afterwards who imports the real module gets it, but for the
compiler: with nothing to compile, what it would leave alone is left alone. Only ``main.py`` does
this: whoever imports ``src.generator`` may want the libraries whole.

Seconds until a picture can be loaded, two cores of an AMD EPYC (Zen 5): 6.6 whole, 5.2 without garbage collection, 2.3 so.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from src.config import OptimizationConfig

# With these versions it is tested; others are imported whole.
TESTED = {"torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0"}
# Not asked for by drawing. A package that is hidden counts as not installed.
HIDDEN = ("peft", "bitsandbytes")
COMPILER = "torch._dynamo"
STOOD_IN_FOR = (
    COMPILER,
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "scipy.optimize",
    "scipy.stats",
)
WHOLE = "SD_IMPORT_WHOLE"  # an environment variable: set to anything, all is imported
# Packages that the libraries import where they find them, and that look into torch deeper than stand-ins reach.
UNTRIED = ("torchvision", "xformers", "flash_attn", "flash_attn_interface", "sageattention", "torchao", "optimum", "kernels")


@contextlib.contextmanager
def for_drawing(options: OptimizationConfig) -> Iterator[None]:
    """Import the libraries within this. Whole where ``options`` or the installed packages need more than drawing does."""
    gc.disable()  # hundreds of thousands of objects that stay for good are looked through again and again
    try:
        if _can_be_lean(options):
            with _hidden(), _stand_ins():
                yield
                _import_samplers()
        else:
            yield
    finally:
        gc.freeze()
        gc.enable()


def _can_be_lean(options: OptimizationConfig) -> bool:
    if options.enable_torch_compile or options.quantize or "torch" in sys.modules or os.environ.get(WHOLE):
        return False
    try:
        is_tested = all(version(name).partition("+")[0] == tested for name, tested in TESTED.items())
    except PackageNotFoundError:
        return False
    return is_tested and not any(importlib.util.find_spec(name) for name in UNTRIED)


def _import_samplers() -> None:
    """diffusers imports them when they are first named, and they statistics."""
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    for name in KarrasDiffusionSchedulers.__members__:
        getattr(diffusers, name)


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    names = [name for name in HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # None: an import of it fails, and it cannot be found
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    _Unused.is_import = True
    try:
        yield
    finally:
        _Unused.is_import = False
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            if name.startswith(COMPILER):  # later imports would cost what these saved
                continue
            module = sys.modules.pop(name)
            parent, _, leaf = name.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(leaf) is module:
                delattr(sys.modules[parent], leaf)


class _Kind(type):
    """Whatever is read from a stand-in has any attribute."""

    is_import = False

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Unused(metaclass=_Kind):
    """Any name of a stand-in: a class that nothing is an instance of, and a decorator that changes nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        if arguments and callable(arguments[0]):
            return arguments[0]
        if _Unused.is_import:
            return cls
        raise RuntimeError(f"a part of torch was needed that had been left out to start faster; set {WHOLE}=1, and report it")

    def __class_getitem__(cls, item: Any) -> type:
        return cls


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused


class _Finder(MetaPathFinder, Loader):
    """Finds a stand-in for each of STOOD_IN_FOR and all below it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_unused = any(name == unused or name.startswith(f"{unused}.") for unused in STOOD_IN_FOR)
        return ModuleSpec(name, self, is_package=True) if is_unused else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""
