"""Distinct n-grams per second of a core, beside DuckDB, Polars, DataSketches and NumPy.

    python benchmarks/corpus.py [--quick] [--megabytes 40] [--repeats 3]

The text is Python source of the running interpreter's packages, each distinct file once, as tokens
of a byte-level BPE of 32,768 that is trained on it; both are kept in halfulp's cache. Every method
gets the same tokens and document starts. Peers count 64-bit keys, which they are given as an array;
making it is part of their time. DataSketches for Python takes one key at a time and gets a part.
Each measurement is a process of its own on one core; methods take turns, and the best turn counts.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import machine, section, table

ORDERS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
ONE = (8,)
VOCABULARY = 1 << 15
LG_K = 14
GOALS = {"numpy": 50.0, "c": 100.0}  # MB/s with all orders
MOST_RSS = 64.0  # MB
COPIES = 8
PICKED = {"seconds": min, "memory": max}
LOOP_PART = 20  # of the tokens, 1 in so many for a loop in Python


def main() -> None:
    """Measure all methods in turns, and print two tables."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="10 MB, once")
    made.add_argument("--megabytes", type=int, default=40)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--one", nargs=2, metavar=("METHOD", "ORDERS"), help=argparse.SUPPRESS)
    made.add_argument("--stats", nargs=2, metavar=("KERNEL", "COPIES"), help=argparse.SUPPRESS)
    args = made.parse_args()
    megabytes, repeats = (10, 1) if args.quick else (args.megabytes, args.repeats)
    folder = data(megabytes)
    if args.stats:
        print(json.dumps(measure_stats(folder, int(args.stats[1]))))
        return
    if args.one:
        print(json.dumps(measure(args.one[0], folder, tuple(map(int, args.one[1].split(","))))))
        return
    facts = json.loads((folder / "facts.json").read_text())
    print(
        f"## Corpus\n\n{machine()}\n\n{facts['bytes'] / 1e6:.0f} MB of text, "
        f"{facts['tokens']:,} tokens, {facts['documents']:,} documents; CPU time of one core, "
        f"best of {repeats}; lg k = {LG_K}."
    )
    report("One n: distinct 8-grams", list(METHODS), ONE, facts, megabytes, repeats)
    every = ", ".join(map(str, ORDERS))
    report(f"n = {every} at once", list(FAMILIES), ORDERS, facts, megabytes, repeats)
    report_stats(f"halfulp corpus stats, tokens:n for n = {every}", facts, megabytes, repeats)


def report(
    title: str, names: list[str], orders: tuple[int, ...], facts: dict, megabytes: int, repeats: int
) -> None:
    """One table: speed, memory and the worst error of each method."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            found[name].append(in_a_process(name, orders, megabytes))
    exact = found["halfulp, exact"][0]["counts"]
    rows = [row(name, runs, exact, facts["bytes"]) for name, runs in found.items()]
    head = ("method", "MB/s", "ns per token and n", "extra memory, MB", "error", "goal")
    section(title, table(head, rows))


def row(name: str, runs: list[dict], exact: dict[str, int], size: int) -> list[object]:
    if "absent" in runs[0]:
        return [name, runs[0]["absent"], "", "", "", ""]
    seconds = min(run["seconds"] for run in runs)
    counts, part = runs[0]["counts"], runs[0]["part"]
    speed = size / part / seconds / 1e6
    cost = seconds * 1e9 * part / runs[0]["tokens"] / len(counts)
    errors = [counts[n] / exact[n] - 1 for n in counts] if part == 1 else runs[0]["errors"]
    worst = max(errors, key=abs)
    memory = max(run["memory"] for run in runs)
    goal = GOALS.get(KERNELS.get(name, "")) if len(counts) > 1 else None
    verdict = "" if goal is None else judged(speed, goal, memory)
    return [name, f"{speed:.0f}", f"{cost:.1f}", f"{memory:.0f}", f"{worst:+.2%}", verdict]


def judged(speed: float, goal: float, memory: float) -> str:
    fast = f"≥ {goal:g} MB/s, {'met' if speed >= goal else 'missed'}"
    return f"{fast}; ≤ {MOST_RSS:g} MB, {'met' if memory <= MOST_RSS else 'missed'}"


def report_stats(title: str, facts: dict, megabytes: int, repeats: int) -> None:
    """Files to statistics, reading included: the text once, and a corpus of COPIES such texts.

    The goal is for what follows the first text, where the samples have found their thresholds.
    """
    rows = []
    for kernel in GOALS:
        found = {}
        for copies in (1, COPIES):
            options = ["--stats", kernel, str(copies)]
            turns = [run_apart(options, kernel, megabytes) for _ in range(repeats)]
            found[copies] = {name: pick([t[name] for t in turns]) for name, pick in PICKED.items()}
        seconds = {copies: one["seconds"] for copies, one in found.items()}
        size = facts["bytes"] / 1e6
        later = (seconds[COPIES] - seconds[1]) / (COPIES - 1)  # of each further text
        speed, memory = COPIES * size / seconds[COPIES], found[COPIES]["memory"]
        rows.append([
            kernel, f"{size / seconds[1]:.0f}", f"{speed:.0f}", f"{size / later:.0f}",
            f"{seconds[1] - later:.1f}", f"{memory:.0f}",
            judged(size / later, GOALS[kernel], memory),
        ])  # fmt: skip
    head = (
        "kernel", f"MB/s, {size:.0f} MB", f"MB/s, {COPIES * size:.0f} MB", "MB/s, after the first",
        "warm-up, s", "extra memory, MB", "goal",
    )  # fmt: skip
    section(title, table(head, rows))


def measure_stats(folder: Path, copies: int) -> dict:
    """Seconds and megabytes of `halfulp corpus stats` on token files, in this process.

    A further text is the first with its tokens renamed at random among those of like frequency:
    other sequences, that repeat as much.
    """
    from halfulp.corpus.config import CountConfig
    from halfulp.corpus.count import count
    from halfulp.corpus.files import corpus_files

    on_one_core()
    tokens, starts = np.load(folder / "tokens.npy"), np.load(folder / "starts.npy")
    end = VOCABULARY  # of a document
    marked = np.append(np.insert(tokens, starts[1:], end), end).astype("<u2")
    config = CountConfig(tokens=ORDERS, end_token=end, vocab=VOCABULARY + 1)
    with tempfile.TemporaryDirectory() as scratch:
        for copy in range(copies):
            names = renaming(tokens, copy)
            renamed = np.append(names, end).astype("<u2")[marked]
            renamed.tofile(Path(scratch) / f"{copy}.bin")
            renamed[:5000].tofile(Path(scratch) / "small.bin")
        del tokens, marked, renamed
        count(corpus_files([f"{scratch}/small.bin"]), config, jobs=1)  # imports, builds, tables
        files = corpus_files([f"{scratch}/{copy}.bin" for copy in range(copies)])
        return clocked(lambda: count(files, config, jobs=1))


def renaming(tokens: np.ndarray, seed: int) -> np.ndarray:
    """A name for each token: that of another one among 64 neighbors in frequency."""
    order = np.argsort(-np.bincount(tokens, minlength=VOCABULARY)).reshape(-1, 64)
    names = np.empty(VOCABULARY, np.int64)
    names[order] = np.random.default_rng(seed).permuted(order, axis=1)
    return names


def clocked(run: Callable[[], object]) -> dict:
    """Seconds of the processor, megabytes of memory above those before."""
    # The peak is inherited from the parent; 5 sets it back to what is in memory at the moment.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_mark("VmRSS"), time.process_time()
    run()
    seconds = time.process_time() - start
    return {"seconds": seconds, "memory": memory_mark("VmHWM") - before}


def in_a_process(name: str, orders: tuple[int, ...], megabytes: int) -> dict:
    """What `measure` finds, in a process of its own."""
    kernel = KERNELS.get(name, "c")
    return run_apart(["--one", name, ",".join(map(str, orders))], kernel, megabytes)


def run_apart(options: list[str], kernel: str, megabytes: int) -> dict:
    """What this script prints with these options, in a process with one thread."""
    command = [sys.executable, __file__, "--megabytes", str(megabytes), *options]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    kernel = {"numpy": "torch"}.get(kernel, kernel)
    environment = {**os.environ, "HALFULP_KERNEL": kernel, **one_thread}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(name: str, folder: Path, orders: tuple[int, ...]) -> dict:
    """Seconds of the processor, megabytes of memory above those before, and the counts by n."""
    run, module = METHODS[name]
    if importlib.util.find_spec(module) is None:
        return {"absent": f"{module} is not installed"}
    on_one_core()
    tokens, starts = np.load(folder / "tokens.npy"), np.load(folder / "starts.npy")
    part = LOOP_PART if name in LOOPS else 1
    run(tokens[:5000], starts[:1], orders)  # imports, builds, tables
    tokens = tokens[: len(tokens) // part]
    starts = starts[starts < len(tokens)]
    counts = {}
    found = clocked(lambda: counts.update(run(tokens, starts, orders)))
    found |= {"counts": counts, "part": part}
    if part > 1:
        exact = halfulp_exact(tokens, starts, orders)
        found["errors"] = [counts[n] / exact[n] - 1 for n in counts]
    return found | {"tokens": len(tokens) * part}


def on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def memory_mark(name: str) -> float:
    """VmRSS or VmHWM of this process in megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6


Counts = dict[int, float]
Method = Callable[[np.ndarray, np.ndarray, tuple[int, ...]], Counts]


def halfulp_sketch(tokens: np.ndarray, starts: np.ndarray, orders: tuple[int, ...]) -> Counts:
    return sketched(tokens, starts, orders, None)


def halfulp_sampled(tokens: np.ndarray, starts: np.ndarray, orders: tuple[int, ...]) -> Counts:
    return sketched(tokens, starts, orders, 14)


def sketched(
    tokens: np.ndarray, starts: np.ndarray, orders: tuple[int, ...], lg_capacity: int | None
) -> Counts:
    from halfulp.corpus.counter import Counter

    counter = Counter(orders, lg_k=LG_K, lg_capacity=lg_capacity)
    counter.update(tokens, starts)
    return {n: sketch.estimate() for n, sketch in counter.sketches.items()}


def halfulp_exact(tokens: np.ndarray, starts: np.ndarray, orders: tuple[int, ...]) -> Counts:
    from halfulp.corpus.exact import Exact

    exact = Exact(orders, budget_bytes=len(orders) << 33)
    exact.update(tokens, starts)
    return dict(exact.distinct)


def keys_of(tokens: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """The keys of all n-grams as one array, for the peers."""
    from halfulp.corpus.keys import Stream, first_end, ngram_keys, prefix

    parts = []
    for block in Stream(n).blocks(tokens, starts):
        ends = np.arange(first_end(block, n), len(block.tokens))
        parts.append(ngram_keys(block, prefix(block), n)[block.inside(ends, n)])
    return np.concatenate(parts)


def each(count: Callable[[np.ndarray], float]) -> Method:
    """A method that counts the keys of one n after the other."""
    return lambda tokens, starts, orders: {n: count(keys_of(tokens, starts, n)) for n in orders}


def numpy_unique(keys: np.ndarray) -> float:
    return len(np.unique(keys))


def numpy_sort(keys: np.ndarray) -> float:
    keys.sort()
    return int((keys[1:] != keys[:-1]).sum()) + 1


def polars_exact(keys: np.ndarray) -> float:
    import polars

    return polars.Series(keys).n_unique()


def polars_approximate(keys: np.ndarray) -> float:
    import polars

    return polars.Series(keys).approx_n_unique()


def duckdb_exact(keys: np.ndarray) -> float:
    return duckdb_query("count(distinct k)", keys)


def duckdb_approximate(keys: np.ndarray) -> float:
    return duckdb_query("approx_count_distinct(k)", keys)


def duckdb_query(what: str, keys: np.ndarray) -> float:
    import duckdb

    with duckdb.connect(config={"threads": 1}) as database:
        database.register("keys", {"k": keys})
        return database.execute(f"SELECT {what} FROM keys").fetchone()[0]


def datasketches_loop(keys: np.ndarray) -> float:
    import datasketches

    sketch = datasketches.hll_sketch(LG_K, datasketches.tgt_hll_type.HLL_8)
    for key in keys.view(np.int64).tolist():
        sketch.update(key)
    return sketch.get_estimate()


def python_set(keys: np.ndarray) -> float:
    return len(set(keys.tolist()))


METHODS: dict[str, tuple[Method, str]] = {
    "halfulp, sketch, C": (halfulp_sketch, "numpy"),
    "halfulp, sketch, NumPy": (halfulp_sketch, "numpy"),
    "halfulp, sketch and sample, C": (halfulp_sampled, "numpy"),
    "halfulp, exact": (halfulp_exact, "numpy"),
    "DuckDB, approx_count_distinct": (each(duckdb_approximate), "duckdb"),
    "DuckDB, count(distinct)": (each(duckdb_exact), "duckdb"),
    "Polars, approx_n_unique": (each(polars_approximate), "polars"),
    "Polars, n_unique": (each(polars_exact), "polars"),
    "DataSketches HLL_8, a loop": (each(datasketches_loop), "datasketches"),
    "NumPy, sort and compare": (each(numpy_sort), "numpy"),
    "NumPy, unique": (each(numpy_unique), "numpy"),
    "Python, set of keys": (each(python_set), "numpy"),
}
KERNELS = {
    "halfulp, sketch, C": "c", "halfulp, sketch, NumPy": "numpy",
    "halfulp, sketch and sample, C": "c",
}  # fmt: skip
LOOPS = ("DataSketches HLL_8, a loop", "Python, set of keys", "NumPy, unique")
FAMILIES = (
    *KERNELS, "halfulp, exact", "DuckDB, approx_count_distinct", "Polars, approx_n_unique",
)  # fmt: skip


def data(megabytes: int) -> Path:
    """A folder with tokens.npy, starts.npy and facts.json; made once."""
    from halfulp.numerics.kernel import cache_directory

    folder = cache_directory() / "benchmarks" / f"corpus-{megabytes}-{VOCABULARY}"
    if not (folder / "facts.json").exists():
        texts = list(sources(megabytes * 1_000_000))
        pieces = encoded(texts)
        folder.mkdir(parents=True, exist_ok=True)
        lengths = [len(piece) for piece in pieces]
        np.save(folder / "tokens.npy", np.concatenate(pieces))
        np.save(folder / "starts.npy", np.cumsum([0, *lengths[:-1]]))
        size = sum(len(text.encode()) for text in texts)
        facts = {"bytes": size, "tokens": sum(lengths), "documents": len(texts)}
        (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def sources(size: int) -> Iterator[str]:
    """Distinct Python files of the standard library and of what is installed, in mixed order."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = sorted({file for root in roots for file in root.rglob("*.py")})
    seen, total = set(), 0
    for i in np.random.default_rng(0).permutation(len(files)):
        raw = files[i].read_bytes()
        digest = hashlib.sha1(raw).digest()
        if not raw or digest in seen:
            continue
        seen.add(digest)
        total += len(raw)
        yield raw.decode("utf-8", "replace")
        if total >= size:
            return


def encoded(texts: list[str]) -> list[np.ndarray]:
    """Each text as uint16 tokens of a byte-level BPE trained on a tenth of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[::10], trainer)
    batches = (texts[at : at + 64] for at in range(0, len(texts), 64))
    return [
        np.array(found.ids, np.uint16)
        for batch in batches
        for found in tokenizer.encode_batch(batch)
    ]


if __name__ == "__main__":
    main()
