"""Run every benchmark, or those that are named: `python -m benchmarks [NAME …] [--quick]`.

Those with gpu in their name need a CUDA device and run only where they are named. Writes
benchmarks/RESULTS.md, where the sections of the others stay as they are.
"""

import datetime
import re
import subprocess
import sys
from pathlib import Path

ANYWHERE = (
    "rounding", "optimizer", "training", "check", "sharpness", "guard", "guard_overhead", "sweep",
    "plan_fit", "corpus",
)  # fmt: skip
SCRIPTS = (*ANYWHERE, "gpu", "guard_gpu", "sweep_gpu", "attention_bias_gpu")
FOLDER = Path(__file__).parent
_HEAD = (
    "# Speed\n\nWritten by `python -m benchmarks`; `python -m benchmarks NAME …` measures the "
    "named ones again. Ratios are within one run; peers are measured where they are installed."
)


def main() -> None:
    """One process per script; a script that fails leaves RESULTS.md as it was."""
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or list(ANYWHERE)
    if unknown := set(names) - set(SCRIPTS):
        print(f"there is no {', '.join(unknown)}; there are: {', '.join(SCRIPTS)}", file=sys.stderr)
        raise SystemExit(2)
    page = FOLDER / "RESULTS.md"
    measured = {name: _measure(name, flags) for name in names}
    page.write_text(merged(page.read_text(encoding="utf-8"), measured), encoding="utf-8")


def merged(page: str, measured: dict[str, str]) -> str:
    """`page` with the sections of the measured scripts replaced, in the order of SCRIPTS."""
    pattern = r"## (?:(?!\n`python ).)*\n`python benchmarks/(\w+)\.py[^\n]*"
    parts = {m[1]: m[0] for m in re.finditer(pattern, page, flags=re.DOTALL)} | measured
    return "\n\n".join([_HEAD, *(parts[name] for name in SCRIPTS if name in parts)]) + "\n"


def _measure(name: str, flags: list[str]) -> str:
    """What the script prints, and under it the command and the date."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags]
    print(f"{name} …", file=sys.stderr, flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    shown = " ".join([f"benchmarks/{name}.py", *flags])
    today = datetime.date.today().isoformat()
    return f"{result.stdout.strip()}\n\n`python {shown}` on {today}"


if __name__ == "__main__":
    main()
