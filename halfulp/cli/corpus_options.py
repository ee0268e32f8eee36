"""The options that the commands of `halfulp corpus` share, and what they come to."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfulp.cli.common import words
from halfulp.cli.show import is_live
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.corpus.config import CountConfig

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH",
        help="Text, JSONL(.gz, .zst), Parquet or token files (.bin), folders of them, or stdlib.",
    ),
]
WordLengths = Annotated[
    str | None,
    typer.Option("--words", help="Lengths of word sequences: 3,5. Needs no tokenizer."),
]
TokenLengths = Annotated[
    str | None, typer.Option("--tokens", help="Lengths of token sequences: 1,2,4,8.")
]
Windows = Annotated[
    str | None,
    typer.Option("--windows", help="Lengths of windows of tokens that do not overlap: 16."),
]
TokenizerName = Annotated[
    str, typer.Option("--tokenizer", help='For tokens of text: "bytes" or a tokenizer.json.')
]
TextKey = Annotated[
    str, typer.Option("--text-key", help="JSONL key or Parquet column that holds the text.")
]
EndToken = Annotated[
    int | None,
    typer.Option("--end-token", help="Token between documents, where token files do not say it."),
]
Vocab = Annotated[
    int, typer.Option("--vocab", help="Vocabulary, where token files do not say it (0: any).")
]
Keep = Annotated[
    int | None,
    typer.Option(
        "--keep",
        help="Distinct sequences kept in all; up to so many, counting is exact. About 100 bytes "
        "each.  [default: 500000]",
    ),
]
ForceBytes = Annotated[
    bool, typer.Option("--bytes", help="Count files that are no UTF-8 text as well.")
]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=0, help="Processes (default: one per core).")
]
Ray = Annotated[str, typer.Option(help="Count on a Ray cluster: its address, or auto.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the same count, which was stopped.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", "-o", help="Write all figures there: what plan --corpus takes."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the files to be written.")]


def config_of(
    word_lengths: str | None,
    token_lengths: str | None,
    windows: str | None,
    tokenizer: str,
    text_key: str,
    end_token: int | None,
    vocab: int,
    keep: int | None,
    force_bytes: bool,
) -> "CountConfig":
    """What the options ask to be counted. ConfigError for one that cannot be used."""
    from halfulp.corpus.config import DEFAULT_KEEP, CountConfig

    return CountConfig(
        lengths("--words", word_lengths),
        lengths("--tokens", token_lengths),
        lengths("--windows", windows),
        tokenizer,
        text_key,
        end_token,
        vocab,
        DEFAULT_KEEP if keep is None else keep,
        force_bytes,
    )


def lengths(option: str, text: str | None) -> tuple[int, ...]:
    """The whole numbers between commas, none for None; ConfigError for anything else."""
    if text is None:
        return ()
    found = words(option, text, "1,2,4,8")
    if not all(word.isascii() and word.isdigit() for word in found):
        raise ConfigError(f"{option} {text!r} is not understood. Give whole numbers: 1,2,4,8.")
    return tuple(map(int, found))


def factors(option: str, text: str) -> tuple[float, ...]:
    """The numbers between commas; ConfigError for anything else."""
    try:
        found = tuple(float(word) for word in words(option, text, "2,4,8"))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not understood. Give numbers: 2,4,8.") from error
    if not all(1 <= factor < math.inf for factor in found):
        raise ConfigError(f"{option} {text!r} holds a factor below 1. Give 1 or more.")
    return found


class CountBar:
    """How much of a corpus has been read: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> "CountBar":
        if is_live():
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, done: int, total: int) -> None:
        """`done` of `total` bytes on disk are counted."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            typer.echo(f"… {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", err=True)


_SECONDS_BETWEEN_LINES = 10.0
