"""Runs parts of the authors' code from a copy, on a CPU and without packages that they need elsewhere."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def load(copy: Path, module: str, *, without: tuple[str, ...] = ()) -> Any:
    """Import a module of a copy.

    Args:
        copy: the folder that the module's imports are relative to. without: packages that it imports and
            that what is used of it does not need; empty ones take their place.
    """
    for name in without:
        sys.modules.setdefault(name, _Empty(name))
    sys.path.insert(0, str(copy))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(copy))


class _Empty(ModuleType):
    """A module in which everything is there and nothing does anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (dict,), {"__getattr__": dict.get, "__setattr__": dict.__setitem__})


class OnCpu:
    """Stands for ``torch`` in a module that writes ``device="cuda"``."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "ones", "tensor"):
            return found

        def on_cpu(*values: Any, device: Any = None, **how: Any) -> Any:
            return found(*values, **how)

        return on_cpu
