"""The tables of GPUs, prices and published speeds."""

import pytest

from halfulp.check.hardware import load_hardware
from halfulp.errors import ConfigError
from halfulp.hardware import gpu_names, load_gpu
from halfulp.policy import load_recipe
from halfulp.speedups import BF16, load_speedups, speed_of

WORDS = {"fp8": "e4m3", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "bf16": "bf16"}


def test_every_gpu_has_a_source_and_only_what_its_matrix_units_multiply():
    for name in gpu_names():
        gpu = load_gpu(name.upper())
        assert gpu.source
        assert gpu.peak_tflops["bf16"] > 100
        machine = load_hardware(gpu.architecture)
        for precision in gpu.peak_tflops:
            said = machine.refuses(WORDS[precision])
            assert not said or "FNUZ" in said
        if gpu.price_usd is not None:
            assert 0 < gpu.price_usd[0] < gpu.price_middle_usd < gpu.price_usd[1]
            assert gpu.price_source
            assert gpu.price_date >= "2026"


def test_lower_precision_is_at_least_twice_as_fast_at_peak():
    for name in gpu_names():
        peaks = load_gpu(name).peak_tflops
        for precision in peaks.keys() - {"bf16"}:
            assert 1.99 < peaks[precision] / peaks["bf16"] < 4.01


def test_impossible_hardware_is_named():
    with pytest.raises(ConfigError, match=r"does not multiply nvfp4.*bf16, fp8"):
        load_gpu("H100").peak_flops("nvfp4")
    with pytest.raises(ConfigError, match="does not multiply fp8"):
        load_gpu("a100").peak_flops("fp8")
    with pytest.raises(ConfigError, match="h100"):
        load_gpu("h10")
    with pytest.raises(ConfigError, match="--price"):
        _ = load_gpu("mi300x").price_middle_usd


def test_speeds_are_those_of_the_nearest_size_and_architecture():
    h100, h200, b200 = (load_gpu(name) for name in ("h100", "h200", "b200"))
    assert speed_of("bf16", h100, parameters=1e9) == BF16
    large, middle, small = (speed_of("fp8", h100, parameters=n) for n in (60e9, 5e9, 3e8))
    assert large.ratio == pytest.approx(1.43)
    assert middle.low < middle.ratio < middle.high
    assert small.low < 1 < small.high
    assert speed_of("fp8", h200, parameters=5e9) == middle
    assert speed_of("fp8", b200, parameters=5e9).ratio < middle.ratio
    assert 1.2 < speed_of("nvfp4", b200, parameters=8e9).ratio < 1.4
    with pytest.raises(ConfigError, match="--speed fp8="):
        speed_of("fp8", load_gpu("mi300x"), parameters=8e9)


def test_rows_name_recipes_that_exist_or_the_precision():
    for row in load_speedups():
        assert 0 < row.range[0] <= row.range[1] < 3
        assert row.scope in ("step", "gemm")
        assert row.read in ("source", "second hand")
        assert row.date >= "2026-"
        if row.recipe != row.precision:
            assert load_recipe(row.recipe)
