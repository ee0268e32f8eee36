"""Apply a policy to a model in place (linears, attention, tables, norms), and undo it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfulp.attention import keep_attention, refuse_own_attention
from halfulp.blocks import block_map
from halfulp.bypass import refuse_bypassed
from halfulp.errors import PolicyError
from halfulp.numerics.random import Key
from halfulp.numerics.statistics import shares
from halfulp.policy import Policy, Resolution, refuse_partial
from halfulp.quantized_modules import (
    attach,
    attach_table,
    detach,
    quantized_tables,
    restore_classes,
)
from halfulp.recipe import OPERANDS
from halfulp.site import Clock, Site, histories
from halfulp.stored import Stored


class Quantized:
    """What `quantize` did to a model, and the switches of its simulated arithmetic.

    `resolution` lists every GEMM with its recipe. Outside `halfulp train`, each forward pass of the
    model in training mode is one step of the random streams and delayed scales, unless `set_step`
    is used: then steps end with `end_step`. Where activation checkpointing would repeat a forward
    pass after the next one, and so round otherwise, it raises ConfigError.
    """

    def __init__(self, model: nn.Module, seed: int, carrier: str, allow_partial: bool) -> None:
        self.model, self.seed, self.carrier = model, seed, carrier
        self.allow_partial = allow_partial
        self.clock = Clock()
        self.sites: dict[str, Site] = {}
        self.resolution: Resolution
        self._stored: Stored | None = None
        # Names, amaxes, scales and largest values of the step that ended last.
        self._rolled: tuple[list[str], Tensor, list[Tensor], list[float]] | None = None
        self._manual = self._looked = False
        self._hooks: tuple[RemovableHandle, ...] = ()

    def follow(self) -> None:
        """See every forward pass of the model."""
        self._hooks = (
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward),
        )

    def leave(self) -> None:
        """See no forward pass any more."""
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        rules = "; ".join(f"{m} → {name}, {n} GEMMs" for m, name, n in self.resolution.rows())
        return f"Quantized({type(self.model).__name__}: {rules})"

    def switch(self, resolution: Resolution) -> None:
        """Put `resolution` in force; weights stay.

        GEMMs that it rounds as before keep their histories and counters, others begin anew.
        """
        before = self.sites
        detach(self.model)
        self._rolled, self._looked = None, False
        self.resolution = resolution
        self._stored = None if self.allow_partial else Stored(resolution)
        self.sites = {
            gemm.name: before[gemm.name]
            if gemm.name in before and before[gemm.name].spec == spec
            else Site(gemm.name, gemm.block, spec, self.seed, self.clock, self.carrier)
            for gemm, _, spec, _ in resolution.gemms
            if not spec.is_identity
        }
        for gemm, *_ in resolution.gemms:
            if (site := self.sites.get(gemm.name)) is not None:
                attach(self.model, gemm.module, gemm.role, site)
        for modules in (resolution.embeds, resolution.norms):
            for name, quantizer in modules.items():
                if not quantizer.is_identity:
                    key = Key.of(self.seed, name)
                    attach_table(self.model.get_submodule(name), quantizer, self.clock, key)

    def _before_forward(self, model: nn.Module, _: object) -> None:
        if not torch.compiler.is_compiling():
            self.clock.recent.forget()
            self.clock.differentiated = None
            keep_attention(model)
        if not (model.training and torch.is_grad_enabled()):
            return
        if self._stored is not None and not torch.compiler.is_compiling():
            self._stored.look(model)
        if self._manual:
            return
        if torch.compiler.is_compiling():
            self.clock.tensor[0] += 1
            return
        self.end_step()
        self.clock.set(self.clock.step + 1, 0)

    def _after_forward(self, model: nn.Module, _: object, output: object) -> None:
        """The first eager forward pass with gradients shows whether a GEMM went past its site."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and self.clock.enabled):
            return
        self.clock.time_backward(output)
        if not self._looked:
            self._looked = True
            refuse_bypassed(model, self.resolution, self.sites, output)

    def set_step(self, step: int, micro: int = 0) -> None:
        """Select the random bits of `step`; `micro` counts micro-batches over all ranks."""
        self._manual = True
        self.clock.set(step, micro)

    @contextmanager
    def at(self, step: int, micro: int = 0) -> Iterator[None]:
        """Inside, forward passes are those of `step` and `micro`; the clock stays where it was."""
        before, manual = self.clock.tensor.tolist(), self._manual
        self.set_step(step, micro)
        try:
            yield
        finally:
            self.clock.set(*before)
            self._manual = manual

    def end_step(self) -> None:
        """Take this step's amaxes into the delayed scales: the maximum over all ranks.

        On a GPU the host waits here once, for all scales together; nothing else in a step does.
        """
        pairs = {n: pair for n, pair in histories(self.sites).items() if pair[0].seen is not None}
        self._rolled = None
        if not pairs:
            return
        amaxes = torch.stack([h.seen for h, _ in pairs.values() if h.seen is not None])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(amaxes, dist.ReduceOp.MAX)
        device, amaxes = amaxes.device, amaxes.cpu()
        tops = [q.format.largest for _, q in pairs.values()]
        self._rolled = list(pairs), amaxes, [h.scale for h, _ in pairs.values()], tops
        for (history, q), amax in zip(pairs.values(), amaxes, strict=True):
            history.roll(q, amax)
        if device.type != "cpu":
            copies = torch.stack([history.scale for history, _ in pairs.values()]).to(device)
            for (history, _), copy in zip(pairs.values(), copies, strict=True):
                history.copy = copy

    def stale(self) -> list[dict]:
        """How far each tensor had outgrown its delayed scale in the step that ended last.

        Rows: block, gemm, operand and stale, as in `counters`, but of every step. Empty where
        nothing is scaled with delay.
        """
        if self._rolled is None:
            return []
        names, amaxes, scales, tops = self._rolled
        ratios = (amaxes * torch.stack(scales) / torch.tensor(tops)).tolist()
        rows = []
        for name, ratio in zip(names, ratios, strict=True):
            gemm, _, operand = name.rpartition("/")
            place = {"block": self.sites[gemm].block, "gemm": gemm}
            rows.append({**place, "operand": operand.replace("_", "."), "stale": ratio})
        return rows

    def count(self, on: bool) -> None:
        """Whether the next eager forward and backward passes record counters."""
        self.clock.counting = on

    def counters(self) -> list[dict]:
        """Counters since the last call, one row per GEMM operand, and forget them.

        Rows: block, gemm, operand ("fprop.x"), format, n (elements), saturated, underflow,
        energy, underflow_energy, amax and, for delayed scaling, stale (amax over the amax of the
        scale used; above 1 the tensor outgrew it). Definitions: halfulp.numerics.statistics.
        """
        rows = []
        for site in self.sites.values():
            for operand in OPERANDS:
                if (sums := site.sums.pop(operand, None)) is not None:
                    rows.append(_row(site, operand, shares(sums)))
        return rows

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes in its own precision, as if it had not been quantized."""
        before, self.clock.enabled = self.clock.enabled, False
        try:
            yield
        finally:
            self.clock.enabled = before

    @contextmanager
    def off_in(self, blocks: Collection[str]) -> Iterator[None]:
        """Inside, the GEMMs, tables and norms of `blocks` compute as if never quantized."""
        muted = [site for site in self.sites.values() if site.block in blocks]
        own = {name for name, block in self.resolution.blocks.items() if block in blocks}
        tables = quantized_tables(self.model, own)
        for site in muted:
            site.enabled = False
        for module, _ in tables:
            vars(module)["halfulp_quantizer"] = None
        try:
            yield
        finally:
            for site in muted:
                site.enabled = True
            for module, quantizer in tables:
                vars(module)["halfulp_quantizer"] = quantizer

    def forget_seen(self) -> None:
        """Drop what the delayed scales have seen in this step: it did not happen."""
        for history, _ in histories(self.sites).values():
            history.seen = None

    def state_dict(self) -> dict[str, Tensor]:
        """The delayed-scale histories, fp32 [H] by "gemm/operand"."""
        return {
            name: history.amaxes.clone() for name, (history, _) in histories(self.sites).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put histories back. Raises PolicyError when they are not those of this policy."""
        mine = histories(self.sites)
        lengths = {name: history.amaxes.shape for name, (history, _) in mine.items()}
        saved = {name: amaxes.shape for name, amaxes in state.items()}
        if differing := sorted({name for name, _ in lengths.items() ^ saved.items()}):
            raise PolicyError(
                f"the saved delayed-scale histories do not fit this policy; differing: "
                f"{', '.join(differing[:4])} ({len(differing)} in all). Resume with the policy of "
                "the saved run."
            )
        for name, (history, q) in mine.items():
            history.restore(q, state[name])


def _row(site: Site, operand: str, values: dict[str, float]) -> dict:
    row = {
        "block": site.block,
        "gemm": site.name,
        "operand": operand.replace("_", "."),
        "format": str(site.quantizers[operand]),
        **values,
    }
    if (scale := site.scales.get(operand)) is not None:
        row["stale"] = values["amax"] * scale.item() / site.quantizers[operand].format.largest
    return row


def quantize(
    model: nn.Module,
    policy: Policy | str | Path,
    *,
    seed: int = 0,
    carrier: str = "fp32",
    hints: Mapping[str, str] | None = None,
    allow_partial: bool = False,
) -> Quantized:
    """Make `model` compute as `policy` says, in place; `unquantize` undoes it.

    * `policy`: a Policy, a recipe name, or the path of a policy.toml.
    * `seed` selects the random bits of stochastic rounding.
    * `carrier`: "fp32", or "exact" for the cheapest GEMM that computes the same (numerics.gemm).
    * `hints`: block types of parameters that halfulp does not know (halfulp.blocks).
    * `allow_partial`: run recipes of which the simulation or the optimizer leaves parts out.

    Parameters, their names and the state dict do not change. Raises PolicyError when the model is
    quantized already, when a rule matches nothing or when a GEMM is undecided. The first forward
    pass with gradients raises it for GEMMs that the model computes past the modules that round, the
    first one after a step for weights that the optimizer does not store as the recipe says.
    """
    if not isinstance(model, nn.Module):
        raise PolicyError(f"quantize takes a torch module; found {type(model).__name__}.")
    if getattr(model, "halfulp", None) is not None:
        raise PolicyError("this model is quantized already. Call halfulp.unquantize(model) first.")
    resolution = resolve(model, policy, hints=hints, allow_partial=allow_partial)
    handle = Quantized(model, seed, carrier, allow_partial)
    handle.switch(resolution)
    handle.follow()
    model.__dict__["halfulp"] = handle
    return handle


def resolve(
    model: nn.Module,
    policy: Policy | str | Path,
    *,
    hints: Mapping[str, str] | None = None,
    allow_partial: bool = False,
) -> Resolution:
    """Which recipe each GEMM and parameter of `model` gets; errors as in `quantize`."""
    resolution = as_policy(policy).resolve(block_map(model, hints))
    refuse_partial(resolution, allow_partial)
    for gemm, _, spec, _ in resolution.gemms:
        if gemm.role.startswith("attn") and not spec.is_identity:
            refuse_own_attention(model, model.get_submodule(gemm.module))
    return resolution


def as_policy(policy: Policy | str | Path) -> Policy:
    """The policy given as itself, by the name of a recipe, or as the path of a policy.toml."""
    if isinstance(policy, str) and not policy.endswith(".toml"):
        return Policy.from_recipe(policy)
    if isinstance(policy, str | Path):
        return Policy.load(Path(policy))
    if isinstance(policy, Policy):
        return policy
    raise PolicyError(
        f"a policy is a Policy, a recipe name or a path; found {type(policy).__name__}."
    )


def unquantize(model: nn.Module) -> None:
    """Undo `quantize`: classes and attention as they were; parameters keep their values.

    Raises PolicyError when the model is not quantized, or was sharded after it was quantized.
    """
    handle: Quantized | None = model.__dict__.get("halfulp")
    if handle is None:
        raise PolicyError(
            "this model is not quantized. Call halfulp.quantize(model, policy) first."
        )
    restore_classes(model)
    handle.leave()
    del model.__dict__["halfulp"]
