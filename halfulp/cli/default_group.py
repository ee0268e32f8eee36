"""A group of commands that is itself one: `halfulp sweep run.toml` and `halfulp sweep status`."""

import typer
from typer.core import TyperGroup


class DefaultGroup(TyperGroup):
    """Arguments that name none of the group's commands go to the one called "run"."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)
