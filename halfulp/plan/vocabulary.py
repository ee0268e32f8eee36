"""How many token ids a run will have, before anything is tokenized."""

from collections.abc import Sequence
from pathlib import Path

from halfulp.data.config import bpe_size
from halfulp.data.corpus import list_files
from halfulp.data.token_files import read_token_file
from halfulp.data.tokenizer import Bytes, load_tokenizer


def vocabulary_of(tokenizer: str, data: Sequence[str]) -> int:
    """Ids of `tokenizer` (as `data.tokenizer` names it), or of token files; 0 if they do not say.

    Raises DataError for data or a tokenizer that cannot be read, ConfigError for a wrong name.
    """
    files = list_files(data).files
    if files[0].kind == "tokens":
        return max(read_token_file(file.path).vocab or 0 for file in files)
    if tokenizer == "bytes":
        return Bytes().vocab
    return bpe_size(tokenizer) or load_tokenizer(Path(tokenizer).expanduser()).vocab
