"""Packages that can be called: `halfulp.check(model, …)` beside `halfulp.check.prices`."""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str, function: str) -> None:
    """Calling the module `package` calls `function` of the module `home`, imported on first use."""

    class Room(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), function)(*args, **kwargs)

    sys.modules[package].__class__ = Room
