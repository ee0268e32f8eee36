"""The MODEL of a command: a run directory, a Hugging Face directory or a preset; and its text."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfulp.data import DataConfig, open_data
from halfulp.errors import CheckError, ConfigError, DataError
from halfulp.numerics.kernel import cache_directory
from halfulp.train.config import DataSection, ModelConfig
from halfulp.train.model import build_model
from halfulp.train.presets import PRESETS

LENGTH, LEAST_TOKENS, ADVISED_TOKENS = 128, 128, 512
_INTEGERS = {"I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2", "F4"}


@dataclass(frozen=True)
class Loaded:
    """A model in fp32 and eval mode, and the text to look at it with.

    `text` and `held_out` are token ids [B, T]. `notes` say what a reader of the result must know.
    """

    name: str
    model: nn.Module
    text: Tensor
    held_out: Tensor
    notes: tuple[str, ...]


def load_model(
    where: str,
    *,
    data: list[str] | None = None,
    tokenizer: str | None = None,
    tokens: int = ADVISED_TOKENS,
    seed: int = 0,
) -> Loaded:
    """The model that `where` names, with `tokens` tokens of text and as many held out.

    * A run directory: its newest checkpoint, its own tokenizer and held-out text.
    * A Hugging Face directory: its weights and its tokenizer.json.
    * A preset: random weights.

    `data` and `tokenizer` replace the text and its tokenizer. Raises ConfigError for what is no
    model, DataError for text that is too short or does not fit, CheckError for weights that are
    quantized already.
    """
    path, notes = Path(where), []
    config, trained = _data_of(path, where)
    if where not in PRESETS and not path.exists():
        raise ConfigError(
            f"MODEL {where!r} is neither a run directory, nor a Hugging Face directory, nor a "
            f"preset ({', '.join(PRESETS)}). A model of the Hugging Face Hub: download it first "
            "(hf download NAME --local-dir DIR) and give DIR."
        )
    config = _changed(config, data, tokenizer, keep_split=trained and not data)
    weights = weights_of(path)
    if weights is not None:
        notes += _stored(weights)
    corpus = open_data(config, cache_directory() / "data")
    length = LENGTH if weights is None else min(LENGTH, _positions(weights))
    built = build_model(
        ModelConfig(preset=where if weights is None else str(weights)),
        vocab=corpus.vocab, length=length, seed=seed,
    )  # fmt: skip
    if built.origin.startswith("random"):
        notes.append(f"{where} has {built.origin}: a trained model differs.")
    pair = _text(corpus, tokens, length, seed, held_only=trained and not data)
    return Loaded(where, built.model.eval(), *pair, tuple(notes))


def _data_of(path: Path, where: str) -> tuple[DataConfig, bool]:
    """The data that belong to the model, and whether the model was trained on their train split."""
    if (path / "events.jsonl").is_file():
        from halfulp.train.loop import config_of

        return config_of(path).data.corpus(), True
    if where not in PRESETS and (path / "tokenizer.json").is_file():
        return DataConfig(tokenizer=str(path / "tokenizer.json")), False
    return DataSection().corpus(), False


def _changed(
    config: DataConfig, data: list[str] | None, tokenizer: str | None, *, keep_split: bool
) -> DataConfig:
    if data:
        config = replace(config, source=tuple(data), vocab=0, max_tokens=0)
    if tokenizer:
        config = replace(config, tokenizer=tokenizer)
    return config if keep_split else replace(config, val_fraction=0.5)


def weights_of(path: Path) -> Path | None:
    """The Hugging Face directory of the weights: a run's newest checkpoint, or the path itself."""
    if not path.is_dir():
        return None
    if not (path / "events.jsonl").is_file():
        return path
    from halfulp.train import checkpoint

    folder = path / "checkpoints"
    steps = checkpoint.steps_in(folder)
    if not steps:
        raise ConfigError(
            f"{path} has no checkpoint: none is written yet, or it is a finished run of a sweep, "
            "which keeps none. Train it with `halfulp train`."
        )
    checkpoint.verify(folder, max(steps))
    return checkpoint.path_of(folder, max(steps))


def _shape(path: Path) -> dict[str, Any]:
    """config.json, or nothing where it is broken: build_model says what is wrong with it."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _positions(path: Path) -> int:
    """The longest sequence of the model, as far as its config.json says."""
    shape = _shape(path)
    found = (shape.get(n) for n in ("max_position_embeddings", "n_positions"))
    return min((n for n in found if isinstance(n, int) and n > 0), default=LENGTH)


def _stored(path: Path) -> list[str]:
    """What the weights on disk are, when they are not fp32; CheckError when they are quantized."""
    dtypes = {d for file in sorted(path.glob("*.safetensors")) for d in _dtypes(file)}
    content = _shape(path)
    names = content.get("architectures") or []
    if names and not any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names):
        raise ConfigError(
            f"{path} is a {names[0]}. This command judges models that predict the next token "
            "(…ForCausalLM); from Python, halfulp.check takes any module that returns logits."
        )
    quantized = sorted(dtypes & _INTEGERS)
    if quantized or "quantization_config" in content:
        how = ", ".join(quantized) or str(content["quantization_config"])[:80]
        raise CheckError(
            f"{path} is quantized already ({how}): the reference must be the weights it was made "
            "from. Give the original checkpoint."
        )
    half = sorted(dtypes & {"BF16", "F16"})
    if not half:
        return []
    word = "bf16" if "BF16" in half else "fp16"
    return [
        f"The checkpoint is {word}: the reference is its weights in fp32, so that weight sites are "
        f"priced 0 for {word}."
    ]


def _dtypes(file: Path) -> set[str]:
    """Data types in the header of a safetensors file; nothing for a file without one."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if 0 < size < 1 << 30 else {}
    except (OSError, ValueError):
        return set()  # loading says what is wrong with it
    return {v["dtype"] for v in header.values() if isinstance(v, dict) and "dtype" in v}


def check_tokens(tokens: int) -> None:
    """ConfigError for fewer than LEAST_TOKENS."""
    if tokens < LEAST_TOKENS:
        raise ConfigError(f"--tokens {tokens} is too few: give {LEAST_TOKENS} or more.")


def _text(
    corpus: Any, tokens: int, length: int, seed: int, *, held_only: bool
) -> tuple[Tensor, Tensor]:
    """Token ids of two texts that share no window: the first to price, the second to judge."""
    check_tokens(tokens)
    wanted = math.ceil(tokens / length)
    if not held_only:
        first, second = (_rows(corpus, s, wanted, length, seed) for s in ("train", "val"))
        return first, second
    both = _rows(corpus, "val", 2 * wanted, length, seed)
    if len(both) < 2:
        raise DataError(
            f"the run holds out {len(both)} window of {length} tokens, and two are needed. Give "
            "other text with --data."
        )
    return both[: len(both) // 2], both[len(both) // 2 :]


def _rows(corpus: Any, split: str, wanted: int, length: int, seed: int) -> Tensor:
    source = corpus.train if split == "train" else corpus.val
    if len(source) <= LEAST_TOKENS:
        raise DataError(
            f"each half of the text must have {LEAST_TOKENS + 1} tokens, and one has "
            f"{len(source)}. Give more text: {2 * ADVISED_TOKENS} tokens or more are advised."
        )
    rows = min(wanted, corpus.windows(split, length))
    return corpus.batch(split, 0, rows=rows, length=length, seed=seed)[:, :length]
