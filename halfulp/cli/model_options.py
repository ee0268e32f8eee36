"""The options of commands that look at a model: which one, and on what text."""

from typing import Annotated

import typer

RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL", help="Run directory, local Hugging Face directory, or preset."
    ),
]
Texts = Annotated[
    list[str] | None, typer.Option("--data", help='Text: "stdlib" or a path; may be repeated.')
]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help='"bytes", "bpe:N" or a tokenizer.json; the model\'s own.'),
]
Hints = Annotated[
    list[str] | None,
    typer.Option("--hint", help="'GLOB=BLOCK' for parameters that halfulp cannot place."),
]
