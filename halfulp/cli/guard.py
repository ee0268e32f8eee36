"""`halfulp guard`: the guard of training runs, tried out and looked at afterwards."""

import typer

from halfulp.cli.guard_drill import drill
from halfulp.cli.guard_show import explain, map_

guard = typer.Typer(
    name="guard",
    help="Inject faults, explain incidents, write the precision map.",
    no_args_is_help=True,
)
for command in (drill, explain):
    guard.command()(command)
guard.command("map")(map_)
