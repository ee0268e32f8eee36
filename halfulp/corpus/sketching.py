"""A corpus to sketches: shard by shard, here, in worker processes or on a Ray cluster."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from halfulp.corpus.config import CountConfig
from halfulp.corpus.count import check_left, shards_of
from halfulp.corpus.counter import Counter
from halfulp.corpus.read import Notes
from halfulp.corpus.scan import Shard, stream_of
from halfulp.corpus.sketch_file import UNKNOWN, Amounts, Definition, Sketch, merge
from halfulp.corpus.symbols import batches, context_of, is_stretch, tokenizer_of
from halfulp.corpus.theta import LG_CAPACITY
from halfulp.data.corpus import SourceFile
from halfulp.data.token_files import read_token_file
from halfulp.errors import DataError, RunError
from halfulp.tasks import run_tasks

WORDS = "words 2"  # how text becomes words: see words.py


@dataclass(frozen=True)
class Task:
    """One shard and the size of its sketches."""

    shard: Shard
    lg_k: int


@dataclass(frozen=True)
class Sketched:
    """Sketches by name of what they count, and what was met on the way."""

    sketches: dict[str, Sketch]
    notes: Notes


def sketch_corpus(
    files: Sequence[SourceFile],
    config: CountConfig,
    *,
    lg_k: int = 14,
    jobs: int = 0,
    ray: str = "",
    tell: Callable[[int, int], None] = lambda done, size: None,
) -> Sketched:
    """A sketch for each length of `config`, the same bytes whatever `jobs` and `ray` are.

    `jobs`: processes, 0 = one per core. `tell` hears how many bytes on disk are done, of how many.
    Raises DataError for what is broken, NothingLeftError when no file is text, RunError when a
    process dies.
    """
    shards = shards_of(files, config)
    tasks = [Task(shard, lg_k) for shard in shards] or [Task(Shard(0, (), config, 0), lg_k)]
    total, done = sum(shard.size for shard in shards), 0
    parts: dict[str, _Union] = {}
    notes = Notes()
    for task, found in _in_order(tasks, jobs=jobs, ray=ray):
        for name, sketch in found.sketches.items():
            parts.setdefault(name, _Union()).add(sketch)
        notes.merge(found.notes)
        done += task.shard.size
        tell(done, total)
    check_left(notes, shards)
    return Sketched({name: part.sketch() for name, part in parts.items()}, notes)


def sketch_shard(task: Task) -> Sketched:
    """The sketches of one shard. Raises DataError for what is broken."""
    config, notes = task.shard.config, Notes()
    counters = {
        family: Counter(lengths, lg_k=task.lg_k, lg_capacity=LG_CAPACITY, apart=family == "window")
        for family, lengths in config.families().items()
    }
    text_bytes = 0
    for _, file in task.shard.files[:1]:
        if file.begin and is_stretch(file, config):
            context = context_of(file, config)
            for family, counter in counters.items():
                counter.go_on(*context[stream_of(family)])
    for batch in batches(task.shard.files, config, notes):
        for family, counter in counters.items():
            symbols = batch.symbols[stream_of(family)]
            counter.update(symbols.symbols, symbols.starts)
        text_bytes += batch.text_bytes
    tokenizer = _tokenizer(task.shard)
    sketches = {
        f"{family}:{n}": _sketch(counter, family, n, tokenizer, text_bytes)
        for family, counter in counters.items()
        for n in counter.orders
    }
    return Sketched(sketches, notes)


def _sketch(counter: Counter, family: str, n: int, tokenizer: str, text_bytes: int) -> Sketch:
    of_words = family == "words"
    definition = Definition(
        sequences=f"{family}:{n}",
        tokenizer="" if of_words else tokenizer,
        normalizer=WORDS if of_words else "",
    )
    amounts = Amounts(
        documents=counter.documents,
        symbols=counter.tokens,
        occurrences=counter.occurrences[n],
        text_bytes=text_bytes,
    )
    return Sketch(
        definition=definition,
        amounts=amounts,
        hll=counter.sketches[n],
        theta=counter.samples[n],
    )


def _tokenizer(shard: Shard) -> str:
    """SHA-256 of the tokenizer, as far as it is known; "" for words."""
    if not (shard.config.tokens or shard.config.windows):
        return ""
    if (named := tokenizer_of(shard.config)) is not None:
        return named.sha256
    said = {read_token_file(file.path).tokenizer or UNKNOWN for _, file in shard.files}
    if len(said) > 1:
        raise DataError(
            f"the token files are of {len(said)} tokenizers: {', '.join(sorted(said))}. "
            "Sketch those of one tokenizer at a time."
        )
    return said.pop() if said else UNKNOWN


def _in_order(tasks: Sequence[Task], *, jobs: int, ray: str) -> Iterator[tuple[Task, Sketched]]:
    """What comes of each task, in the order of the tasks."""
    if not ray and (jobs == 1 or len(tasks) < 2):
        yield from ((task, sketch_shard(task)) for task in tasks)
        return
    waiting, held, due = iter(tasks), {}, 0
    for outcome in run_tasks(sketch_shard, lambda: next(waiting, None), jobs=jobs, ray=ray):
        if outcome.value is None:
            raise outcome.error or RunError(
                f"the process that sketched {outcome.task.shard.files[0][1].path} "
                f"{outcome.died}. Run again, with fewer jobs if memory ran out."
            )
        held[outcome.task.shard.index] = outcome.value
        while due in held:
            yield tasks[due], held.pop(due)
            due += 1


class _Union:
    """The union of the shards so far, and its estimate along the way."""

    def __init__(self) -> None:
        self._whole: Sketch | None = None
        self._checkpoints: list[tuple[int, float]] = []

    def add(self, part: Sketch) -> None:
        self._whole = part if self._whole is None else merge([self._whole, part])
        at = self._whole.amounts.occurrences
        if at and (not self._checkpoints or at >= math.sqrt(2) * self._checkpoints[-1][0]):
            self._checkpoints.append((at, self._whole.hll.estimate()))

    def sketch(self) -> Sketch:
        assert self._whole is not None
        end = (self._whole.amounts.occurrences, self._whole.hll.estimate())
        earlier = [mark for mark in self._checkpoints if mark[0] < end[0]]
        return replace(self._whole, checkpoints=(*earlier, end))
