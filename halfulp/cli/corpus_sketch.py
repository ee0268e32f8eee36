"""`halfulp corpus sketch`, `halfulp corpus merge` and `halfulp corpus overlap`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli import corpus_options as options
from halfulp.cli.common import check_outputs
from halfulp.cli.show import print_table
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.corpus.overlap import Estimate
    from halfulp.corpus.sketch_file import Sketch

Sketches = Annotated[list[Path], typer.Argument(metavar="SKETCH…", help="Sketches (.hll).")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Name of the sketch to write (.hll).")]


def sketch(
    paths: options.Paths,
    out: Out,
    words: options.WordLengths = None,
    tokens: options.TokenLengths = None,
    windows: options.Windows = None,
    lg_k: Annotated[
        int, typer.Option(help="2^k registers of a byte: 14 for 0.8 %, 16 for 0.4 %.")
    ] = 14,
    tokenizer: options.TokenizerName = "",
    text_key: options.TextKey = "text",
    end_token: options.EndToken = None,
    vocab: options.Vocab = 0,
    bytes_: options.ForceBytes = False,
    jobs: options.Jobs = 0,
    ray: options.Ray = "",
    force: options.Force = False,
) -> None:
    """Sketch a shard of a corpus: a small file for each length, to be merged.

    Writes NAME.hll (Apache DataSketches HLL_8), NAME.theta (a sample) and NAME.hll.json, with the
    length in the name if there are several: NAME-words-3.hll.

    Exit codes: 0 done, 2 something is wrong, 3 no file is text.
    """
    from halfulp.corpus.config import fitted
    from halfulp.corpus.files import corpus_files
    from halfulp.corpus.read import skips
    from halfulp.corpus.sketch_file import save
    from halfulp.corpus.sketching import sketch_corpus

    files = corpus_files(paths)
    config = fitted(
        options.config_of(
            words, tokens, windows, tokenizer, text_key, end_token, vocab, None, bytes_
        ),
        files,
    )
    names = [f"{family}:{n}" for family, lengths in config.families().items() for n in lengths]
    written = _named(out, names)
    _check_free(written.values(), force=force)
    with options.CountBar() as bar:
        found = sketch_corpus(files, config, lg_k=lg_k, jobs=jobs, ray=ray, tell=bar.tell)
    for name, path in written.items():
        save(found.sketches[name], path)
    for note in skips(found.notes.skipped):
        typer.echo(note, err=True)
    _print_sketches([(path, found.sketches[name]) for name, path in written.items()])


def merge(sketches: Sketches, out: Out, force: options.Force = False) -> None:
    """Unite sketches of shards, which must count the same thing in the same way.

    Exit codes: 0 done, 2 something is wrong.
    """
    from halfulp.corpus.sketch_file import load, save
    from halfulp.corpus.sketch_file import merge as united

    path = _hll(out)
    _check_free([path], force=force)
    whole = united([load(sketch) for sketch in sketches])
    save(whole, path)
    _print_sketches([(path, whole)])


def overlap(
    a: Annotated[Path, typer.Argument(help="Sketch of a corpus (.hll).")],
    b: Annotated[Path, typer.Argument(help="Sketch of another.")],
    json_: Annotated[
        Path | None, typer.Option("--json", "-o", help="Write all figures there.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Distinct sequences that two sketched corpora share, with 95 % intervals.

    Exit codes: 0 done, 2 something is wrong.
    """
    from halfulp.corpus.overlap import overlap as compared
    from halfulp.corpus.sketch_file import load, paths_of
    from halfulp.data.cache import write_json

    check_outputs({"--json": json_}, force=force, inputs=(*paths_of(a), *paths_of(b)))
    first, second = load(a), load(b)
    found = compared(first, second)
    if json_ is not None:
        write_json(json_, asdict(found))
    rows = [
        ("distinct in both", *_range(found.common, "{:,.0f}")),
        (f"share of {a.name}", *_range(found.share_of_a, "{:.2%}")),
        (f"share of {b.name}", *_range(found.share_of_b, "{:.2%}")),
        ("share of the union (Jaccard)", *_range(found.jaccard, "{:.2%}")),
    ]
    print_table((first.definition.sequences, "", "95 % interval"), rows)
    which = "all" if found.exact else "a sample of"
    typer.echo(f"From {which} {found.compared:,} distinct sequences of the two.")


def _named(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """The file of each sketch, by what it counts."""
    path = _hll(out)
    if len(names) == 1:
        return {names[0]: path}
    return {name: path.with_stem(f"{path.stem}-{name.replace(':', '-')}") for name in names}


def _hll(out: Path) -> Path:
    if not out.name:
        raise ConfigError(f"--out {str(out)!r} names no file. Give a name, such as shard.hll.")
    return out if out.suffix == ".hll" else out.with_name(f"{out.name}.hll")


def _check_free(paths: Iterable[Path], *, force: bool) -> None:
    from halfulp.corpus.sketch_file import paths_of

    for path in paths:
        for file in paths_of(path):
            check_outputs({"--out": file}, force=force)


def _print_sketches(written: Sequence[tuple[Path, "Sketch"]]) -> None:
    from halfulp.corpus.hll import rel_std

    rows = []
    for path, sketch in written:
        error = f"± {1.96 * rel_std(sketch.hll.lg_k):.1%}"
        numbers = sketch.amounts.occurrences, sketch.hll.estimate()
        distinct = (*(f"{number:,.0f}" for number in numbers), error)
        rows.append((sketch.definition.sequences, *distinct, str(path)))
    print_table(("", "occurrences", "unique", "95 %", "file"), rows)


def _range(estimate: "Estimate", form: str) -> tuple[str, str]:
    low, high = (form.format(end) for end in (estimate.low, estimate.high))
    return form.format(estimate.value), f"{low} … {high}"
