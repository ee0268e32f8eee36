"""Choose one option per group: fewest bits in all under a budget of prices (a knapsack).

Greedy on gain per bit along each group's lower convex hull, then moves of one or two groups at a
time until none saves bits (round-off spec 3.3). Where the groups are few, the moves alone compete.
Exact search is exponential; the tests compare with it.
"""

import math

import numpy as np

_ROUNDS = 1000
_FEW = 2000


def allocate(bits: np.ndarray, prices: np.ndarray, budget: float) -> np.ndarray:
    """The option of each group, int [groups], with few bits and Σ price <= `budget`.

    `bits`, `prices` fp64 [groups, options]; an option whose price is inf or NaN is never chosen,
    every group needs one that is finite. When even the cheapest prices exceed the budget, these are
    the answer.
    """
    prices = np.where(np.isnan(prices), math.inf, prices)
    bits = np.where(np.isfinite(prices), bits, math.inf)
    rows = np.arange(len(prices))
    # The lowest price; of equal ones the fewest bits.
    chosen = np.lexsort((bits, prices), axis=1)[:, 0]
    slack = budget - prices[rows, chosen].sum()
    if slack < 0 or not len(prices):
        return chosen
    starts = [_greedy(bits, prices, chosen, slack)]
    if bits.size <= _FEW:
        starts.append((chosen, slack))
    ends = [_improve(bits, prices, start.copy(), left) for start, left in starts]
    return min(ends, key=lambda end: bits[rows, end].sum())


def _greedy(
    bits: np.ndarray, prices: np.ndarray, chosen: np.ndarray, slack: float
) -> tuple[np.ndarray, float]:
    steps = [
        (slope, group, option)
        for group in range(len(bits))
        for slope, option in _hull(bits[group], prices[group], int(chosen[group]))
    ]
    chosen, stuck = chosen.copy(), set()
    for _, group, option in sorted(steps):
        cost = prices[group, option] - prices[group, chosen[group]]
        if group in stuck:
            continue
        if cost > slack:
            stuck.add(group)
            continue
        chosen[group], slack = option, slack - cost
    return chosen, slack


def _hull(bits: np.ndarray, prices: np.ndarray, start: int) -> list[tuple[float, int]]:
    """(price per bit saved, option) from `start` down to the fewest bits, by rising price."""
    path = []
    while True:
        saved = bits[start] - bits
        better = np.flatnonzero((saved > 0) & np.isfinite(prices))
        if not len(better):
            return path
        slopes = (prices[better] - prices[start]) / saved[better]
        steepest = better[np.flatnonzero(slopes == slopes.min())]
        start = int(steepest[np.argmin(bits[steepest])])
        path.append((float(slopes.min()), start))


def _improve(bits: np.ndarray, prices: np.ndarray, chosen: np.ndarray, slack: float) -> np.ndarray:
    """Change one or two groups at a time while that saves bits within the slack."""
    rows, (groups, options) = np.arange(len(bits)), bits.shape
    group, option = np.divmod(np.arange(groups * options), options)
    usable = np.isfinite(prices).ravel()
    for _ in range(_ROUNDS):
        now = prices[rows, chosen], bits[rows, chosen]
        moves = np.flatnonzero(usable & (option != chosen[group]))
        cost = prices.ravel()[moves] - now[0][group[moves]]
        saved = now[1][group[moves]] - bits.ravel()[moves]
        best = _best_moves(cost, saved, group[moves], slack)
        if not best:
            break
        for move in best:
            chosen[group[moves[move]]] = option[moves[move]]
            slack -= cost[move]
    return chosen


def _best_moves(
    cost: np.ndarray, saved: np.ndarray, group: np.ndarray, slack: float
) -> tuple[int, ...]:
    """The move or the pair of moves of different groups that saves most bits; () for none."""
    order = np.argsort(cost, kind="stable")
    cost, saved, group = cost[order], saved[order], group[order]
    first, second = _running_best(saved, group)
    ends = np.searchsorted(cost, slack - cost, side="right") - 1
    gain, best = 1e-9, ()
    alone = np.flatnonzero(cost <= slack)
    if len(alone) and saved[alone].max() > gain:
        move = alone[np.argmax(saved[alone])]
        gain, best = saved[move], (int(order[move]),)
    there = np.flatnonzero(ends >= 0)
    partner = first[ends[there]]
    partner = np.where(group[partner] == group[there], second[ends[there]], partner)
    pairs = np.where(partner >= 0, saved[there] + saved[partner], -math.inf)
    if len(pairs) and pairs.max() > gain * (1 + 1e-9):
        i = int(np.argmax(pairs))
        best = (int(order[there[i]]), int(order[partner[i]]))
    return best


def _running_best(saved: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Up to each move: the one that saves most, and the best one of any other group (-1: none)."""
    first, second = np.full(len(saved), -1), np.full(len(saved), -1)
    a = b = -1
    for i in range(len(saved)):
        if a < 0 or saved[i] > saved[a]:
            if a >= 0 and group[a] != group[i]:
                b = a
            a = i
        elif group[i] != group[a] and (b < 0 or saved[i] > saved[b]):
            b = i
        first[i], second[i] = a, b
    return first, second
