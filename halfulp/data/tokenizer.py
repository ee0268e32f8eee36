"""Text to tokens: bytes, a trained byte-level BPE, or a user's tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from halfulp.data.corpus import missing
from halfulp.errors import DataError

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
_LONGEST = 1024
END_NAMES = (
    END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS_TOKEN>", "[EOS]", "<|endofdocument|>",
    "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "[SEP]", "<|im_end|>",
)  # fmt: skip


class Tokenizer(Protocol):
    """`vocab` ids from 0; `end` marks the end of a document and no text encodes to it."""

    @property
    def vocab(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes 0 to 255, and 256 for the end of a document."""

    vocab: int = 257
    end: int = 256
    sha256: str = hashlib.sha256(b"halfulp bytes 257").hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def describe(self) -> dict[str, Any]:
        return {"kind": "bytes", "path": None, "sha256": self.sha256, "end_of_document": self.end}


@dataclass(frozen=True)
class Json:
    """A `tokenizers` file. Names of special tokens inside a text are encoded as plain text."""

    path: Path
    vocab: int
    end: int
    sha256: str
    inner: "tokenizers.Tokenizer" = field(repr=False)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in found]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "json",
            "path": str(self.path),
            "sha256": self.sha256,
            "end_of_document": self.end,
        }


def load_tokenizer(path: Path) -> Json:
    """The tokenizer in a tokenizer.json, or in a folder that holds one.

    Raises DataError for a missing or broken file and for a vocabulary without an
    end-of-document token.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise missing(path, "data.tokenizer is 'bytes', 'bpe:N' or a file, and the file")
    import tokenizers

    content = path.read_bytes()
    try:
        inner = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception and ValueError
        raise DataError(
            f"{path} is not a tokenizer.json of the tokenizers library ({error}). "
            "Save it again with Tokenizer.save()."
        ) from error
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    ids = inner.get_vocab(with_added_tokens=True)
    sha256 = hashlib.sha256(content).hexdigest()
    return Json(path, max(ids.values(), default=0) + 1, _end_id(path, content, ids), sha256, inner)


def train_bpe(texts: Iterable[str], size: int) -> bytes:
    """The tokenizer.json of a byte-level BPE with `size` entries, END included.

    The same texts in the same order give the same bytes. Words of more than 1024 bytes are learned
    from in parts.
    Raises DataError when the texts hold too few repeated pairs for `size` entries.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The time to learn from a word goes with the square of its length: a genome would take days.
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_LONGEST)])  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.pre_tokenizer = words
    found = inner.get_vocab_size(with_added_tokens=True)
    if found < size:
        raise DataError(
            f"data.tokenizer asks for 'bpe:{size}', and the training text has repeated pairs for "
            f"{found} entries only. Ask for 'bpe:{found}' or fewer, or give more text."
        )
    return inner.to_str().encode()


def _end_id(path: Path, content: bytes, ids: dict[str, int]) -> int:
    for name in END_NAMES:
        if name in ids:
            return ids[name]
    added = [token["content"] for token in json.loads(content).get("added_tokens", [])]
    raise DataError(
        f"{path} has no end-of-document token: none of {', '.join(END_NAMES)} is in its "
        f"vocabulary; its added tokens are {', '.join(added) or 'none'}. "
        f"Add one with Tokenizer.add_special_tokens([{END!r}]) and save it."
    )
