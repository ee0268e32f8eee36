"""The options of commands that train: what is trained, on what, and in which precision."""

from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Option(help="Preset, or a local Hugging Face directory.")]
Sources = Annotated[list[str] | None, typer.Option(help='"stdlib" or a path; may be repeated.')]
RecipeName = Annotated[str | None, typer.Option(help="See `halfulp recipes`.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, data order and rounding.")]
