"""Which run comes next: the one that says most about windows and failures."""

import statistics
from collections.abc import Collection, Iterable

from halfulp.sweep.design import Cell, Design
from halfulp.sweep.result import Result


def next_cell(design: Design, results: Iterable[Result], taken: Collection[str]) -> Cell | None:
    """The most informative cell that is neither done nor `taken`; None when there is none.

    First the grid of the first seed, from its middle outwards in ever smaller gaps, so that every
    recipe has a coarse curve early. Then seed by seed, rates near each recipe's best one first: the
    gap and the edges of the window lie there. Last come rates at which every run so far has failed.
    Cells of a recipe that was refused are not run.
    """
    found = list(results)
    never = {cell.id for cell in left_out(design, found)}
    open_ = [cell for cell in design.cells() if cell.id not in taken and cell.id not in never]
    if not open_:
        return None
    spread = {design.lrs[i]: rank for rank, i in enumerate(spread_order(len(design.lrs)))}
    best = _best_rates(found)
    failed = _failed(found)

    def rank(cell: Cell) -> tuple[bool, int, int, int]:
        first = cell.seed == design.seeds[0]
        near = best.get((cell.recipe, cell.data))
        far = spread[cell.lr] if first or near is None else _steps(design, cell.lr, near)
        hopeless = not first and (cell.recipe, cell.data, cell.lr) in failed
        return hopeless, design.seeds.index(cell.seed), far, spread[cell.lr]

    return min(open_, key=rank)  # of equals the first: the reference


def left_out(design: Design, results: Iterable[Result]) -> list[Cell]:
    """The cells that are not run because another run of their recipe was refused."""
    found = list(results)
    refused, done = (
        {(r.recipe, r.data) for r in found if r.status == "refused"},
        {r.id for r in found},
    )
    return [c for c in design.cells() if (c.recipe, c.data) in refused and c.id not in done]


def spread_order(n: int) -> list[int]:
    """0 … n-1, the middle first, then always the middle of the widest gap."""
    order: list[int] = []
    gaps = [(0, n)]
    while gaps:
        low, high = max(gaps, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        gaps.remove((low, high))
        middle = (low + high) // 2
        order.append(middle)
        gaps += [gap for gap in ((low, middle), (middle + 1, high)) if gap[0] < gap[1]]
    return order


def seconds_of(results: Iterable[Result], recipe: str) -> float:
    """How long a run of `recipe` is likely to take; of any recipe until one is done; 0 at first."""
    done = [r for r in results if r.status == "finished"]
    same = [r.wall_seconds for r in done if r.recipe == recipe]
    return statistics.median(same or [r.wall_seconds for r in done] or [0.0])


def _steps(design: Design, lr: float, best: float) -> int:
    return abs(design.lrs.index(lr) - design.lrs.index(best))


def _best_rates(results: list[Result]) -> dict[tuple[str, str], float]:
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for r in results:
        if r.status == "finished" and r.loss_nats == r.loss_nats:
            key = r.recipe, r.data
            best[key] = min(best.get(key, (r.loss_nats, r.lr)), (r.loss_nats, r.lr))
    return {key: lr for key, (_, lr) in best.items()}


def _failed(results: list[Result]) -> set[tuple[str, str, float]]:
    """Rates at which no run has learned anything: not finished, or no better than at its start."""
    bad, good = set(), set()
    for r in results:
        key = r.recipe, r.data, r.lr
        learned = r.status == "finished" and not r.loss_nats >= r.unigram_nats
        (good if learned else bad).add(key)
    return bad - good
