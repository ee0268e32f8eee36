"""Which kernel a GPU gets, as far as a machine without one can tell."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

import halfulp
from halfulp.numerics import cuda, kernel

FOLDER = Path(halfulp.__file__).parent / "numerics"


def test_cpu_tensors_are_not_for_the_gpu():
    assert not cuda.use_cuda(torch.ones(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpu_says_so():
    assert cuda.status() == cuda.CudaStatus("torch", "there is no NVIDIA GPU")


def test_every_kernel_that_is_launched_is_there():
    text = (FOLDER / "round.cu").read_text(encoding="utf-8")
    assert set(re.findall(r"KERNEL halfulp_(\w+)\(", text)) == set(cuda._FUNCTIONS)


def test_all_that_is_included_is_compiled():
    """NVRTC sees only the files that it is given."""
    for name in cuda._FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert set(re.findall(r'#include "(.+)"', text)) <= set(cuda._FILES)


def test_a_quantizer_passed_by_value_has_the_size_of_the_struct():
    fields = re.search(r"typedef struct \{(.*?)\} Quantizer;", _header(), re.DOTALL)
    assert fields is not None
    names = re.findall(r"\b\w+(?=[,;])", re.sub(r"/\*.*?\*/", "", fields[1]))
    assert ctypes.sizeof(kernel._Quantizer) == 4 * len(names) == ctypes.sizeof(cuda._UNUSED)


def _header() -> str:
    return (FOLDER / "round.h").read_text(encoding="utf-8")
