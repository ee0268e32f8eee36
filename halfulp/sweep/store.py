"""The directory of a sweep: the design, one event per result, one run directory per cell.

config.toml          the design ([sweep], [base]); written before anything runs
environment.json     machine, versions, command
events.jsonl         append-only; the event "result" holds a Result
policies/            the policy files of the design
runs/<id>/           the run directories, without checkpoints once they have a result
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfulp.errors import RunError
from halfulp.run import OWN_FILES, Run
from halfulp.run_files import check_room
from halfulp.sweep.design import Cell, Design
from halfulp.sweep.result import Result

_OWN = frozenset(OWN_FILES | {"runs", "policies"})


@dataclass(frozen=True)
class Stored:
    """A sweep as its directory tells it.

    `damaged` names the lines that could not be read; their runs count as not done.
    """

    path: Path
    design: Design
    results: tuple[Result, ...]
    damaged: tuple[str, ...]

    def missing(self) -> tuple[Cell, ...]:
        """The cells without a result."""
        done = {result.id for result in self.results}
        return tuple(cell for cell in self.design.cells() if cell.id not in done)


class Store:
    """The writer of a sweep's directory; there is one at a time."""

    def __init__(self, run: Run) -> None:
        self.path = run.path
        self._run = run

    @property
    def runs(self) -> Path:
        """Where the run directories lie."""
        return self.path / "runs"

    @property
    def policies(self) -> Path:
        """Where the policy files lie."""
        return self.path / "policies"

    def add(self, result: Result) -> None:
        """Write a result; on disk when this returns. RunError when the disk is full."""
        self._run.write("result", **result.to_dict())
        shutil.rmtree(self.runs / result.id / "checkpoints", ignore_errors=True)

    def note(self, event: str, **fields: object) -> None:
        """Write what else has happened."""
        self._run.write(event, **fields)

    def keep(self, id: str, files: Mapping[str, bytes]) -> None:
        """Lay files of a run that was trained elsewhere into its directory; or RunError."""
        folder = self.runs / id
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise RunError(
                f"cannot write {folder}: {error.strerror}. Make room and go on with: "
                f"{self._run.continue_with}"
            ) from error

    def unlock(self, id: str) -> None:
        """Let a run be written whose process is known to have died, on whatever machine."""
        (self.runs / id / "writer.lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process write."""
        self._run.close()


def open_store(
    path: Path, design: Design, *, command: Sequence[str], force: bool = False
) -> tuple[Store, Stored]:
    """The sweep at `path`, made where there is none, to be written; and what it holds.

    RunError for a directory that holds something else, or a sweep of another design that is not to
    be replaced by `force`, or that another process is writing.
    """
    if is_sweep(path) and not force:
        stored = read_sweep(path)
        _check_same(stored, design)
        run = Run.open(path)
    else:
        replaceable = force and is_sweep(path)
        run = Run.create(path, design.to_dict(), command=command, force=replaceable, own=_OWN)
        stored = Stored(path, design, (), ())
    run.continue_with = f"halfulp sweep --resume {path}"
    store = Store(run)
    store.note("start", command=list(command), done=len(stored.results))
    try:
        write_policies(store.policies, design)
    except OSError as error:
        store.close()
        raise RunError(
            f"cannot write {store.policies}: {error.strerror}. Make room and go on with: "
            f"{run.continue_with}"
        ) from error
    return store, stored


def check_place(path: Path, design: Design, *, force: bool = False) -> None:
    """The RunError of `open_store` for what lies at `path`; nothing is written."""
    if is_sweep(path) and not force:
        _check_same(read_sweep(path), design)
    else:
        check_room(path, force=force and is_sweep(path), own=_OWN)


def write_policies(folder: Path, design: Design) -> None:
    """Lay the policy files of `design` into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text in design.policies.items():
        (folder / name).write_text(text, encoding="utf-8")


def is_sweep(path: Path) -> bool:
    """Whether `path` holds a sweep's config.toml."""
    if not os.path.isfile(path / "config.toml"):  # also where a folder may not be entered
        return False
    try:
        return "sweep" in Run.open(path, writer=False).config()
    except RunError:
        return False


def read_design(path: Path) -> Design:
    """The design of the sweep at `path`; RunError or ConfigError where there is no sweep."""
    content = Run.open(path, writer=False).config()
    if "sweep" not in content:
        raise RunError(f"{path} is a run and no sweep. Give the directory of `halfulp sweep`.")
    return Design.from_dict(content)


def read_sweep(path: Path) -> Stored:
    """The sweep at `path`; of two results of a cell the later one counts.

    Damaged lines are named, not fatal. RunError or ConfigError where there is no sweep.
    """
    run, design = Run(path, writer=False), read_design(path)
    known = {cell.id: cell for cell in design.cells()}
    found: dict[str, Result] = {}
    damaged: list[str] = []
    for event in run.events("result", damaged=damaged):
        try:
            result = Result.from_dict(event)
        except (KeyError, TypeError) as error:
            damaged.append(f"a result in {run.path / 'events.jsonl'} cannot be read ({error})")
            continue
        if known.get(result.id) == Cell(result.recipe, result.lr, result.seed, result.data):
            found[result.id] = result
        else:
            damaged.append(f"{result.id} in {run.path / 'events.jsonl'} is no run of the design")
    return Stored(path, design, tuple(found.values()), tuple(damaged))


def _check_same(stored: Stored, design: Design) -> None:
    if stored.design.digest() == design.digest():
        return
    old, new = stored.design.to_dict(), design.to_dict()
    parts = [key for key in new["sweep"] if new["sweep"][key] != old["sweep"].get(key)]
    parts += [
        f"{section}.{key}"
        for section, values in new["base"].items()
        if section != "run"
        for key in values
        if values[key] != old["base"].get(section, {}).get(key)
    ]
    raise RunError(
        f"{stored.path} holds another sweep, with {len(stored.results)} results: it differs in "
        f"{', '.join(parts) or 'its design'}. Give another -o, go on with that one by --resume "
        f"{stored.path}, or delete it with --force."
    )
