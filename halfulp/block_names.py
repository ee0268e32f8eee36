"""What a name says about its block: ordered tables of patterns, and the user's hints."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from itertools import chain

from halfulp.errors import PolicyError

BLOCK_TYPES = ("emb", "qk", "vo", "ffn", "router", "norm", "head")
"""The block types of parameters. Attention GEMMs have no parameters and form "layers.N.attn"."""

_BLOCK_NAME = re.compile(r"emb|norm|head|layers\.\d+\.(?:qk|vo|ffn|router|norm)")


@dataclass(frozen=True)
class Kind:
    """The blocks of a name, and whether its matrix computes attention queries."""

    parts: tuple[str, ...]  # block types or, from a hint, block names
    query: bool = False
    owner: int = -1  # offset in the path of the component that the table recognized
    quantized: bool = True


def _component(pattern: str) -> str:
    return rf"(?:^|\.)(?P<here>(?:{pattern}))(?:\.|$)"


_FFN_NAMES = r"mlp|ffn|feed_?forward|block_sparse_moe|moe|experts?|shared_experts?|intermediate"
_FFN_NAMES += r"|DenseReluDense"  # T5: its wo is no output projection
_NO_ATTENTION = r"^(?!.*(?:attn|attention))"
_LAYER_TABLE = [
    (re.compile(pattern), Kind(tuple(parts.split("+")), query))
    for pattern, parts, query in (
        (_component(r"router|shared_expert_gate"), "router", False),
        (_NO_ATTENTION + r".*" + _component(_FFN_NAMES + r"|output"), "ffn", False),
        (_component(r"c_attn|query_key_value|[Ww]_?qkv|qkv(?:_proj|_lin)?|to_qkv|c_qkv|W_pack"
                    r"|in_proj_(?:weight|bias)"),
         "qk+vo", True),
        (_component(r"kv_(?:[ab]_)?proj(?:_with_mqa)?|[Ww]_?kv(?:_[ab])?|to_kv|c_kv"),
         "qk+vo", False),
        (_component(r"q_(?:[ab]_)?proj|query(?:_proj)?|[Ww]_?q(?:_[ab])?|to_q|q_attn|q_lin|c_q|q"),
         "qk", True),
        (_component(r"k_proj|key(?:_proj)?|[Ww]_?k|to_k|k_attn|k_lin|c_k|k|sinks"), "qk", False),
        (_component(r"[vo]_proj|value(?:_proj)?|[Ww]_?[vo]|to_v|to_out|[vo]_attn|v_lin|out_lin|c_v"
                    r"|v|o"), "vo", False),
        (r"(?:attn|attention).*" + _component(r"c_proj|dense|(?:out_)?proj(?:ection)?|out"),
         "vo", False),
        (_component(r"fc_?[12]|(?:gate|up|down|gate_up)_proj|[Ww][123]|c_fc|c_proj|fc_in|fc_out"
                    r"|dense_h_to_4h|dense_4h_to_h|wi(?:_[01])?|lin(?:ear)?_?[12]"),
         "ffn", False),
    )
]  # fmt: skip
_OUTER_TABLE = [
    (re.compile(pattern), Kind((part,)))
    for pattern, part in (
        (_component(r"lm_heads?|embed_out|output|output_layer|heads?|unembed(?:ding)?|cls|score"
                    r"|project_out"), "head"),
        (_component(r"wte|wpe|project_in|cls_token|\w*embed\w*|(?:pos|tok|type)\w*_emb\w*"), "emb"),
    )
]  # fmt: skip
NORM_NAME = re.compile(
    r"(?:^|_)(?:ln|(?:layer|rms|batch|group)?_?norm)(?:_?\d+|_?[a-z]|_[a-z\d]+)?$"
)


@cache
def look_up(path: str, outer: bool) -> Kind | None:
    """What the table for names within a layer, or outside of all layers, says of `path`."""
    for pattern, kind in _OUTER_TABLE if outer else _LAYER_TABLE:
        if match := pattern.search(path):
            return Kind(kind.parts, kind.query, match.start("here"))
    return None


class Hints:
    """The user's hints and which of them were used."""

    def __init__(self, hints: Mapping[str, str]):
        said = chain(*hints.items()) if isinstance(hints, Mapping) else [hints]
        if not all(isinstance(word, str) for word in said):
            raise PolicyError(
                f"hints = {hints!r}. Give a mapping of name patterns to blocks, for example "
                "{'*.mixer.in_proj': 'ffn'}."
            )
        self.kinds = {glob: _parse_hint(glob, value) for glob, value in hints.items()}
        self.patterns = {glob: re.compile(translate(glob)) for glob in hints}
        self.used: set[str] = set()

    def find(self, *names: str) -> Kind | None:
        """What the first hint that matches one of the names of a thing says."""
        for glob, pattern in self.patterns.items():
            if any(pattern.match(name) for name in names):
                self.used.add(glob)
                return self.kinds[glob]
        return None

    def check_used(self, names: Iterable[str]) -> None:
        """PolicyError for a hint that decided none of `names`."""
        for glob in self.kinds.keys() - self.used:
            valid = list(dict.fromkeys(n for name in names for n in (name, globbed(name))))
            near = difflib.get_close_matches(glob, valid, 3, 0.4) or valid[:3]
            raise PolicyError(
                f"hint {glob!r} decides no parameter and no GEMM module: no name matches it, or an "
                f"earlier hint does. Nearest names: {', '.join(near)}. "
                "Fix the pattern or delete the hint."
            )


def _parse_hint(glob: str, value: str) -> Kind:
    text = value.removesuffix(":fp32")
    parts = tuple(text.split("+"))
    for part in parts:
        if part not in BLOCK_TYPES and not _BLOCK_NAME.fullmatch(part):
            near = difflib.get_close_matches(part, BLOCK_TYPES, 3, 0.3)
            raise PolicyError(
                f"hint {glob!r} = {value!r}: {part!r} is no block. Give a block type "
                f"({', '.join(near or BLOCK_TYPES)}), a block such as 'layers.3.ffn', or 'qk+vo' "
                "for a fused matrix; add ':fp32' to leave its products unquantized."
            )
    query = any(part.rpartition(".")[2] == "qk" for part in parts)
    return Kind(parts, query, quantized=text == value)


def globbed(name: str) -> str:
    """`name` with every number among its components replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def block_type(block: str) -> str:
    """The type of a block: "layers.3.vo" → "vo", "head" → "head", "layers.3.attn" → "attn"."""
    return block.rpartition(".")[2]


def layer_of(block: str) -> int | None:
    """The layer of a block or of a GEMM name; None outside the layers."""
    match = re.match(r"layers\.(\d+)\.", block)
    return int(match[1]) if match else None
