"""The options of commands that write files beside what they print."""

from pathlib import Path
from typing import Annotated

import typer

Page = Annotated[Path | None, typer.Option("--html", help="Write the page there.")]
Figures = Annotated[Path | None, typer.Option("--json", help="Write all figures there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
