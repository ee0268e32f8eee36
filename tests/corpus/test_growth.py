"""Exponents and forecasts on streams whose answers are known."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from halfulp.corpus.config import CountConfig
from halfulp.corpus.count import count
from halfulp.corpus.files import corpus_files
from halfulp.corpus.forecast import forecast, good_toulmin, grown
from halfulp.corpus.growth import Growth, Part, growth
from halfulp.corpus.scan import Counted
from halfulp.corpus.stats import Stats, stats_of
from halfulp.data.tokens import write_tokens
from halfulp.errors import DataError

RNG = np.random.default_rng(7)


def counted(paths, **options) -> Counted:
    files = corpus_files([str(path) for path in paths])
    return count(files, CountConfig(**options), jobs=1)


def stats(paths, **options) -> Stats:
    files, config = corpus_files([str(path) for path in paths]), CountConfig(**options)
    return stats_of([str(p) for p in paths], files, config, count(files, config, jobs=1))


def heaps_text(documents: int, words: int, *, drift: float = 0.0) -> list[str]:
    """Documents with words of a heavy-tailed vocabulary; `drift`: other words later on."""
    made = []
    for i in range(documents):
        ranks = np.minimum(RNG.zipf(1.5, words), 10**12)
        tail = f"t{int(i * drift)}" if drift else ""
        made.append(" ".join(f"w{rank}{tail if rank > 5 else ''}" for rank in ranks))
    return made


@pytest.mark.parametrize(
    ("size", "within"),
    [(1_000_000, 0.025), pytest.param(10_000_000, 0.01, marks=pytest.mark.slow)],
)
def test_zipf_draws_have_the_known_exponent(tmp_path, size, within):
    # Draws from p_k ~ k^-1.5: U grows as T^(2/3), and f1/U is that exponent too. U has a standard
    # deviation of about 0.8 √U, so that the fit over a factor of 8 has 0.006 at a million draws.
    tokens = np.minimum(RNG.zipf(1.5, size), 2**32 - 1).astype("<u4")
    path = tmp_path / "zipf.bin"
    write_tokens(path, [tokens], vocab=2**32)
    found = growth("tokens:1", counted([path], tokens=(1,)).tallies["tokens:1"])
    t, u = np.log(np.array(found.curve[-7:], float)).T
    fitted = np.polyfit(t, u, 1)[0]
    assert found.distinct == len(np.unique(tokens)) or not found.exact
    assert found.slope == pytest.approx(2 / 3, abs=within)
    assert fitted == pytest.approx(2 / 3, abs=within)
    assert found.doubling_factor == pytest.approx(2**1.5, rel=4 * within)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_half_a_corpus_forecasts_the_whole(tmp_path, n):
    documents = heaps_text(1200, 150)
    for name, part in (("half", documents[:600]), ("whole", documents)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(part):
            (tmp_path / name / f"{i:05d}.txt").write_text(text)
    half = counted([tmp_path / "half"], words=(n,)).tallies[f"words:{n}"]
    truth = counted([tmp_path / "whole"], words=(n,)).tallies[f"words:{n}"].sample.distinct
    found = forecast(half, 2)
    assert found.distinct == pytest.approx(truth, rel=0.05)
    assert found.low < truth < found.high
    assert found.distinct > 1.2 * half.sample.distinct
    for factor, most in ((4, 0.1), (8, 0.2)):
        far = forecast(half, factor)
        assert far.backtest is not None
        assert abs(far.backtest) < most
        assert found.distinct < far.distinct < far.high < 1.4 * factor * half.sample.distinct


def test_forecasts_are_refused_beyond_their_range(tmp_path):
    for i, text in enumerate(heaps_text(64, 50)):
        (tmp_path / f"{i}.txt").write_text(text)
    tally = counted([tmp_path], words=(1,)).tallies["words:1"]
    for factor in (8.1, 0.9, math.inf, math.nan):
        with pytest.raises(DataError):
            forecast(tally, factor)
    with pytest.raises(DataError, match="give 1 to 1,000,000"):
        forecast(tally, 1e300, allow_far=True)
    far, near = forecast(tally, 64, allow_far=True), forecast(tally, 8)
    assert far.distinct >= near.distinct
    assert far.high / far.low > near.high / near.low


def test_a_few_documents_forecast_nothing_and_no_band_promises_more_than_there_can_be(tmp_path):
    texts = heaps_text(40, 60)
    for i in (0, 1):
        (tmp_path / f"{i}.txt").write_text(texts[i])
    few = counted([tmp_path], words=(1,)).tallies["words:1"]
    with pytest.raises(DataError, match="a forecast needs 8 documents"):
        forecast(few, 2)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    for name, tally in counted([tmp_path], words=(1, 8)).tallies.items():
        for factor in (2.0, 4.0, 8.0):
            found = forecast(tally, factor)
            most = factor * growth(name, tally).distinct
            assert found.low <= found.distinct <= found.high <= max(most, found.distinct) * 1.0001


def test_more_than_there_are_is_never_estimated(tmp_path):
    """30,000 different sequences of each length, estimated from samples that share no key.

    Without a limit half of the 24 estimates exceed them: none does with probability 2^−24.
    """
    write_tokens(tmp_path / "t.bin", [np.arange(30_000)], vocab=30_000)
    lengths = tuple(range(1, 25))
    found = stats([tmp_path / "t.bin"], tokens=lengths, keep=25 * 300).counts
    for n in lengths:
        count = found[f"tokens:{n}"]
        assert not count.exact
        assert 0.7 * count.occurrences < count.distinct <= count.occurrences
        assert count.slope is not None
        assert count.slope <= 1


def test_shares_of_which_the_sample_holds_nothing_are_passed_over():
    kept = np.array([[400, 200], [280, 160], [200, 130]])
    empty = np.vstack((kept, [[50, 0]]))
    ends = [
        grown(Part(400, 200, np.array([120] + [8] * 11), curve), 4.0) for curve in (kept, empty)
    ]
    assert ends[0] == ends[1]
    assert 2 < ends[0] < 4


def test_good_toulmin_is_the_sum_of_its_paper():
    # With f_1 alone, the answer is what is new if every next sequence is seen once more.
    f = np.zeros(12)
    f[0] = 100
    assert good_toulmin(f, 1) == pytest.approx(100 * binom.sf(0, 12, 0.5))
    # Poisson frequencies: the number of unseen ones is known.
    rates = np.full(10_000, 1.0)
    expected = rates.size * math.exp(-1) * (1 - math.exp(-1))
    f = np.array([rates.size * math.exp(-1) / math.factorial(j) for j in range(1, 13)])
    assert good_toulmin(f, 1) == pytest.approx(expected, rel=0.002)
    assert good_toulmin(f, 0.5) == pytest.approx(
        rates.size * math.exp(-1) * (1 - math.exp(-0.5)), rel=0.002
    )


def test_files_in_an_order_are_told_from_shuffled_ones(tmp_path):
    sorted_, shuffled = tmp_path / "sorted", tmp_path / "shuffled"
    documents = heaps_text(400, 150, drift=0.05)
    for folder, order in ((sorted_, np.arange(400)), (shuffled, RNG.permutation(400))):
        folder.mkdir()
        for i, j in enumerate(order):
            (folder / f"{i:04d}.txt").write_text(documents[j])
    good, bad = stats([shuffled], words=(1, 2)), stats([sorted_], words=(1, 2))
    assert good.shuffled
    assert not bad.shuffled
    assert any(note.startswith("not shuffled") for note in bad.notes())
    assert not any(note.startswith("not shuffled") for note in good.notes())
    ours, theirs = (s.counts["words:1"] for s in (good, bad))
    assert ours.distinct == theirs.distinct
    assert ours.slope == pytest.approx(theirs.slope)  # the order of files does not matter here


def test_a_few_long_documents_are_no_order(tmp_path):
    # With lengths of infinite variance the halves of a shuffled corpus differ: that is no order.
    lengths = np.minimum(50 * RNG.pareto(1.2, 300) + 20, 20_000).astype(int)
    for i, length in enumerate(lengths):
        (tmp_path / f"{i:04d}.txt").write_text(heaps_text(1, int(length))[0])
    assert stats([tmp_path], words=(1, 2)).shuffled


def test_random_tokens_are_shuffled_however_few_pieces_there_are(tmp_path):
    """13 pieces of which 7 begin in the first half: no reason to call it ordered."""
    write_tokens(tmp_path / "t.bin", [RNG.integers(0, 1000, 50_001)], vocab=1000)
    found = stats([tmp_path / "t.bin"], tokens=(1, 2, 4))
    assert found.counts["tokens:4"].order_exponent == pytest.approx(1.0, abs=0.01)
    assert found.shuffled


def test_a_corpus_twice_over_has_the_same_sequences(tmp_path):
    for i, text in enumerate(heaps_text(200, 100)):
        for copy in "ab":
            (tmp_path / copy).mkdir(exist_ok=True)
            (tmp_path / copy / f"{i}.txt").write_text(text)
    once, twice = stats([tmp_path / "a"], words=(2,)), stats([tmp_path], words=(2,))
    assert twice.counts["words:2"].distinct == once.counts["words:2"].distinct
    assert twice.counts["documents"].duplicates == pytest.approx(0.5, abs=0.005)
    assert twice.counts["documents"].unique_symbols == once.symbols["words"]
    assert twice.counts["words:2"].f[0] == 0


def test_a_corpus_of_nothing_has_no_exponent(tmp_path):
    (tmp_path / "a.txt").touch()
    found = counted([tmp_path / "a.txt"], words=(1,))
    empty: Growth = growth("words:1", found.tallies["words:1"])
    assert (empty.distinct, empty.slope, empty.doubling_factor) == (0, None, None)
    with pytest.raises(DataError, match="nothing to forecast"):
        forecast(found.tallies["words:1"], 2)


@pytest.mark.slow
def test_half_of_a_real_corpus_forecasts_the_whole():
    tallies = counted(["stdlib"], words=(2, 4, 8, 16, 32)).tallies
    for n in (2, 4, 8, 16, 32):
        found = forecast(tallies[f"words:{n}"], 2)
        assert found.backtest is not None
        assert abs(found.backtest) < 0.05
