"""Packages that can be called: `halfulp.check(model, …)` beside `halfulp.check.prices`."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str, function: str) -> None:
    """Calling the module `package` calls `function` of the module `home`, imported on first use.

    Its modules are attributes without an import of their own: `halfulp.check.prices`.
    """

    class Room(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), function)(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            inside = f"{package}.{name}"
            if name.startswith("_") or importlib.util.find_spec(inside) is None:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            return importlib.import_module(inside)

    sys.modules[package].__class__ = Room
