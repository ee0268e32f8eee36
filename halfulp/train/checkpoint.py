"""Checkpoints that are complete or absent: safetensors and JSON, written aside and renamed.

`step-00001000/` holds a loadable Hugging Face directory (config.json, model.safetensors), the
optimizer, the quantizers, the guard's snapshots and state.json, which lists every file with its
size and sha256.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfulp.errors import RunError

PARTS = ("model", "optimizer", "quantizers", "snapshots")
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """The content of one checkpoint; every tensor lies on the CPU and is whole (not sharded)."""

    step: int
    state: dict[str, Any]  # JSON: data position, loss scale, digests
    tensors: Mapping[str, Mapping[str, Tensor]]  # by part: PARTS
    model_config: str = "{}"  # config.json of transformers


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in `folder`."""
    return folder / f"{_PREFIX}{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder` whose rename has happened, in ascending order."""
    names = [p.name for p in folder.glob(f"{_PREFIX}*") if (p / "state.json").is_file()]
    return sorted(int(n.removeprefix(_PREFIX)) for n in names if n[len(_PREFIX) :].isdigit())


def save(folder: Path, content: Checkpoint, *, keep: int) -> Path:
    """Write `content`, then delete all but the `keep` newest intact checkpoints; the path.

    Later checkpoints are those of a course that the run has left: they are moved aside. A process
    killed at any moment leaves the earlier checkpoints and no half-written one. RunError when the
    disk refuses; all checkpoints stay.
    """
    from safetensors import SafetensorError

    target = path_of(folder, content.step)
    scratch = folder / f".writing-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(scratch)
        scratch.mkdir()
        _write(scratch, content)
        _set_aside(folder, content.step)
        _remove(target)
        os.rename(scratch, target)
        _sync(folder)
        _prune(folder, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        why = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write the checkpoint {target}: {why}. Earlier checkpoints "
            "are untouched; make room and continue with: halfulp train --resume "
            f"{folder.parent}"
        ) from error
    return target


def load(folder: Path, step: int) -> Checkpoint:
    """The content of the checkpoint of `step`; `verify` it first."""
    from safetensors.torch import load_file

    path = path_of(folder, step)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {part: load_file(path / f"{part}.safetensors") for part in PARTS}
    config = (path / "config.json").read_text(encoding="utf-8")
    return Checkpoint(step, state, tensors, config)


def verify(folder: Path, step: int) -> None:
    """Compare the files of the checkpoint of `step` with their recorded size and sha256.

    RunError naming the damaged file and the command that resumes from the checkpoint before.
    """
    path = path_of(folder, step)
    with _blamed(folder, step):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise ValueError("state.json lists no files")
        for name, fact in state["files"].items():
            found = (path / name).stat().st_size
            if found != fact["bytes"]:
                raise ValueError(f"{name} has {found} bytes instead of {fact['bytes']}")
            if _sha256(path / name) != fact["sha256"]:
                raise ValueError(f"{name} does not have the sha256 that state.json records")
        if missing := {f"{part}.safetensors" for part in PARTS} - state["files"].keys():
            raise ValueError(f"state.json does not list {min(missing)}")


def drop_after(folder: Path, step: int) -> list[Path]:
    """Move checkpoints later than `step` into the subfolder `dropped`; their new paths.

    What a killed process left half-written is deleted.
    """
    for leftover in folder.glob(".*"):
        _remove(leftover)
    return _set_aside(folder, step)


def _set_aside(folder: Path, step: int) -> list[Path]:
    moved = []
    for later in (s for s in steps_in(folder) if s > step):
        attic = folder / "dropped"
        attic.mkdir(exist_ok=True)
        name = path_of(folder, later).name
        taken = sum(1 for _ in attic.glob(f"{name}*"))
        moved.append(attic / (f"{name}.{taken}" if taken else name))
        os.rename(path_of(folder, later), moved[-1])
    return moved


@contextmanager
def _blamed(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        earlier = [s for s in steps_in(folder) if s < step]
        resume = f"halfulp train --resume {folder.parent}"
        advice = (
            f"Resume from the checkpoint before it with: {resume} --from-step {earlier[-1]}"
            if earlier
            else f"No earlier checkpoint exists; start again with: {resume} --from-step 0"
        )
        raise RunError(
            f"checkpoint {path_of(folder, step)} is broken: {error}. {advice}"
        ) from error


def _write(scratch: Path, content: Checkpoint) -> None:
    from safetensors.torch import save_file

    for part in PARTS:
        tensors = {name: t.contiguous() for name, t in content.tensors.get(part, {}).items()}
        save_file(tensors, scratch / f"{part}.safetensors", metadata={"format": "pt"})
    (scratch / "config.json").write_text(content.model_config, encoding="utf-8")
    files = {}
    for path in sorted(scratch.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    state = {"step": content.step, **content.state, "files": files}
    (scratch / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    _sync(scratch / "state.json")
    _sync(scratch)


def _prune(folder: Path, keep: int) -> None:
    intact = [step for step in steps_in(folder) if _has_its_size(path_of(folder, step))]
    oldest_kept = intact[-keep:][0]
    for step in steps_in(folder):
        if step < oldest_kept:
            _remove(path_of(folder, step))


def _has_its_size(path: Path) -> bool:
    try:
        files = json.loads((path / "state.json").read_text(encoding="utf-8"))["files"]
        return all((path / n).stat().st_size == fact["bytes"] for n, fact in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(path: Path) -> None:
    """Delete a directory so that no moment shows it half there under its own name."""
    if not path.exists():
        return
    trash = path.with_name(f".deleting-{path.name.lstrip('.')}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
