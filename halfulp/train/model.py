"""The model of a run: a preset with random weights, or a local Hugging Face directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfulp.errors import ConfigError
from halfulp.train import tree
from halfulp.train.config import ModelConfig
from halfulp.train.presets import PRESETS


@dataclass(frozen=True)
class Built:
    """A model on the CPU, in fp32, and where its weights came from, in words."""

    model: nn.Module
    origin: str


def build_model(config: ModelConfig, *, vocab: int, length: int, seed: int) -> Built:
    """The model of `config` for `vocab` token ids and sequences of `length` tokens.

    Random weights depend on `seed` only; the global random state is neither read nor changed.
    A directory's weights are loaded where it has any. ConfigError for an unknown preset, a model
    too small for the vocabulary or the length, and a directory that is not complete.
    """
    if config.preset in PRESETS:
        hf = _preset_config(config, vocab=vocab, length=length)
        return Built(_random(hf, seed), f"random weights of seed {seed}")
    path = Path(config.preset)
    if not path.exists():
        raise ConfigError(
            f"model.preset = {config.preset!r} is neither a preset nor a local path. "
            f"{tree.nearest(config.preset, PRESETS)} Or give a Hugging Face directory; "
            "a model of the Hub is downloaded first (hf download NAME --local-dir DIR)."
        )
    hf = _local_config(path, config)
    _check_fits(hf, path, vocab=vocab, length=length)
    if path.is_dir() and _has_weights(path):
        return Built(_load(path), f"weights loaded from {path}")
    return Built(_random(hf, seed), f"random weights of seed {seed}, shape of {path}")


def outline(config: ModelConfig, *, vocab: int = 1, length: int = 1) -> nn.Module:
    """The modules of `config` without their values: names and shapes; errors as `build_model`.

    Without `vocab` and `length` those of a preset's embeddings mean nothing. Weights of a directory
    are not read.
    """
    path = Path(config.preset)
    if path.is_dir() and config.preset not in PRESETS:
        _has_weights(path)
        config = replace(config, preset=str(path / "config.json"))
    with torch.device("meta"):
        return build_model(config, vocab=vocab, length=length, seed=0).model


def next_token_loss(model: nn.Module, batch_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats/token of predicting `batch_BT[:, 1:]`, computed in fp32."""
    return nn.functional.cross_entropy(*next_token_logits(model, batch_BT))


def next_token_logits(
    model: nn.Module, batch_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] in fp32 and their targets [N]: what `next_token_loss` is the loss of."""
    logits = model(input_ids=batch_BT[:, :-1], use_cache=False).logits
    targets = batch_BT[:, 1:].reshape(-1)
    return logits.float().reshape(len(targets), -1), targets


def config_json(model: nn.Module) -> str:
    """config.json of a Hugging Face model, every value written out."""
    config: Any = model.config
    return config.to_json_string(use_diff=False)


def checkpoint_activations(model: nn.Module) -> None:
    """Make each layer of a Hugging Face model recompute its activations in the backward pass."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    # The second is the first under the name that it had in earlier releases of transformers 5.
    enable: Any = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer layers: the longest list of modules that hold parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m.parameters())]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers to shard. Use train.parallel = 'ddp'."
        )
    return max(lists, key=len)


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """torch's global random state set to `seed` inside, and restored on exit."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _preset_config(config: ModelConfig, *, vocab: int, length: int) -> Any:
    from transformers import AutoConfig

    shape = PRESETS[config.preset]
    hidden = config.hidden or shape.hidden
    head = shape.hidden // shape.heads
    if hidden % (head * shape.heads // shape.kv_heads):
        raise ConfigError(
            f"model.hidden = {hidden} does not fit {config.preset}, whose heads have {head} "
            f"channels. Give a multiple of {head * shape.heads // shape.kv_heads}."
        )
    heads = hidden // head
    ffn = _multiple_of_8(shape.ffn * hidden / shape.hidden)
    layers = config.layers or shape.layers
    if shape.family == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": ffn,
        }
        sizes |= {"n_positions": length, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn}
        sizes |= {"num_attention_heads": heads, "head_dim": head}
        sizes |= {"num_key_value_heads": heads * shape.kv_heads // shape.heads}
        sizes |= {"max_position_embeddings": max(1024, length)}
    sizes |= {"vocab_size": vocab, "tie_word_embeddings": shape.tied}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(shape.family, **sizes)


def _multiple_of_8(value: float) -> int:
    return max(8, 8 * round(value / 8))


def _local_config(path: Path, config: ModelConfig) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if config.layers or config.hidden:
        raise ConfigError(
            f"model.layers and model.hidden change presets, and {path} is a local model. "
            "Delete them, or edit its config.json."
        )
    directory = path if path.is_dir() else path.parent
    name = "config.json" if path.is_dir() else path.name
    if not (directory / name).is_file():
        raise ConfigError(f"{directory} has no {name}. Give a Hugging Face model directory.")
    try:
        return AutoConfig.from_pretrained(directory / name, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"{directory / name} is not a model configuration: {error}") from error


def _check_fits(hf: Any, path: Path, *, vocab: int, length: int) -> None:
    if hf.vocab_size < vocab:
        raise ConfigError(
            f"{path} has {hf.vocab_size} token ids and the data needs {vocab}. "
            "Use the tokenizer that belongs to the model (data.tokenizer)."
        )
    positions = getattr(hf, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise ConfigError(
            f"{path} has {positions} positions and data.length is {length}. Give a smaller length."
        )


def _has_weights(path: Path) -> bool:
    if any(path.glob("*.safetensors")):
        return True
    pickled = [p.name for p in (*path.glob("pytorch_model*.bin"), *path.glob("*.pt"))]
    if pickled:
        raise ConfigError(
            f"{path} has its weights in {pickled[0]}, a pickle, which is never loaded. "
            "Convert it to safetensors (save_pretrained of transformers does)."
        )
    return False


def _load(path: Path) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the weights in {path} cannot be loaded: {error}. A file is cut off, missing or of "
            "another model; copy the directory again."
        ) from error
    model, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:
        raise ConfigError(
            f"{path} lacks {len(absent)} tensors of its own model, the first is {absent[0]}. "
            "Complete the directory, or delete its weights to start from random ones."
        )
    return _ready(model)


def _random(hf: Any, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with random_state(seed):
        model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    return _ready(model)


def _ready(model: nn.Module) -> nn.Module:
    config: Any = model.config
    config.use_cache, config.architectures = False, [type(model).__name__]
    return model.train()
