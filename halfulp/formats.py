"""Formats in a user's words: what `e4m3`, `mxfp8` or a quantizer string mean here."""

import difflib

from halfulp.errors import FormatError
from halfulp.numerics.format import FORMATS, MEANT, get_format
from halfulp.numerics.quantizer import Quantizer, parse_quantizer

NAMED = {
    "mxfp8": "e4m3@1x32:e8m0_up",
    "mxfp8_e5m2": "e5m2@1x32:e8m0_up",
    "mxfp6": "e2m3@1x32:e8m0_up",
    "mxfp4": "e2m1@1x32:e8m0_up",
    "nvfp4": "e2m1@1x16:nvfp4",
}
"""Words that stand for a format with its block scales."""
DEFAULT_FORMATS = ("bf16", "fp16", "e4m3", "e5m2", "e2m1")
_SCALE_BITS = {"e8m0_up": 8, "e8m0_floor": 8, "nvfp4": 8, "current": 32}


def format_quantizer(word: str) -> Quantizer:
    """The quantizer that a word stands for.

    * `mxfp8`, `nvfp4` and the other words of `NAMED`: the format with its block scales.
    * A format of at most 8 bits: one power-of-two scale per tensor, from its present amax.
    * A wider format: rounded without a scale.
    * Any other quantizer string of halfulp.numerics.quantizer: as written.

    Raises FormatError naming the nearest words.
    """
    if word in NAMED:
        return parse_quantizer(NAMED[word])
    if not any(mark in word for mark in "@:"):
        fmt = _known_format(word)
        scaled = f"{fmt}@tensor:current:p2"
        return parse_quantizer(scaled if fmt.bits <= 8 else str(fmt))
    return parse_quantizer(word)


def format_bits(word: str) -> float:
    """Average stored bits per element, scales of blocks and tiles included.

    Scales of whole tensors and rows are not counted: their share vanishes with the size.
    """
    q = format_quantizer(word)
    rows, columns = q.tile
    shared = rows * columns
    return q.format.bits + (_SCALE_BITS[q.scale] / shared if shared else 0.0)


def _known_format(word: str):
    try:
        return get_format(word)
    except FormatError as error:
        near = MEANT.get(word) or difflib.get_close_matches(word, [*NAMED, *FORMATS], cutoff=0.4)
        raise FormatError(
            f"format {word!r} is unknown. Nearest: {', '.join(near or DEFAULT_FORMATS)}. "
            "A quantizer such as e4m3@1x32:e8m0_up also works; `halfulp formats` lists formats."
        ) from error
