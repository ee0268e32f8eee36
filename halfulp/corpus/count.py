"""A corpus in shards: counted here, in worker processes or on a Ray cluster, and resumable."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from halfulp.corpus.config import DEFAULT_KEEP, CountConfig
from halfulp.corpus.files import stat_of
from halfulp.corpus.progress_file import Progress, load_progress, save_progress
from halfulp.corpus.read import Notes
from halfulp.corpus.scan import Counted, Shard, scan
from halfulp.data.corpus import SourceFile
from halfulp.errors import ConfigError, NothingLeftError, RunError
from halfulp.interrupt import Interrupt
from halfulp.tasks import room, run_tasks

SHARD_BYTES = 1 << 25  # on disk; a shard has at least one file
BYTES_PER_KEY = 100  # of a large sample, with what waits and what the sort needs
_SECONDS_BETWEEN_SAVES = 20.0


class InterruptedCountError(RunError):
    """A count that was asked to stop and can be resumed."""

    exit_code = 130


def count(
    files: Sequence[SourceFile],
    config: CountConfig,
    *,
    jobs: int = 0,
    ray: str = "",
    progress_file: Path | None = None,
    resume: bool = False,
    tell: Callable[[int, int], None] = lambda done, size: None,
) -> Counted:
    """Everything that `config` asks for, of all files; the same whatever `jobs` and `ray` are.

    `jobs`: processes, 0 = one per core. `tell` hears how many bytes on disk are done, of how many.
    `progress_file` keeps the shards that are done; `resume` goes on from it.
    Raises DataError for what is broken, NothingLeftError when no file is text, ConfigError where
    `config.keep` needs more memory than is free, InterruptedCountError after Ctrl-C or SIGTERM.
    """
    shards = shards_of(files, config)
    progress = Progress()
    if resume and progress_file is not None:
        progress = load_progress(progress_file, config)
    counting = _Counting(shards, progress, progress_file, tell)
    try:
        with Interrupt() as interrupt:
            counting.run(interrupt, jobs=jobs, ray=ray)
    finally:
        if len(progress.done) < len(shards):
            counting.save()
    if progress_file is not None:
        progress_file.unlink(missing_ok=True)
    check_left(progress.counted.notes, shards)
    progress.counted.join_documents()
    return progress.counted


def shards_of(files: Sequence[SourceFile], config: CountConfig) -> list[Shard]:
    """Consecutive files of about SHARD_BYTES on disk; each part of a larger one by itself."""
    shards, held, size = [], [], 0

    def close() -> None:
        nonlocal held, size
        if held:
            shards.append(Shard(len(shards), tuple(held), config, size))
            held, size = [], 0

    for index, file in enumerate(files):
        parts = _parts(file, config)
        for part, part_size in parts:
            if len(parts) > 1:
                close()
            held.append((index, part))
            size += part_size
            if size >= SHARD_BYTES or len(parts) > 1:
                close()
    close()
    return shards


def _parts(file: SourceFile, config: CountConfig) -> list[tuple[SourceFile, int]]:
    """The file, or parts of it that can be read by themselves, with their sizes."""
    path = file.path.with_suffix(".bin") if file.path.suffix == ".idx" else file.path
    size = stat_of(path).st_size
    # Where a window of text begins depends on all tokens before it.
    one = path.name.lower().endswith((".gz", ".zst")) or (file.kind == "text" and config.windows)
    if one or size <= 2 * SHARD_BYTES:
        return [(file, size)]
    edges = [*range(0, size - SHARD_BYTES, SHARD_BYTES), size]
    return [(replace(file, begin=a, end=b), b - a) for a, b in pairwise(edges)]


class _Counting:
    def __init__(
        self,
        shards: Sequence[Shard],
        progress: Progress,
        path: Path | None,
        tell: Callable[[int, int], None],
    ) -> None:
        self._progress, self._path, self._tell = progress, path, tell
        self._left = [shard for shard in shards if shard.index not in progress.done]
        self._sizes = {shard.index: shard.size for shard in shards}
        self._saved = time.monotonic()

    def run(self, interrupt: Interrupt, *, jobs: int, ray: str) -> None:
        if not ray:
            jobs = min(jobs or room(), max(1, len(self._left)))
            _check_memory(self._left, jobs)
        if not ray and jobs == 1:
            for shard in self._left:
                self._take(shard, scan(self._begun(shard), self._watch(interrupt)))
            return
        waiting = iter(self._left)

        def next_shard() -> Shard | None:
            shard = None if interrupt.asked else next(waiting, None)
            return shard and self._begun(shard)

        for outcome in run_tasks(scan, next_shard, jobs=jobs, ray=ray):
            if outcome.value is not None:
                self._take(outcome.task, outcome.value)
            elif not interrupt.asked:
                raise outcome.error or _died(outcome.task, outcome.died)
        if interrupt.asked and len(self._progress.done) < len(self._sizes):
            raise self._stopped()

    def save(self) -> None:
        if self._path is not None and self._progress.done:
            save_progress(self._path, self._progress)
            self._saved = time.monotonic()

    def _begun(self, shard: Shard) -> Shard:
        """The shard with the thresholds that the samples have come to."""
        tallies = self._progress.counted.tallies
        return replace(shard, shifts={name: t.sample.shift for name, t in tallies.items()})

    def _take(self, shard: Shard, counted: Counted) -> None:
        self._progress.counted.merge(counted)
        self._progress.done.add(shard.index)
        self._say(0)
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def _watch(self, interrupt: Interrupt) -> Callable[[int], None]:
        read = 0

        def watch(size: int) -> None:
            nonlocal read
            read += size
            if interrupt.asked:
                raise self._stopped()
            self._say(read)

        return watch

    def _say(self, read: int) -> None:
        total = sum(self._sizes.values())
        done = sum(self._sizes[index] for index in self._progress.done)
        self._tell(min(done + read, total), total)

    def _stopped(self) -> InterruptedCountError:
        done, parts = len(self._progress.done), len(self._sizes)
        cure = "The same command with --resume goes on from there." if done else "Start again."
        return InterruptedCountError(f"stopped after {done} of {parts} parts of the corpus. {cure}")


def _check_memory(shards: Sequence[Shard], jobs: int) -> None:
    """ConfigError when exact counts could outgrow the memory that is free, instead of swapping."""
    meminfo = Path("/proc/meminfo")
    if not shards or shards[0].config.keep <= DEFAULT_KEEP or not meminfo.exists():
        return
    keep = shards[0].config.keep
    # With several processes the parent holds what they found as well.
    needed = keep * BYTES_PER_KEY * (jobs + (jobs > 1))
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable:"))
    free = int(line.split()[1]) * 1024
    if needed > free:
        raise ConfigError(
            f"keeping {keep:,} sequences in {jobs} processes can need {needed:,} bytes, and "
            f"{free:,} are free. Keep fewer, or use fewer jobs."
        )


def _died(shard: Shard, how: str) -> RunError:
    return RunError(
        f"the process that counted {shard.files[0][1].path} and {len(shard.files) - 1} more files "
        f"{how}. What was done is kept: run again with --resume, and with fewer jobs if memory "
        "ran out."
    )


def check_left(notes: Notes, shards: Sequence[Shard]) -> None:
    """NothingLeftError when every file, or part of one, was skipped."""
    skipped = notes.skipped
    files = sum(len(shard.files) for shard in shards)
    if skipped and len(skipped) == files:
        path, why = min(skipped.items())
        raise NothingLeftError(
            f"nothing is left to count: {files} of {files} files, or parts of them, are no text "
            f"({path}: {why}). Name text, JSONL, Parquet or token files, or count bytes as they "
            "are with --bytes."
        )
