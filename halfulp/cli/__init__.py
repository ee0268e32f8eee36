"""The command line: one thin file per command."""

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit.

    Exit codes: 0 done, 2 a HalfulpError (its message goes to stderr), a wrong option, or a lack of
    memory, disk or permission, 130 an interrupted command (a run can be resumed). `halfulp check`
    has its own, said in its --help.
    """
    from halfulp.cli.app import app
    from halfulp.errors import HalfulpError, lack

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows no "−" or "×" shows their codes, and not a number without its sign.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments)
    except HalfulpError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except (OSError, MemoryError, RuntimeError) as error:
        answer = lack(error)
        if answer is None:
            raise
        _say(answer)
        sys.exit(2)
    sys.exit(0)


def _say(answer: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"error: {answer}" if rank == "0" else f"rank {rank}: {answer}", file=sys.stderr)
