"""`halfulp corpus`: how much there is in a corpus, and how that grows."""

import typer

from halfulp.cli.corpus_count import growth, stats
from halfulp.cli.corpus_sketch import merge, overlap, sketch

corpus = typer.Typer(
    name="corpus",
    help="Count unique sequences and duplicates; forecast more text.",
    no_args_is_help=True,
)
for command in (stats, growth, sketch, merge, overlap):
    corpus.command()(command)
