"""Where the incidents of one's own loop are told."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfulp.guard.incident import Incident
from halfulp.guard.ladder import Ladder
from halfulp.processes import is_main

LOG = logging.getLogger("halfulp.guard")
Log = str | Path | Callable[[dict[str, Any]], object] | None


def tell(log: Log, incident: Incident, ladder: Ladder) -> None:
    """One line in a file, a dict to a function, or the logger; on the first process only."""
    if not is_main():
        return
    row = {
        "event": "guard",
        **incident.fields(),
        "map": ladder.map(),
        "above": ladder.above(),
    }
    if callable(log):
        log(row)
    elif log is not None:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
    else:
        told = "; ".join(incident.done)
        LOG.warning("%s; %s: %s", incident.trigger, incident.verdict.kind, told)
