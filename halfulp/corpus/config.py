"""What is counted, and how the text is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfulp.corpus.keys import MOST
from halfulp.data.corpus import SourceFile
from halfulp.errors import ConfigError

DEFAULT_WORDS = (1, 2, 3, 5, 8)
DEFAULT_TOKENS = (1, 2, 4, 8, 16)
DEFAULT_KEEP = 500_000
_LEAST_KEEP = 1000
_MANY_FILES = 256


@dataclass(frozen=True)
class CountConfig:
    """What is counted; counting is exact up to `keep` keys, which all definitions share.

    - `words`, `tokens`, `windows`: lengths n of the sequences; windows are token sequences that
      begin at a multiple of n in their document.
    - `tokenizer`: "bytes" or a tokenizer.json, for `tokens` and `windows` of text.
    - `text_key`: the JSONL key or Parquet column of the text. `force_bytes` counts files that are
      no text as well.
    - `split`: take the pieces of text files for units of growth, instead of documents, as there
      are few of them.
    - `end_token`: the token between documents, and `vocab`, where token files do not say them.

    Raises ConfigError for a value outside its range.
    """

    words: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    tokenizer: str = ""
    text_key: str = "text"
    end_token: int | None = None
    vocab: int = 0
    keep: int = DEFAULT_KEEP
    force_bytes: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        for name in ("words", "tokens", "windows"):
            lengths = tuple(sorted(set(getattr(self, name))))
            if lengths and not 1 <= lengths[0] <= lengths[-1] <= MOST:
                raise ConfigError(
                    f"{name} are sequences of {', '.join(map(str, lengths))}; their lengths must "
                    f"lie in 1 … {MOST}."
                )
            object.__setattr__(self, name, lengths)
        if self.keep < _LEAST_KEEP:
            raise ConfigError(f"keep is {self.keep}; give {_LEAST_KEEP} keys or more.")
        if (self.end_token is not None and self.end_token < 0) or self.vocab < 0:
            raise ConfigError(
                f"the end token is {self.end_token} and the vocabulary {self.vocab}; "
                "neither can be negative."
            )

    def families(self) -> dict[str, tuple[int, ...]]:
        """The lengths asked for, by what they are made of."""
        every = {"words": self.words, "tokens": self.tokens, "window": self.windows}
        return {name: lengths for name, lengths in every.items() if lengths}

    def definitions(self, *, text: bool) -> tuple[str, ...]:
        """Everything that is counted: "documents", "lines" of text, "words:3", "tokens:8", …"""
        whole = ("documents", "lines") if text else ("documents",)
        return whole + tuple(f"{k}:{n}" for k, ns in self.families().items() for n in ns)


def fitted(config: CountConfig, files: Sequence[SourceFile]) -> CountConfig:
    """`config` with the usual lengths where it names none; few text files are split.

    Raises ConfigError when it does not go with the kind of the files.
    """
    if files[0].kind == "tokens":
        if config.words or config.tokenizer or config.force_bytes:
            raise ConfigError(
                f"{files[0].path} is tokenized already: words, a tokenizer and bytes are for text. "
                "Leave them out, or name text."
            )
        asked = config.tokens or config.windows
        return config if asked else replace(config, tokens=DEFAULT_TOKENS)
    if (config.tokens or config.windows) and not config.tokenizer:
        raise ConfigError(
            f"sequences of tokens were asked for, and {files[0].path} is text. "
            "Name the tokenizer ('bytes' or a tokenizer.json), or count words."
        )
    if config.end_token is not None or config.vocab:
        raise ConfigError(
            f"an end token or a vocabulary is for token files, and {files[0].path} is text. "
            "Leave it out."
        )
    few = all(file.kind == "text" for file in files) and len(files) < _MANY_FILES
    config = replace(config, split=config.split or few)
    if config.families():
        return config
    lengths = {"tokens": DEFAULT_TOKENS} if config.tokenizer else {"words": DEFAULT_WORDS}
    return replace(config, **lengths)
