"""Why a site costs what it costs, in one line of words and numbers."""

from halfulp.check.prices import Prices
from halfulp.check.survey import Seen
from halfulp.formats import format_quantizer

_WHAT = {
    "weight": "every token passes through this weight",
    "emb": "the table speaks to every layer",
    "residual": "all later layers read this stream",
    "norm": "a whole row shares this factor or output",
    "q": "errors enter every score of the row",
    "k": "every later query reads this key",
    "v": "every later query mixes this value",
    "qkv": "errors enter scores and values",
    "scores": "the exponential multiplies absolute errors of scores",
    "probs": "errors of one row add up in its mean",
    "attn_out": "feeds the output projection",
    "act": "feeds the down projection",
    "mlp": "inside the MLP",
    "logits": "errors go straight into the next-token choice",
}
_FLUSH, _SHRINK = 0.01, 0.02


def reason(prices: Prices, row: int, word: str, seen: Seen | None) -> str:
    """One line about site `row` of `prices` in format `word`; `seen` is its entry of the survey."""
    site, j = prices.sites[row], prices.formats.index(word)
    said = [_WHAT.get(site.kind, f"output of {site.op}")]
    if site.kind == "norm" and site.op == "parameter":
        said = ["scales or shifts a channel of every token"]
    flushed, shrinkage = prices.flushed[row, j].item(), prices.shrinkage[row, j].item()
    saturated = prices.saturated[row, j].item()
    if saturated > 0:
        said.append(f"{saturated:.2%} beyond the largest value of {word}")
    if flushed > _FLUSH:
        said.append(f"{flushed:.0%} of it becomes 0 in {word}")
    if abs(shrinkage) > _SHRINK:
        said.append(f"{word} scales it by {1 + shrinkage:.3f}")
    if len(said) == 1 and seen is not None and seen.finite and seen.amax > 0:
        u = format_quantizer(word).format.unit_roundoff
        said.append(f"reaches {seen.amax:.3g}, rounded by up to {seen.amax * u:.2g} there")
    return "; ".join(said)
