"""Versions and machine, as they decide the numbers and the speed of a run."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and machine, as they decide the numbers and the speed of a run."""
    import torch

    from halfulp.numerics import cpu, cuda, kernel

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    status, on_gpu = kernel.status(), cuda.status()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("halfulp", "transformers", "numpy")},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "narrow_gemms": cpu.narrow_gemms(),
        "gpu": [torch.cuda.get_device_name(i) for i in devices],
        "kernel": status.name,
        "kernel_reason": status.reason,
        "gpu_kernel": on_gpu.name,
        "gpu_kernel_reason": on_gpu.reason,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
