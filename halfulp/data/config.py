"""What a run reads: sources, tokenizer and held-out share."""

import math
from dataclasses import dataclass

from halfulp.errors import ConfigError

SMALLEST_BPE = 258  # 256 bytes, the end-of-document token and one merge


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and which of them are held out.

    - `source`: "stdlib" (the running Python's own library) or paths of text files, folders,
      JSONL(.gz, .zst), Parquet, nanoGPT `.bin` or Megatron `.bin`/`.idx`.
    - `tokenizer`: "bytes", "bpe:N" (trained on the training text) or the path of a
      tokenizer.json. Token files are tokenized already and leave it at "bytes".
    - `text_key`: the JSONL key or Parquet column that holds the text.
    - `max_tokens` keeps the first so many training tokens (0 = all); held-out tokens stay.
    - `vocab`: needed by token files that do not say their own.

    Raises ConfigError for a value outside its range.
    """

    source: tuple[str, ...] = ("stdlib",)
    tokenizer: str = "bytes"
    text_key: str = "text"
    val_fraction: float = 0.05
    max_tokens: int = 0
    seed: int = 0
    vocab: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", _as_sources(self.source))
        if not isinstance(self.tokenizer, str) or not self.tokenizer:
            raise ConfigError(
                f"data.tokenizer is {self.tokenizer!r}; "
                "give 'bytes', 'bpe:4096' or the path of a tokenizer.json."
            )
        bpe_size(self.tokenizer)
        if not isinstance(self.text_key, str) or not self.text_key:
            raise ConfigError(f"data.text_key is {self.text_key!r}; give the name of a key.")
        _check_fraction(self.val_fraction)
        for name in ("max_tokens", "seed", "vocab"):
            _check_count(name, getattr(self, name))


def bpe_size(tokenizer: str) -> int | None:
    """The vocabulary asked for by "bpe:N", None for another tokenizer.

    Raises ConfigError when N is not a number or too small.
    """
    if tokenizer != "bpe" and not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe").removeprefix(":")
    if not (size.isascii() and size.isdigit()):
        raise ConfigError(
            f"data.tokenizer is {tokenizer!r}; give the vocabulary as a number: 'bpe:4096'."
        )
    if not SMALLEST_BPE <= int(size) <= 2**24:
        raise ConfigError(
            f"data.tokenizer is {tokenizer!r}; the vocabulary holds 256 bytes and the "
            f"end-of-document token, so give a number from {SMALLEST_BPE} to {2**24}."
        )
    return int(size)


def _as_sources(source: object) -> tuple[str, ...]:
    if not isinstance(source, (tuple, list)) or not source:
        raise ConfigError(
            f'data.source is {source!r}; give a list of sources, for example ["stdlib"].'
        )
    for item in source:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"data.source holds {item!r}; every source is 'stdlib' or a path.")
    return tuple(source)


def _check_fraction(fraction: object) -> None:
    number = fraction if isinstance(fraction, (int, float)) else math.nan
    if not 0 < number <= 0.5:
        raise ConfigError(
            f"data.val_fraction is {fraction!r}; give a share above 0 and up to 0.5. "
            "Held-out text is always needed: the evaluation reads it."
        )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ConfigError(
            f"data.{name} is {value!r}; give a whole number that is not negative and below 2**63."
        )
