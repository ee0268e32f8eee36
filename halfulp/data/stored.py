"""Token arrays with what is known about them, before the split is made."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """Memory-mapped tokens. `ends` [documents] and `held_out` [documents] are None without marks.

    `sha256` names the content; `facts` goes into `Data.describe()`.
    """

    arrays: tuple[np.ndarray, ...]
    sha256: tuple[str, ...]
    vocab: int
    ends: np.ndarray | None
    held_out: np.ndarray | None
    facts: dict[str, Any] = field(default_factory=dict)
