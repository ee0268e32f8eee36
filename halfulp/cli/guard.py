"""`halfulp guard`: the guard of training runs, tried out and looked at afterwards."""

import typer

from halfulp.cli.guard_drill import drill
from halfulp.cli.guard_show import explain, map_

guard = typer.Typer(
    name="guard",
    help="Try out what keeps a training run alive, and see what it has done.",
    no_args_is_help=True,
)
for command in (drill, explain):
    guard.command()(command)
guard.command("map")(map_)
