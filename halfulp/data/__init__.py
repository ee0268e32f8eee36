"""Corpora as token streams: documents, tokenizers, token files and resumable sampling."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfulp.data.config import DataConfig
    from halfulp.data.open import Data, open_data
    from halfulp.data.tokens import TokenSource

__all__ = ["Data", "DataConfig", "TokenSource", "open_data"]

_HOMES = {"Data": "open", "DataConfig": "config", "TokenSource": "tokens", "open_data": "open"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
