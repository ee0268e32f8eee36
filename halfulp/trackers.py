"""TensorBoard and trackio as writers beside events.jsonl; both write on this machine only."""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfulp.errors import RunError, require
from halfulp.run import Tracker

# Shares of a counter row: name of the curve → (count, out of).
_SHARES = {
    "saturated": ("saturated", "n"),
    "underflow": ("underflow", "n"),
    "lost_updates": ("lost_updates", "asked"),
}


def open_trackers(names: Sequence[str], run_dir: str | Path) -> list[Tracker]:
    """One writer per name, "tensorboard" or "trackio".

    TensorBoard event files go to `run_dir`/tensorboard; trackio's database stays where trackio
    keeps it (TRACKIO_DIR), project "halfulp", one run per run directory.
    RunError for an unknown name, MissingExtraError when the package is not installed.
    """
    kinds = {"tensorboard": TensorBoard, "trackio": Trackio}
    for name in names:
        if name not in kinds:
            raise RunError(f"tracker {name!r} does not exist. Known: {', '.join(kinds)}.")
    return [kinds[name](Path(run_dir)) for name in names]


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an event as named curves.

    A number `x` of event `step` is "step/x". Counter rows become the largest share per block,
    such as "counters/lost_updates/layers.1.qk".
    """
    kind = event["event"]
    if kind == "counters":
        return _counters([*event.get("gemms", ()), *event.get("optimizer", ())])
    return {
        f"{kind}/{key}": float(value)
        for key, value in event.items()
        if key not in ("event", "time", "step", "world")
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _counters(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for row in rows:
        for name, (count, total) in _SHARES.items():
            if row.get(total) and count in row:
                key = f"counters/{name}/{row['block']}"
                largest[key] = max(largest.get(key, 0.0), row[count] / row[total])
    return largest


class TensorBoard:
    """Event files under `run_dir`/tensorboard."""

    def __init__(self, run_dir: Path):
        require("tensorboard", "track")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, event: Mapping[str, Any]) -> None:
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event.get("step", 0), walltime=event["time"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of the local trackio project "halfulp"."""

    def __init__(self, run_dir: Path):
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            if os.environ.get(name):
                raise RunError(
                    f"tracker 'trackio' writes on this machine only, but {name} is set and would "
                    "upload the run. Unset it; `trackio sync` uploads later."
                )
        self._trackio = require("trackio", "track")
        with _quiet():
            self._run = self._trackio.init(
                project="halfulp",
                name=run_dir.resolve().name,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, event: Mapping[str, Any]) -> None:
        values = scalars(event)
        if values:
            self._run.log(values, step=event.get("step", 0))

    def close(self) -> None:
        with _quiet():
            self._run.finish()
            # trackio would finish its current run once more, aloud, when Python exits.
            if self._trackio.context_vars.current_run.get() is self._run:
                self._trackio.context_vars.current_run.set(None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # trackio prints advice to stdout, where a command's own output belongs.
    with contextlib.redirect_stdout(io.StringIO()):
        yield
