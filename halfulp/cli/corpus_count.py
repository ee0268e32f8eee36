"""`halfulp corpus stats` and `halfulp corpus growth`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli import corpus_options as options
from halfulp.cli.common import check_outputs
from halfulp.cli.show import print_table

if TYPE_CHECKING:
    from halfulp.corpus.config import CountConfig
    from halfulp.corpus.forecast import Forecast
    from halfulp.corpus.growth import Growth
    from halfulp.corpus.scan import Counted
    from halfulp.corpus.stats import Stats


def stats(
    paths: options.Paths,
    words: options.WordLengths = None,
    tokens: options.TokenLengths = None,
    windows: options.Windows = None,
    tokenizer: options.TokenizerName = "",
    text_key: options.TextKey = "text",
    end_token: options.EndToken = None,
    vocab: options.Vocab = 0,
    keep: options.Keep = None,
    bytes_: options.ForceBytes = False,
    jobs: options.Jobs = 0,
    ray: options.Ray = "",
    resume: options.Resume = False,
    json_: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Unique sequences and duplicates: documents, lines, words:n, tokens:n.

    Exact while the distinct sequences fit --keep, a sample with a standard error otherwise. Without
    lengths: words of text, tokens of token files.

    Exit codes: 0 done, 2 something is wrong, 3 no file is text, 130 stopped and resumable.
    """
    check_outputs({"--json": json_}, force=force, inputs=paths)
    config = options.config_of(
        words, tokens, windows, tokenizer, text_key, end_token, vocab, keep, bytes_
    )
    found, _ = _count(paths, config, jobs=jobs, ray=ray, resume=resume)
    if json_ is not None:
        found.save(json_)
    _print_head(found)
    rows = [_row(count) for count in found.counts.values()]
    print_table(("", "occurrences", "unique", "U/T", "exponent", "doubled by"), rows)
    _print_notes(found)


def growth(
    paths: options.Paths,
    words: options.WordLengths = None,
    tokens: options.TokenLengths = None,
    windows: options.Windows = None,
    to: Annotated[
        str, typer.Option(help="Forecast for corpora of so many times the size, up to 8.")
    ] = "2,4,8",
    allow_far: Annotated[
        bool, typer.Option("--allow-far", help="Forecast beyond 8 times, which is a guess.")
    ] = False,
    tokenizer: options.TokenizerName = "",
    text_key: options.TextKey = "text",
    end_token: options.EndToken = None,
    vocab: options.Vocab = 0,
    keep: options.Keep = None,
    bytes_: options.ForceBytes = False,
    jobs: options.Jobs = 0,
    ray: options.Ray = "",
    resume: options.Resume = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curves there (SVG).")] = None,
    json_: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """How the unique sequences grow with the corpus, and how many a larger one would hold.

    The curve is that of documents in random order, whatever order the files are in. Forecasts are
    for more text of the same kind, with an 80 % band.

    Exit codes: 0 done, 2 something is wrong, 3 no file is text, 130 stopped and resumable.
    """
    from halfulp.corpus.forecast import check_factor, forecast, forecastable

    check_outputs({"--json": json_, "--plot": plot}, force=force, inputs=paths)
    asked = options.factors("--to", to)
    for factor in asked:
        check_factor(factor, allow_far=allow_far)
    config = options.config_of(
        words, tokens, windows, tokenizer, text_key, end_token, vocab, keep, bytes_
    )
    found, counted = _count(paths, config, jobs=jobs, ray=ray, resume=resume)
    ahead = {
        name: [forecast(counted.tallies[name], factor, allow_far=allow_far) for factor in asked]
        for name, count in found.counts.items()
        if count.distinct and forecastable(counted.tallies[name])
    }
    _write(json_, plot, found, ahead)
    _print_head(found)
    _print_growth(found, ahead, asked)
    _print_notes(found)
    if found.documents and len(ahead) < len(found.counts):
        print("note: no forecast where there are fewer than about 8 documents or pieces")


def _count(
    paths: Sequence[str], config: "CountConfig", *, jobs: int, ray: str, resume: bool
) -> "tuple[Stats, Counted]":
    from halfulp.corpus.config import fitted
    from halfulp.corpus.count import count
    from halfulp.corpus.files import corpus_files
    from halfulp.corpus.progress_file import progress_path
    from halfulp.corpus.stats import stats_of

    files = corpus_files(paths)
    config = fitted(config, files)
    with options.CountBar() as bar:
        counted = count(
            files, config, jobs=jobs, ray=ray, resume=resume, tell=bar.tell,
            progress_file=progress_path(files, config),
        )  # fmt: skip
    return stats_of(paths, files, config, counted), counted


def _write(
    json_: Path | None,
    plot: Path | None,
    found: "Stats",
    ahead: "Mapping[str, Sequence[Forecast]]",
) -> None:
    from halfulp.data.cache import write_json

    if json_ is not None:
        forecasts = {name: [asdict(f) for f in ahead.get(name, [])] for name in found.counts}
        write_json(json_, found.to_json() | {"forecasts": forecasts})
    if plot is not None:
        from halfulp.report.growth_plot import growth_svg

        plot.write_text(growth_svg(found, ahead), encoding="utf-8")


def _print_head(found: "Stats") -> None:
    text = "" if found.text_bytes is None else f", {found.text_bytes / 1e6:,.1f} MB of text"
    symbols = "".join(f", {count:,} {name}" for name, count in found.symbols.items())
    empty = f" ({found.empty_documents:,} more are empty)" if found.empty_documents else ""
    print(f"{found.files:,} files{text}{symbols}, {found.documents:,} documents{empty}")


def _row(count: "Growth") -> list[str]:
    share = "" if count.duplicates is None else f"{1 - count.duplicates:.3f}"
    return [
        count.name,
        f"{count.occurrences:,}",
        _unique(count.distinct, count),
        share,
        _exponent(count),
        "" if count.doubling_factor is None else f"× {count.doubling_factor:,.3g}",
    ]


def _unique(distinct: int, count: "Growth") -> str:
    return f"{distinct:,}" + ("" if count.exact else f" ± {count.rel_std:.1%}")


def _exponent(count: "Growth") -> str:
    if count.slope is None:
        return ""
    return f"{count.slope:.3f}" + ("" if count.slope_se is None else f" ± {count.slope_se:.3f}")


def _print_growth(
    found: "Stats", ahead: "Mapping[str, Sequence[Forecast]]", asked: Sequence[float]
) -> None:
    shares = (8, 4, 2)
    columns = ("", *(f"1/{share}" for share in shares), "the corpus", "exponent")
    rows = []
    for name, count in found.counts.items():
        parts = [_at(count, share) for share in shares]
        cells = [_forecast_cell(f) for f in ahead[name]] if name in ahead else [""] * len(asked)
        rows.append([name, *parts, _unique(count.distinct, count), _exponent(count), *cells])
    print_table((*columns, *(f"× {factor:g} (80 % band)" for factor in asked)), rows)


def _at(count: "Growth", share: int) -> str:
    """Distinct sequences in a random 1/`share` of the corpus."""
    step = 2 * share.bit_length() - 2
    return f"{count.curve[-1 - step][1]:,}" if len(count.curve) > step else ""


def _forecast_cell(found: "Forecast") -> str:
    return f"{found.distinct:,.4g} ({found.low:,.4g} … {found.high:,.4g})"


def _print_notes(found: "Stats") -> None:
    for note in found.notes():
        print(f"note: {note}")
