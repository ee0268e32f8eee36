"""Time of rounding a tensor, as a multiple of copying it: ours and what else people use.

    python benchmarks/rounding.py [--quick] [--threads N]

The unit is `y.copy_(x)` into an existing tensor in the same run. Ours write into `y` too, except
where "new tensor" is said; peers allocate their result, because they cannot do otherwise. Peers
are optional: pip install qtorch ninja ml_dtypes gfloat torchao.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from common import (
    Absent,
    Time,
    how,
    interleave,
    machine,
    parser,
    per_threads,
    section,
    table,
    use_threads,
    verdict,
)
from torch import Tensor

from halfulp.numerics import rounding
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.format import get_format
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import random_words, round_definition, round_to

SIZES = (4096, 1024, 64)  # square matrices
KEY = Key.of(0, "benchmark")
E4M3, BF16 = get_format("e4m3"), get_format("bf16")
# × copy at 4096² and 1024², µs at 64²
GOALS = {
    "e4m3 nearest": (1.2, 1.3, None),
    "e4m3 stochastic": (1.5, 3.5, None),
    "bf16 nearest": (1.2, 1.3, None),
    "bf16 stochastic": (1.5, 3.5, None),
    "e4m3 nearest, new tensor": (None, None, 6.0),
    "e4m3 stochastic, new tensor": (None, None, 6.0),
    "e4m3@tensor:current": (1.6, 2.0, None),
    "e4m3@1x32:e8m0_up": (1.2, 3.0, None),
    "e2m1@1x16:nvfp4": (2.5, 7.5, None),
}
QUANTIZERS = (
    "e4m3@tensor:current",
    "e5m2@tensor:current:stochastic",
    "e4m3@row:current",
    "e4m3@1x32:e8m0_up",
    "e4m3@1x32:e8m0_up:stochastic",
    "e2m1@1x16:nvfp4",
    "e2m1@1x16:nvfp4:stochastic",
)
Run = Callable[[], object]


def ours(x: Tensor, y: Tensor) -> dict[str, Run]:
    """The kernel in use, element by element and with scales."""
    runs: dict[str, Run] = {}
    for fmt in (E4M3, BF16):
        for mode in ("nearest", "stochastic"):
            key = KEY if mode == "stochastic" else None
            runs[f"{fmt} {mode}"] = lambda f=fmt, m=mode, k=key: round_to(
                x, f, rounding=m, key=k, out=y
            )
    runs["e4m3 nearest, new tensor"] = lambda: round_to(x, E4M3)
    runs["e4m3 stochastic, new tensor"] = lambda: round_to(x, E4M3, rounding="stochastic", key=KEY)
    for text in QUANTIZERS:
        q = parse_quantizer(text)
        key = KEY if q.stochastic else None
        runs[text] = lambda q=q, k=key: apply_quantizer(x, q, key=k, out=y)
    return runs


def definition(x: Tensor, y: Tensor, *, compiled: bool) -> dict[str, Run]:
    """The torch definition: eager, and traced by torch.compile."""
    runs: dict[str, Run] = {}
    for mode in ("nearest", "stochastic"):
        key = KEY if mode == "stochastic" else None
        runs[f"torch definition, e4m3 {mode}"] = lambda m=mode, k=key: rounding._round_torch(
            x.view(-1), y.view(-1), E4M3, m, True, k, 0
        )
        if compiled:
            runs[f"torch definition compiled, e4m3 {mode}"] = _compiled(x, mode)
    return runs


def _compiled(x: Tensor, mode: str) -> Run:
    def rounded(x: Tensor, key: Tensor) -> Tensor:
        random = random_words(x, key) if mode == "stochastic" else None
        return round_definition(x, E4M3, mode, True, random)

    run, key = torch.compile(rounded, dynamic=False), KEY.tensor()
    return lambda: run(x, key)


def peers(x: Tensor) -> dict[str, Run | Absent]:
    """Other people's rounding in its usual call; `Absent` where it does not run here."""
    runs: dict[str, Run | Absent] = {
        "CPFloat": Absent("not installable (no package on PyPI)"),
        "torch .to(bf16).float(), bf16 nearest": lambda: x.to(torch.bfloat16).float(),
        "torch clamp and .to(float8_e4m3fn), e4m3 nearest": lambda: (
            x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        ),
    }
    for name, module, make in (
        ("QPyTorch", "qtorch.quant", _qtorch),
        ("ml_dtypes", "ml_dtypes", _ml_dtypes),
        ("gfloat", "gfloat", _gfloat),
        ("torchao", "torchao", _torchao),
    ):
        try:
            made = make(import_module(module), x)
            runs |= {f"{name}, {what}": run for what, run in made.items()}
        except (ImportError, RuntimeError, OSError) as error:
            runs[name] = Absent(f"not installed (pip install {module.split('.')[0]}): {error}")
    return runs


def _qtorch(quant: ModuleType, x: Tensor) -> dict[str, Run]:
    def run(exp: int, man: int, mode: str) -> Run:
        return lambda: quant.float_quantize(x, exp=exp, man=man, rounding=mode)

    return {
        "e4m3 nearest": run(4, 3, "nearest"),
        "e4m3 stochastic": run(4, 3, "stochastic"),
        "bf16 stochastic": run(8, 7, "stochastic"),
    }


def _ml_dtypes(module: ModuleType, x: Tensor) -> dict[str, Run]:
    import numpy as np

    a = x.numpy()
    return {
        "e4m3 nearest": lambda: a.astype(module.float8_e4m3fn).astype(np.float32),
        "bf16 nearest": lambda: a.astype(module.bfloat16).astype(np.float32),
    }


def _gfloat(gfloat: ModuleType, x: Tensor) -> dict[str, Run]:
    import numpy as np
    from gfloat.formats import format_info_ocp_e4m3

    a, mode = x.numpy(), gfloat.RoundMode
    bits = np.random.default_rng(0).integers(0, 1 << 16, a.shape)

    def run(rnd: object, **more: object) -> Run:
        return lambda: gfloat.round_ndarray(format_info_ocp_e4m3, a, rnd, True, **more)

    return {
        "e4m3 nearest": run(mode.TiesToEven),
        "e4m3 stochastic": run(mode.StochasticFast, srbits=bits, srnumbits=16),
    }


def _torchao(_: ModuleType, x: Tensor) -> dict[str, Run]:
    from torchao.optim.quant_utils import _fp32_to_bf16_sr
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return {
        "bf16 stochastic": lambda: _fp32_to_bf16_sr(x).float(),
        "MX e4m3 (there and back)": lambda: MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize(
            torch.float32
        ),
    }


def measure(size: int, threads: int, quick: bool) -> dict[str, Time | Absent]:
    """Every variant on one `size` × `size` matrix."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)
    runs: dict[str, Run | Absent] = {"copy_": lambda: y.copy_(x), **ours(x, y)}
    runs |= definition(x, y, compiled=not quick) | peers(x)
    absent = {name: run for name, run in runs.items() if isinstance(run, Absent)}
    present = {name: run for name, run in runs.items() if not isinstance(run, Absent)}
    seconds = (0.3 if quick else 1.0) * (1.0 if size == 4096 else 0.5)
    calls = {64: 100, 1024: 8}.get(size, 1)
    times = interleave(present, threads=threads, seconds=seconds, calls=calls)
    return {name: times.get(name) or absent[name] for name in runs}


def rows(results: list[dict[str, Time | Absent]], threads: int) -> list[list[str]]:
    """One line per variant: multiples of copy at the two large sizes, microseconds at the last."""
    lines = []
    for name, first in results[0].items():
        if isinstance(first, Absent):
            lines.append([name, first.why.splitlines()[0], *[""] * 5])
            continue
        goals = GOALS.get(name, (None,) * 3) if threads == 1 else (None,) * 3
        line = [name]
        for result, size, goal in zip(results, SIZES, goals, strict=True):
            time, copy = result[name], result["copy_"]
            assert isinstance(time, Time)
            assert isinstance(copy, Time)
            value = time.best * 1e6 if size == 64 else time.best / copy.best
            line += [f"{value:.2f}" if value < 100 else f"{value:.0f}", verdict(value, goal)]
        lines.append(line)
    return lines


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    if not args.threads:
        print(f"## Rounding\n\n{machine()}", flush=True)
        per_threads(__file__, args)
        return
    use_threads(args.threads)
    results = [measure(size, args.threads, args.quick) for size in SIZES]
    copies = [result["copy_"] for result in results[:2]]
    unit = " and ".join(
        f"{t.best / size**2 * 1e9:.3f} ns" for t, size in zip(copies, SIZES, strict=False)
    )
    head = ["what", "4096² × copy", "goal", "1024² × copy", "goal", "64² µs", "goal"]
    text = f"`copy_` takes {unit} an element at 4096² and 1024².\n\n"
    section(how(args.threads), text + table(head, rows(results, args.threads)))


if __name__ == "__main__":
    main()
