"""Run every benchmark and write benchmarks/RESULTS.md: `python -m benchmarks [--quick]`."""

import datetime
import subprocess
import sys
from pathlib import Path

SCRIPTS = ("rounding", "optimizer", "training", "check")
FOLDER = Path(__file__).parent


def main() -> None:
    """One process per script; a script that fails leaves RESULTS.md as it was."""
    arguments = sys.argv[1:]
    date = datetime.date.today().isoformat()
    parts = [
        f"# Speed\n\nWritten by `python -m benchmarks {' '.join(arguments)}`".rstrip("` ")
        + f"` on {date}. Ratios are within one run; peers are measured where they are installed."
    ]
    for name in SCRIPTS:
        command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
        print(f"{name} …", file=sys.stderr, flush=True)
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        shown = " ".join([f"benchmarks/{name}.py", *arguments])
        parts.append(f"{result.stdout.strip()}\n\n`python {shown}`")
    (FOLDER / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
