"""The sample of distinct keys: what it keeps, its file against Apache DataSketches."""

import numpy as np
import pytest

from halfulp.corpus.murmur import hash_keys
from halfulp.corpus.theta import Theta
from halfulp.errors import DataError


def hashes(low: int, high: int) -> np.ndarray:
    return hash_keys(np.arange(low, high, dtype=np.uint64))[1]


def sample(*parts: np.ndarray, lg_capacity: int = 8) -> Theta:
    made = Theta(lg_capacity)
    for part in parts:
        made.add(part)
    return made


def test_it_keeps_all_low_hashes_and_the_least_shift_that_fits():
    every = hashes(0, 50_000)
    kept = sample(every)
    shares = [int((every < 2 ** (64 - shift)).sum()) for shift in range(1, 12)]
    shift = next(s for s, share in enumerate(shares, 1) if share <= 256)
    expected = np.sort(every[every < 2 ** (64 - shift)] >> np.uint64(1))
    assert kept.shift == shift
    assert np.array_equal(kept.hashes, expected)
    assert 128 < len(expected) <= 256


def test_few_keys_are_all_kept_and_counted():
    kept = sample(hashes(0, 200), hashes(100, 256))
    assert (kept.shift, kept.estimate()) == (0, 256)


def test_order_repetition_and_sharding_do_not_matter():
    whole = sample(hashes(0, 30_000))
    back = sample(*(hashes(at, min(at + 700, 30_000)) for at in range(29_400, -1, -300)))
    assert back.to_bytes() == whole.to_bytes()
    shards = [sample(hashes(at, at + 10_000)) for at in (20_000, 0, 10_000)]
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert shards[0].to_bytes() == whole.to_bytes()


def test_the_estimate_has_the_stated_error():
    """200 samples; mean within 4 standard errors, spread within 4: fails in 1 of 8000 runs."""
    count = 5000
    errors = [
        sample(hashes(seed * count, (seed + 1) * count)).estimate() / count - 1
        for seed in range(200)
    ]
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(200)
    # 2^-5 of 5000 keys: 156 are kept.
    assert 0.8 < np.std(errors) / np.sqrt((1 - 2**-5) / (count / 32)) < 1.2


@pytest.mark.parametrize("count", [0, 1, 100, 20_000])
def test_datasketches_reads_our_file(count):
    datasketches = pytest.importorskip("datasketches")
    ours = sample(hashes(0, count))
    theirs = datasketches.compact_theta_sketch.deserialize(ours.to_bytes())
    assert theirs.get_estimate() == pytest.approx(ours.estimate(), rel=1e-12)
    assert list(theirs) == ours.hashes.tolist()
    assert theirs.get_seed_hash() == datasketches.update_theta_sketch().get_seed_hash()
    again = Theta.from_bytes(ours.to_bytes())
    assert again.to_bytes() == ours.to_bytes()


def test_datasketches_intersects_our_files():
    datasketches = pytest.importorskip("datasketches")
    one, other = sample(hashes(0, 20_000)), sample(hashes(15_000, 30_000))
    both = datasketches.theta_intersection()
    for part in (one, other):
        both.update(datasketches.compact_theta_sketch.deserialize(part.to_bytes()))
    shift = max(one.shift, other.shift)
    common = np.intersect1d(one.at_shift(shift), other.at_shift(shift))
    assert both.get_result().get_estimate() == len(common) << shift
    assert 4000 < len(common) << shift < 6500  # 5000 in truth


def test_unlike_samples_do_not_merge():
    with pytest.raises(DataError, match="one capacity"):
        Theta(8).merge(Theta(9))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda image: b"", "at least 24 bytes"),
        (lambda image: b"\2" + image[1:], "no sample of keys"),
        (lambda image: image[:16] + b"\1" + image[17:], "no sample of keys"),
        (lambda image: image[:-8], "cut or damaged"),
        (lambda image: image[:-1] + b"\xff", "cut or damaged"),
        (lambda image: image[:24] + image[32:40] * 2 + image[40:], "cut or damaged"),
    ],
)
def test_other_bytes_are_refused(damage, message):
    image = sample(hashes(0, 3000)).to_bytes()
    with pytest.raises(DataError, match=message):
        Theta.from_bytes(damage(image))
