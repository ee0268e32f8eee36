"""The typer application: which commands there are."""

import typer

from halfulp.cli.check import CheckCommand, check
from halfulp.cli.corpus import corpus
from halfulp.cli.demo import demo
from halfulp.cli.formats import formats
from halfulp.cli.guard import guard
from halfulp.cli.info import info
from halfulp.cli.plan import plan
from halfulp.cli.recipes import recipes
from halfulp.cli.report import report
from halfulp.cli.sharpness import sharpness
from halfulp.cli.sweep import sweep
from halfulp.cli.train import train

app = typer.Typer(
    name="halfulp",
    help="How low can you go? Low-precision training of language models, "
    "with every error sized, placed and priced.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, check, sharpness, report, recipes, formats, info):
    app.command(cls=CheckCommand if command is check else None)(command)
app.add_typer(guard)
app.add_typer(plan)
app.add_typer(corpus)
app.add_typer(sweep)
