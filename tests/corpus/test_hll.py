"""HyperLogLog: its bytes against Apache DataSketches, its estimate against the truth."""

import numpy as np
import pytest

from halfulp.corpus.counter import Counter
from halfulp.corpus.hll import Hll, rank, rel_std
from halfulp.errors import DataError


def random_keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**63), 2**63, count, dtype=np.int64)


@pytest.fixture
def datasketches():
    return pytest.importorskip("datasketches")


MILLION = pytest.param(14, 1_000_000, marks=pytest.mark.slow)


@pytest.mark.parametrize(("lg_k", "count"), [(4, 50_000), (12, 200_000), (21, 300_000), MILLION])
def test_registers_are_those_of_datasketches(datasketches, lg_k, count):
    keys = random_keys(count)
    theirs = datasketches.hll_sketch(lg_k, datasketches.tgt_hll_type.HLL_8)
    for key in keys.tolist():
        theirs.update(key)
    ours = Hll(lg_k)
    ours.update(keys)
    image = theirs.serialize_compact()
    assert image[40:] == ours.to_bytes()[40:]
    # All but the flag "out of order" and the estimate that needs the order.
    assert image[:5] + image[6:8] + image[16:40] == (
        ours.to_bytes()[:5] + ours.to_bytes()[6:8] + ours.to_bytes()[16:40]
    )


@pytest.mark.parametrize("count", [0, 1, 100, 1000, 100_000])
def test_datasketches_reads_our_file_and_agrees(datasketches, count):
    """Two estimators of one set of registers: apart by a fraction of their error."""
    ours = Hll(12)
    ours.update(random_keys(count))
    theirs = datasketches.hll_sketch.deserialize(ours.to_bytes())
    assert theirs.get_estimate() == pytest.approx(ours.estimate(), rel=0.5 * rel_std(12))


def test_datasketches_unites_our_files(datasketches):
    parts = [Hll(12) for _ in range(3)]
    union = datasketches.hll_union(12)
    for seed, part in enumerate(parts):
        part.update(random_keys(20_000, seed))
        union.update(datasketches.hll_sketch.deserialize(part.to_bytes()))
    for part in parts[1:]:
        parts[0].merge(part)
    result = union.get_result(datasketches.tgt_hll_type.HLL_8)
    assert result.serialize_compact()[40:] == parts[0].to_bytes()[40:]


@pytest.mark.parametrize("lg_k", [12, 14, 16])
def test_the_estimate_is_within_three_standard_errors_from_0_to_2e7(lg_k):
    """20 checks for each size; correlated ones. A right estimator fails one of the 60 with
    probability below 0.15; the keys are always the same, so it does or does not for good.
    """
    counter, seen = Counter((1,), lg_k=lg_k), 0
    assert counter.sketches[1].estimate() == 0
    for count in np.unique(np.geomspace(1, 2e7, 20).astype(int)):
        counter.update(np.arange(seen, count, dtype=np.uint32))
        seen = count
        error = counter.sketches[1].estimate() / count - 1
        assert abs(error) < 3 * rel_std(lg_k), count


@pytest.mark.parametrize("count", [500, 3000, 40_000])
def test_the_estimate_has_no_bias_and_the_stated_error(count):
    """Mean within 4 standard errors (fails with probability 6e-5); spread as stated for many
    keys, smaller for few: ± 4 standard errors of a spread of 200 values.
    """
    errors = []
    for seed in range(200):
        sketch = Hll(9)
        sketch.update(random_keys(count, seed))
        errors.append(sketch.estimate() / count - 1)
    spread = np.std(errors) / rel_std(9)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(200)
    assert (0.8 < spread < 1.2) if count > 5 << 9 else (0.4 < spread < 1.0)


def test_rank_is_one_more_than_the_leading_zeros_and_at_most_63():
    numbers = [0, 1, 2, 3, *(2**k + d for k in range(2, 64) for d in (-1, 0, 1)), 2**64 - 1]
    expected = [min(65 - number.bit_length(), 63) for number in numbers]
    assert rank(np.array(numbers, np.uint64)).tolist() == expected


def test_union_ignores_order_and_repetition():
    one, other, both = Hll(10), Hll(10), Hll(10)
    one.update(random_keys(5000, 1))
    other.update(random_keys(5000, 2))
    both.update(np.concatenate((random_keys(5000, 2), random_keys(5000, 1))))
    assert one.to_bytes() != both.to_bytes()
    one.merge(other)
    one.merge(other)
    assert one.to_bytes() == both.to_bytes()
    assert Hll.from_bytes(one.to_bytes()).to_bytes() == one.to_bytes()


def test_unlike_sketches_do_not_merge():
    with pytest.raises(DataError, match=r"lg_k 12 cannot be merged into one with 10.*one lg_k"):
        Hll(10).merge(Hll(12))


@pytest.mark.parametrize("lg_k", [3, 22])
def test_impossible_sizes(lg_k):
    with pytest.raises(DataError, match=r"2\^4 … 2\^21 registers"):
        Hll(lg_k)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda image: b"", "at least 40 bytes"),
        (lambda image: b"GIF89a" + image[6:], "no HLL_8 sketch"),
        (lambda image: image[:7] + b"\0" + image[8:], "no HLL_8 sketch"),  # HLL_4
        (lambda image: image[:-1], "cut or damaged"),
        (lambda image: image[:3] + b"\xff" + image[4:], "cut or damaged"),
        (lambda image: image[:-1] + b"\x40", "above 63"),
    ],
)
def test_other_bytes_are_refused(damage, message):
    with pytest.raises(DataError, match=message):
        Hll.from_bytes(damage(Hll(8).to_bytes()))


@pytest.mark.slow
def test_spark_unites_our_files():
    """Spark's own hll_union_agg on our bytes. Needs pyspark ≥ 3.5 and a Java runtime."""
    pyspark = pytest.importorskip("pyspark.sql")
    parts = [Hll(12) for _ in range(3)]
    for seed, part in enumerate(parts):
        part.update(random_keys(20_000 * (seed + 1), seed))
    rows = [(bytearray(part.to_bytes()),) for part in parts]
    spark = pyspark.SparkSession.builder.master("local[1]").getOrCreate()
    try:
        table = spark.createDataFrame(rows, "sketch binary")
        table.createOrReplaceTempView("sketches")
        query = "SELECT hll_sketch_estimate(hll_union_agg(sketch)) FROM sketches"
        found = spark.sql(query).first()[0]
    finally:
        spark.stop()
    for part in parts[1:]:
        parts[0].merge(part)
    assert found == pytest.approx(parts[0].estimate(), rel=0.5 * rel_std(12))
