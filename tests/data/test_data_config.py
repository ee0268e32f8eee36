import pytest

import halfulp.data
from halfulp.data import DataConfig
from halfulp.data.config import bpe_size
from halfulp.errors import ConfigError


def test_a_list_of_sources_becomes_a_tuple():
    assert DataConfig(source=["a", "b"]).source == ("a", "b")  # pyright: ignore
    assert hash(DataConfig()) == hash(DataConfig())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("source", "stdlib", "list of sources"),
        ("source", (), "list of sources"),
        ("source", (3,), "every source"),
        ("tokenizer", "", "data.tokenizer"),
        ("tokenizer", "bpe", "bpe:4096"),
        ("tokenizer", "bpe:many", "as a number"),
        ("tokenizer", "bpe:257", "258"),
        ("text_key", "", "data.text_key"),
        ("val_fraction", 0.0, "val_fraction"),
        ("val_fraction", 0.6, "val_fraction"),
        ("val_fraction", float("nan"), "val_fraction"),
        ("val_fraction", "5%", "val_fraction"),
        ("max_tokens", -1, "max_tokens"),
        ("seed", 1.5, "seed"),
        ("vocab", True, "vocab"),
    ],
)
def test_a_value_outside_its_range_is_refused(field, value, says):
    with pytest.raises(ConfigError, match=says):
        DataConfig(**{field: value})


def test_bpe_size():
    assert bpe_size("bpe:4096") == 4096
    assert bpe_size("bytes") is None
    assert bpe_size("bpe.json") is None


def test_the_package_exports_four_names():
    assert dir(halfulp.data) == ["Data", "DataConfig", "TokenSource", "open_data"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = halfulp.data.nothing  # pyright: ignore
