"""Which tensors are sites, what they are called, and what a walk refuses."""

import pytest
import torch
from torch import nn

from halfulp.batch import run
from halfulp.check.places import Places
from halfulp.check.prices import price
from halfulp.check.setup import prepare
from halfulp.check.sites import Walk, op_name
from halfulp.errors import CheckError
from tests.check.toys import Words, untrained

IDS = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(0))


class Silent:
    def operand(self, infos, x, transposed):
        return x

    def output(self, info, x, inputs, inplace):
        return x

    def writes(self, x):
        pass


def sites_of(model: nn.Module, ids: torch.Tensor, attention: str = "eager"):
    with prepare(model, attention=attention), torch.no_grad():
        walk = Walk(model, Places(model), Silent())
        with walk:
            run(model, ids)
    return walk


def stored(walk: Walk) -> dict[str, str]:
    return {s.name: s.kind for s in walk.infos.values() if s.family == "stored"}


@pytest.fixture(scope="module")
def words() -> Words:
    torch.manual_seed(0)
    return Words().eval()


def test_a_layer_in_plain_torch(words):
    names = [n for n, _ in stored(sites_of(words, IDS)).items() if n.startswith("layers.1")]
    assert names == [
        "layers.1.norm1:layer_norm#0",
        "layers.1.self_attn.q_proj:linear#0",
        "layers.1.self_attn.k_proj:linear#0",
        "layers.1.self_attn.v_proj:linear#0",
        "layers.1:matmul#0",
        "layers.1:div#0",
        "layers.1:softmax#0",
        "layers.1:matmul#1",
        "layers.1.self_attn.o_proj:linear#0",
        "layers.1:add#0",
        "layers.1.norm2:layer_norm#0",
        "layers.1.up_proj:linear#0",
        "layers.1:gelu#0",
        "layers.1.down_proj:linear#0",
        "layers.1:add#1",
    ]


def test_every_spelling_of_an_operation_has_one_name():
    x = torch.ones(2)
    spellings = {
        "div": (torch.Tensor.div, torch.Tensor.__truediv__, torch.Tensor.div_, torch.true_divide),
        "mul": (torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.mul_),
        "add": (torch.add, torch.Tensor.__add__, torch.Tensor.__iadd__, torch.Tensor.add_),
        "matmul": (torch.matmul, torch.Tensor.__matmul__, torch.mm),
    }
    for name, functions in spellings.items():
        assert {op_name(f)[0] for f in functions} == {name}
    assert op_name(torch.Tensor.div_)[1]
    assert op_name(torch.Tensor.__itruediv__)[1]
    assert not op_name(torch.Tensor.__truediv__)[1]
    assert x.sum() == 2


def test_llama_kinds_blocks_and_operands():
    walk = sites_of(untrained("llama"), IDS)
    by_name = walk.infos
    attention = "model.layers.0.self_attn"
    kinds = {
        f"{attention}.q_proj:linear#0": ("q", "layers.0.qk"),
        f"{attention}:add#0": ("q", "layers.0.attn"),
        f"{attention}:add#1": ("k", "layers.0.attn"),
        f"{attention}:matmul#0": ("scores", "layers.0.attn"),
        f"{attention}:softmax#0": ("probs", "layers.0.attn"),
        f"{attention}:matmul#1": ("attn_out", "layers.0.attn"),
        "model.layers.1.mlp.act_fn:silu#0": ("act", "layers.1.ffn"),
        "model.layers.1:add#1": ("residual", "layers.1.residual"),
        "model.norm:rsqrt#0": ("norm", "norm"),
        "lm_head:linear#0": ("logits", "head"),
    }
    found = {name: (by_name[name].kind, by_name[name].block) for name in kinds}
    assert found == kinds
    operands = {s.gemm: s for s in by_name.values() if s.family == "operand" and s.operand == "w"}
    assert {g.name for g in Places(untrained("llama")).map.gemms} == set(operands)
    assert operands["layers.0.attn.qk"].kind == "k"
    assert operands["layers.0.attn.pv"].kind == "v"
    assert operands["layers.0.attn.pv"].shape[-1] == IDS.shape[1]  # K last


def test_what_stores_nothing_is_no_site():
    walk = sites_of(untrained("gpt2"), IDS)
    attention = [s for s in stored(walk) if s.startswith("transformer.h.0.attn:")]
    # scores, their scaling by 32^-0.5, probabilities, output; the mask's addition is exact
    assert [s.partition(":")[2] for s in attention] == [
        "matmul#0",
        "mul#0",
        "softmax#0",
        "matmul#1",
    ]
    assert walk.masked == ["transformer.h.0.attn:add#0", "transformer.h.1.attn:add#0"]
    # gains that are all one multiply exactly; trained ones do not
    llama = untrained("llama")
    before = stored(sites_of(llama, IDS))
    llama.model.norm.weight.data[3] = 1.1
    after = stored(sites_of(llama, IDS))
    assert set(after) - set(before) == {"model.norm:mul#1"}


def test_fused_attention_has_no_scores(words):
    walk = sites_of(untrained("llama"), IDS, attention="sdpa")
    kinds = set(stored(walk).values())
    assert not kinds & {"scores", "probs"}
    assert "attn_out" in kinds


def test_in_place_spelling_gives_the_same_prices():
    prices = {}
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Words(inplace=inplace).eval()
        prices[inplace] = price(model, IDS, formats=("e4m3",), margins=False)
        assert not prices[inplace].unpriced
    by_name = {
        key: dict(zip([s.name for s in p.sites], p.kl[:, 0].tolist(), strict=True))
        for key, p in prices.items()
    }
    assert by_name[True].keys() == by_name[False].keys()
    for name, kl in by_name[False].items():
        assert by_name[True][name] == pytest.approx(kl, rel=1e-3), name


class Detached(Words):
    def forward(self, ids):
        x = self.embed(ids)
        side = (self.layers[0](x) * 0.3).detach()
        return self.lm_head(self.norm(self.layers[1](x) + side))


def test_a_detached_site_is_unknown_and_never_free():
    torch.manual_seed(0)
    prices = price(Detached().eval(), IDS, formats=("bf16",), margins=False)
    unknown = {s.name for s, kl in zip(prices.sites, prices.kl[:, 0], strict=True) if kl.isnan()}
    assert "layers.0:matmul#0" in unknown
    assert "weight:layers.0.up_proj.weight" in unknown
    assert not any(name.startswith("layers.1") for name in unknown)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x) * x.sin()

    @staticmethod
    def backward(ctx, g):
        return g


class Opaque(Words):
    def forward(self, ids):
        return self.lm_head(self.norm(Square.apply(super().forward(ids) @ self.lm_head.weight)))


def test_operations_without_a_price_are_listed():
    torch.manual_seed(0)
    prices = price(Opaque().eval(), IDS, formats=("bf16",), margins=False)
    assert set(prices.unpriced) == {":exp#0", ":sin#0", ":mul#0"}
    assert 0.02 < prices.unpriced_share < 0.2


def test_a_model_is_given_back_as_it_was():
    model = untrained("llama").train()
    model.config._attn_implementation, model.config.use_cache = "sdpa", True
    model.model.norm.weight.grad = torch.ones(128)
    model.lm_head.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    price(model, IDS, formats=("e4m3",), families=("stored", "operand"))
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache
    assert all(m.training for m in model.modules())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_that_are_no_reference_are_refused(words):
    import halfulp

    with pytest.raises(CheckError, match=r"bfloat16.*\.float\(\)"):
        price(untrained("llama").bfloat16(), IDS)
    with pytest.raises(CheckError, match="compiled"):
        price(torch.compile(words, backend="eager"), IDS)
    quantized = untrained("llama")
    halfulp.quantize(quantized, "te_current")
    with pytest.raises(CheckError, match="unquantize"):
        price(quantized, IDS)
    with pytest.raises(CheckError, match="must return logits"):
        price(nn.Sequential(nn.Embedding(31, 4), nn.Flatten(0)), IDS)
    with pytest.raises(CheckError, match="none of the asked sites"):
        price(words, IDS, sites=("nowhere",))
