"""The table of machines: what each one multiplies, and what the refusal says."""

import pytest

from halfulp.check.hardware import hardware_class, hardware_names, load_hardware
from halfulp.errors import ConfigError
from halfulp.formats import NAMED, format_quantizer
from halfulp.numerics.format import FORMATS

HAS = {
    "ampere": {"fp32", "tf32", "bf16", "fp16", "int8", "int4"},
    "hopper": {"fp32", "tf32", "bf16", "fp16", "int8", "e4m3"},
    "blackwell": {"fp32", "tf32", "bf16", "fp16", "int8", "e4m3", "mxfp8", "mxfp6", "mxfp4",
                  "nvfp4"},
    "tpu_v6": {"fp32", "bf16", "int8"},
    "mi300": {"fp32", "tf32", "bf16", "fp16", "int8"},
}  # fmt: skip


@pytest.mark.parametrize("name", list(HAS))
def test_what_each_machine_multiplies(name):
    words = [*FORMATS, *NAMED]
    assert {w for w in words if not load_hardware(name).refuses(w)} == HAS[name]
    assert not any(load_hardware("any").refuses(w) for w in [*words, "e8m3", "e2m1@row:current"])


def test_every_entry_loads_and_says_where_it_comes_from():
    for name in hardware_names():
        machine = load_hardware(name)
        assert machine.summary
        assert machine.source
        assert not machine.refuses("fp32")
        for pair in machine.products:
            for kind in pair:
                known = kind.removeprefix("mx-") in FORMATS or kind in ("nvfp4", "*")
                assert known, f"{name}: {kind}"


def test_refusals_say_why():
    assert load_hardware("H100").refuses("e5m2") == "hopper multiplies e5m2 only with e4m3"
    assert load_hardware("hopper").refuses("mxfp8") == "hopper has no mx-e4m3 products"
    assert "FNUZ" in load_hardware("mi300x").refuses("e4m3")
    assert load_hardware("mi355x").refuses("e5m2") == ""
    with pytest.raises(ConfigError, match="hopper"):
        load_hardware("hoper")


def test_gradients_in_e5m2_multiply_on_hopper():
    e4m3, e5m2 = format_quantizer("e4m3"), format_quantizer("e5m2@row:current")
    assert load_hardware("hopper").multiplies(e5m2, e4m3)
    assert not load_hardware("tpu-v6e").multiplies(e5m2, e4m3)
    assert hardware_class(format_quantizer("e4m3@1x128:current")) == "e4m3"
    assert hardware_class(format_quantizer("mxfp4")) == "mx-e2m1"
    assert hardware_class(format_quantizer("e4m3@1x16:e8m0_up")) == "e4m3@1x16:e8m0"
