"""Which kernel is chosen, what is said about it, and that building it is safe."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracles.compare import on_kernel

from halfulp.errors import KernelError
from halfulp.numerics import kernel
from halfulp.numerics.rounding import round_to


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Iterator[Callable[..., None]]:
    """Sets environment variables (None: unset) of a machine whose kernel cache is empty."""

    def configure(**variables: str | None) -> None:
        for name, value in {"HALFULP_CACHE": str(tmp_path), "CC": None, **variables}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        kernel.status.cache_clear()

    yield configure
    kernel.status.cache_clear()


def test_c_without_a_compiler_is_an_error(machine):
    machine(HALFULP_KERNEL="c", PATH="")
    with pytest.raises(KernelError, match=r"HALFULP_KERNEL=c was asked.*no C compiler.*Install"):
        kernel.status()


def test_unset_without_a_compiler_falls_back_and_says_why(machine, tmp_path):
    machine(HALFULP_KERNEL=None, PATH="")
    status = kernel.status()
    assert (status.name, status.library) == ("torch", None)
    assert "no C compiler: neither $CC nor cc, gcc or clang" in status.reason
    assert round_to(torch.tensor([1.03]), "e4m3").item() == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", ["cuda", "C", "1"])
def test_unknown_kernel_is_an_error(asked, machine):
    machine(HALFULP_KERNEL=asked)
    with pytest.raises(KernelError, match=f"HALFULP_KERNEL='{asked}' is unknown. Use c, torch"):
        round_to(torch.ones(1), "e4m3")


def test_torch_by_request(machine):
    machine(HALFULP_KERNEL="torch", PATH="")
    assert kernel.status().name == "torch"
    assert kernel.status().reason == "HALFULP_KERNEL=torch asks for the torch definition"


@pytest.mark.parametrize("body", ["exit 3", "echo internal compiler error >&2; exit 1"])
def test_a_failing_compiler_is_quoted_and_leaves_nothing_behind(body, machine, tmp_path):
    compiler, cache = tmp_path / "badcc", tmp_path / "cache"
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    machine(HALFULP_KERNEL="c", CC=str(compiler), HALFULP_CACHE=str(cache))
    with pytest.raises(KernelError, match=r"badcc failed: (internal compiler error)?"):
        kernel.status()
    assert list(cache.iterdir()) == []


def test_a_missing_compiler_falls_back(machine):
    machine(HALFULP_KERNEL=None, CC="/nonexistent/cc")
    assert kernel.status().name == "torch"
    assert "No such file" in kernel.status().reason


def test_a_missing_compiler_leaves_nothing_behind(machine, tmp_path):
    machine(HALFULP_KERNEL=None, CC="/nonexistent/cc")
    kernel.status()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_falls_back(machine, tmp_path):
    (tmp_path / "file").write_text("")
    machine(HALFULP_KERNEL=None, HALFULP_CACHE=str(tmp_path / "file"))
    assert kernel.status().name == "torch"


def test_without_a_thread_pool_the_bits_are_the_same(monkeypatch, machine):
    x = torch.linspace(-3, 3, 1 << 17)
    expected = round_to(x, "e4m3")
    machine(HALFULP_KERNEL="c", HALFULP_CACHE=None)
    monkeypatch.setattr(kernel, "_thread_pool", lambda: None)
    assert "one thread" in kernel.status().reason
    assert torch.equal(round_to(x, "e4m3"), expected)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"HALFULP_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/halfulp"),
     ({"HOME": "/c"}, "/c/.cache/halfulp")],
)  # fmt: skip
def test_where_the_cache_is(variables, expected, monkeypatch):
    for name in ("HALFULP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert kernel.cache_directory() == Path(expected)


def test_concurrent_builds_leave_one_library(tmp_path):
    """Four processes that start with an empty cache, as ranks do, and a compiler that is slow."""
    with on_kernel("c"):
        built = kernel.status().library._name
    compiler, cache = tmp_path / "slowcc", tmp_path / "cache"
    compiler.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
        f'head -c 9999 "{built}" >"$2"; sleep 0.5; cat "{built}" >"$2"\n'
    )
    compiler.chmod(0o755)
    program = (
        "from halfulp.numerics import kernel; kernel._thread_pool = lambda: None; "
        "print(kernel.status().library._name)"
    )
    choice = {"HALFULP_CACHE": str(cache), "HALFULP_KERNEL": "c", "CC": str(compiler)}
    environment = {**os.environ, **choice}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    printed = {rank.communicate(timeout=600)[0].decode().strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert printed == {str(path) for path in cache.iterdir()}
    assert len(printed) == 1
