"""The numbers of one finished run directory."""

from pathlib import Path
from typing import Any

from halfulp.run import Run


def measure(path: Path) -> dict[str, Any]:
    """Fields of Result that the run directory at `path` decides."""
    summary = Run.open(path, writer=False).summary()
    names = ("steps", "tokens", "parameters", "seconds", "loss_nats", "loss_nats_fp32")
    return {name: summary[name] for name in names if name in summary}
