"""Words of texts in any script, against a definition with a regular expression."""

import random
import re

import numpy as np
import pytest

from halfulp.corpus import words as words_module
from halfulp.corpus.words import Words

ALONE = "[\u3001-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
LETTER = f"(?!{ALONE})[A-Za-z0-9_\x80-\u2fff\u3001-\U0010ffff]"
WORD = re.compile(f"{ALONE}|(?:{LETTER})+|[^\\s\u3000]", re.ASCII)
EDGES = [0x2FFF, 0x3000, 0x3001, 0x9FFF, 0xA000, 0xAC00, 0xD7A3, 0xF8FF, 0xF900, 0xFAFF, 0xFB00,
         0xFEFF, 0xFF00, 0xFFEF, 0xFFF0, 0xFFFD, 0x1F600, 0x1FFFF, 0x20000, 0x3FFFF,
         0x40000]  # fmt: skip


def symbols(text: str | bytes) -> np.ndarray:
    data = text.encode() if isinstance(text, str) else text
    return Words().feed([data], np.array([True])).words


def expected(text: str) -> np.ndarray:
    """The symbols of the words that the expression finds, each taken alone."""
    found = [symbols(word) for word in WORD.findall(text)]
    assert all(len(one) == 1 for one in found)
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def random_text(chance: random.Random, size: int) -> str:
    ranges = [(0x20, 0x7E)] * 4 + [(0x80, 0x24F), (0x3000, 0x30FF), (0x4E00, 0x9FFF)] * 2
    ranges += [(0x80, 0xD7FF), (0xE000, 0x10FFFF), (0x1FF00, 0x20100)]
    drawn = [chance.randint(*chance.choice(ranges)) for _ in range(size)]
    return "".join(map(chr, [chance.choice(EDGES) if chance.random() < 0.1 else c for c in drawn]))


@pytest.mark.parametrize("seed", range(20))
def test_words_are_those_of_the_definition(seed):
    text = random_text(random.Random(seed), 300)
    np.testing.assert_array_equal(symbols(text), expected(text))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_where_bytes_are_cut_changes_nothing(size, monkeypatch):
    monkeypatch.setattr(words_module, "LONGEST", 20)  # a cut word and a cut character meet
    data = random_text(random.Random(size), 400).encode() + b"a" * 18 + "語".encode() * 3
    data += b"\xe3\x81" + b"a" * 18 + b"\xf0\xa0\x80"
    cut, found = Words(), []
    for at in range(0, len(data), size):
        found.append(cut.feed([data[at : at + size]], np.array([False])).words)
    found.append(cut.feed([b""], np.array([True])).words)
    np.testing.assert_array_equal(np.concatenate(found), symbols(data))


def test_chinese_and_japanese_are_counted_by_characters():
    text = "誤差は、0.5 ulp以下です。\u3000Größe,한국어 단어"
    # 誤 差 は 、 0 . 5 ulp 以 下 で す 。 Größe , 한국어 단어
    assert len(symbols(text)) == 17
    assert len(symbols("中文" * 5000)) == 10_000
    assert len(np.unique(symbols("中文" * 5000))) == 2


def test_bytes_that_are_no_character_are_letters():
    assert len(symbols(b"ab\xe3\x81cd")) == 1
    assert len(symbols(b"ab\xf0\xa0\x80 \xe4")) == 2
    assert len(symbols(b"a\xe3\x80\x80b")) == 2
