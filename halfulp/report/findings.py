"""Plain sentences with their numbers: what the runs show, and what they do not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halfulp.guard.attribute import HARDWARE
from halfulp.guard.attribute import UNKNOWN as CANNOT_TELL
from halfulp.report import guard_words as say
from halfulp.report import words
from halfulp.report.counters import COUNTERS, Counter, level, overall
from halfulp.report.price import FAIL, PASS, UNKNOWN, Price, price_all, progress
from halfulp.report.read import Record, read_runs

BAR_NATS = 0.01

_SEED = "One seed and one data order: the ± does not contain what another seed would change."
_ACTED = "A run that its guard has helped says what recipe and guard can do together."
_SEEN = "Counters see what was rounded away, not whether the loss minds."


@dataclass(frozen=True)
class Finding:
    """A sentence with its verdict and the numbers it stands on.

    `run` is the label of the run, empty for the overall verdict, which comes first. `topic` is
    "overall", "price", "guard", "scale", "loss_scale", "counters" or the name of one counter.
    `caveat` says what the sentence does not tell.
    """

    verdict: str
    sentence: str
    run: str
    topic: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    caveat: str = ""


def findings(runs: Sequence[str | Path], *, bar_nats: float = BAR_NATS) -> list[Finding]:
    """The overall verdict, then per run its price and its counters.

    A run passes if its held-out loss is less than `bar_nats` above that of the fp32 run with the
    same configuration and data, by more than the uncertainty; RunError for paths that are no runs.
    """
    prices = price_all(read_runs(runs), bar_nats)
    return judge_all(prices, bar_nats)


def judge_all(prices: Sequence[Price], bar_nats: float) -> list[Finding]:
    """The findings about runs that are already read and priced."""
    found = [_overall(prices, bar_nats)]
    for price in prices:
        found += [] if _is_settled(price) else [_price(price, bar_nats)]
        found += _guard(price.run)
        found += _counters(price.run)
    return found


def _is_settled(price: Price) -> bool:
    """An fp32 run that finished costs nothing: the sentence would be empty."""
    record = price.run
    return record.recipe == "fp32" and record.state == "finished" and not record.diverged


def _overall(prices: Sequence[Price], bar_nats: float) -> Finding:
    judged = [p for p in prices if p.reference is not None or p.run.diverged]
    if not judged:
        return Finding(UNKNOWN, _alone(prices), "", "overall", caveat=_SEED)
    verdicts = [p.verdict for p in judged]
    verdict = FAIL if FAIL in verdicts else (UNKNOWN if UNKNOWN in verdicts else PASS)
    text = " ".join(filter(None, (_tally(judged, bar_nats), _worst(judged), _stand_in(judged))))
    counts = {name: float(verdicts.count(name)) for name in (PASS, FAIL, UNKNOWN)}
    return Finding(verdict, text, "", "overall", {**counts, "bar_nats": bar_nats}, _SEED)


def _alone(prices: Sequence[Price]) -> str:
    record = prices[0].run
    if len(prices) > 1:
        return f"All {words.count(len(prices))} runs are fp32 references: nothing to compare."
    if record.state == "empty":
        return f"{record.label} recorded no step."
    held_out = record.held_out.finite().values
    loss = f" at {held_out[-1]:.3f} nats on held-out text" if len(held_out) else ""
    done = "finished" if record.state == "finished" else f"is not finished: {progress(record)}"
    price = "nothing is compared" if record.recipe == "fp32" else "its price is unknown"
    return f"{record.label} {done}{loss}; without a run to compare, {price}."


def _tally(judged: Sequence[Price], bar_nats: float) -> str:
    good = [p for p in judged if p.verdict == PASS]
    names = {p.reference.label for p in judged if p.reference}
    reference = next(iter(names)) if len(names) == 1 else "their reference"
    if not names:
        return ""
    bar = f"within {bar_nats:g} nats of {reference}"
    if len(judged) == 1:
        only = judged[0]
        told = {PASS: f"trains {bar}", UNKNOWN: f"cannot be told to train {bar}"}
        return f"{only.run.label} {told[only.verdict]}." if only.verdict in told else ""
    if len(good) == len(judged):
        return f"All {words.count(len(good))} recipes train {bar}."
    if not good:
        return f"No recipe is shown to train {bar}."
    verb = "trains" if len(good) == 1 else "train"
    some = words.sentence(words.count(len(good)))
    return f"{some} of {words.count(len(judged))} recipes {verb} {bar}."


def _stand_in(judged: Sequence[Price]) -> str:
    names = {p.reference.label for p in judged if p.reference and p.reference.recipe != "fp32"}
    return f"No run is fp32: what {names.pop()} itself costs is unknown." if names else ""


def _worst(judged: Sequence[Price]) -> str:
    stopped = [p.run.label for p in judged if p.run.stopped]
    broken = [p.run.label for p in judged if p.run.diverged and not p.run.stopped]
    failed = [p for p in judged if p.verdict == FAIL and math.isfinite(p.nats)]
    failed = [p for p in failed if not p.run.diverged]
    parts = []
    if failed:
        worst = max(failed, key=lambda p: p.nats)
        most = " most:" if len(failed) > 1 else ""
        parts.append(f"{worst.run.label} costs{most} {words.nats(worst.nats)} nats.")
    if broken:
        parts.append(f"{words.listing(broken, most=3)} broke down.")
    if stopped:
        verb = "was stopped by its guard" if len(stopped) == 1 else "were stopped by their guards"
        parts.append(f"{words.listing(stopped, most=3)} {verb}.")
    return " ".join(parts)


def _price(price: Price, bar_nats: float) -> Finding:
    record, reference = price.run, price.reference
    if record.diverged:
        return Finding(FAIL, _broken(record), record.label, "price", _broken_evidence(record))
    if reference is None or not math.isfinite(price.nats):
        loss = record.held_out.finite().values
        seen = f" Its held-out loss is {loss[-1]:.3f} nats." if len(loss) else ""
        told = f"has no price: {price.why}"
        text = f"{record.label} {told}.{seen}"
        return Finding(UNKNOWN, text, record.label, "price", _evidence(price))
    side = "above" if price.nats >= 0 else "below"
    interval = f"{' ± '.join(words.interval(price.nats, price.half_width))} nats {side}"
    text = f"{record.label}: held-out loss is {interval} {reference.label}"
    if price.verdict == PASS:
        most = words.most(price.nats, price.half_width)
        text += f"; a price above {most} nats is unlikely."
    elif price.verdict == FAIL:
        text += f" ({words.perplexity(price.nats)})."
        if price.caught_up:
            text += f" {reference.label} was there at step {price.caught_up:,}."
    else:
        reason = price.why or f"the ± reaches across the bar of {bar_nats:g} nats"
        text += f", but {reason}."
    return Finding(price.verdict, text, record.label, "price", _evidence(price), _SEED)


def _evidence(price: Price) -> dict[str, float | str]:
    evidence: dict[str, float | str] = {
        "nats": price.nats,
        "nats_fp32": price.nats_fp32,
        "half_width": price.half_width,
        "paired_steps": float(price.scatter.count),
        "effective_steps": price.scatter.effective,
        "step": float(price.step),
    }
    return {"reference": price.reference.label, **evidence} if price.reference else evidence


def _broken(record: Record) -> str:
    event = record.nonfinite
    if record.stopped is not None:
        incident = record.stopped.incident
        return (
            f"{record.label} was stopped by its guard at step {record.broke_at:,}: "
            f"{say.done(incident)}. It saw {say.seen(incident)}; its verdict: "
            f"{say.judged(incident)}."
        )
    if not event:
        return f"{record.label} diverged: its loss ended no better than it began, or not finite."
    block = f" in {event['block']}" if event.get("block") else ""
    what = f"the {event['what']}" if event.get("what") else "a number"
    losses = record.loss.finite().values
    last = f" The last finite training loss was {losses[-1]:.3f} nats." if len(losses) else ""
    start = f"{record.label} broke down at step {record.broke_at:,}"
    return f"{start}: {what} was not finite{block}.{last}"


def _broken_evidence(record: Record) -> dict[str, float | str]:
    event = record.nonfinite
    named = {name: str(event.get(name) or "") for name in ("block", "what")}
    return {"step": float(record.broke_at), **named}


def _guard(record: Record) -> list[Finding]:
    """What the guard did: a fail where the recipe did not hold, open where a part of it did not."""
    stories = record.stories
    if not stories:
        return []
    raised, fallback = say.raised_at_the_end(stories), say.fell_back(stories)
    text = f"{record.label}: the guard {say.acted(stories)}"
    text += f"; it cost {words.share(record.cost_share)} of the run." if record.cost.steps else "."
    if fallback:
        text += f" The whole model fell back to {fallback}."
    elif raised:
        text += f" Raised at the end: {words.listing(list(raised), most=4)}."
    verdicts = {str(story.incident["verdict"]) for story in stories}
    failed = fallback or record.stopped or HARDWARE in verdicts
    verdict = FAIL if failed else UNKNOWN if raised or CANNOT_TELL in verdicts else PASS
    evidence: dict[str, float | str] = {
        "incidents": float(len(stories)),
        "withheld": record.cost.withheld,
        "replayed": record.cost.replayed,
        "passes": record.cost.passes,
        "share": record.cost_share,
        "raised": float(len(raised)),
    }
    return [Finding(verdict, text, record.label, "guard", evidence, _ACTED)]


def _counters(record: Record) -> list[Finding]:
    if record.state == "empty":
        return []
    found = [*_skipped(record), *_stale(record)]
    if not record.counters:
        text = f"{record.label}: no counters were recorded, so lost bits could not be seen."
        unseen = Finding(UNKNOWN, text, record.label, "counters")
        return found if record.recipe == "fp32" else [*found, unseen]
    quiet = []
    for counter in COUNTERS:
        if counter.key in record.counters:
            worst = overall(record.counters[counter.key])
            finding = _counter(record, counter)
            if finding.verdict != PASS:
                found.append(finding)
            elif counter.key != "v_underflow":
                quiet.append(f"{counter.title.lower()} {words.share(worst.share)}")
    if quiet and not found and record.recipe != "fp32":
        text = f"{record.label}: counters are quiet ({', '.join(quiet)})."
        found.append(Finding(PASS, text, record.label, "counters", caveat=_SEEN))
    return found


def _counter(record: Record, counter: Counter) -> Finding:
    worst = overall(record.counters[counter.key])
    share, top = words.share(worst.share), words.share(worst.site_share)
    of = words.operand(worst.operand)
    form = worst.site.format or "low-precision"
    what = {
        "lost_updates": f"of the updates asked of the {form} weights were lost",
        "underflow": f"of the nonzero {of} underflowed to zero in {form}",
        "saturation": f"of the {of} saturated in {form}",
        "v_underflow": "of the second moments are zero where the gradient is not",
    }[counter.key]
    where = f"worst: {worst.place}, {top}"
    verdict = level(counter, worst.share, form)
    if verdict == PASS:
        # A single bad tensor is raised, however quiet the average is.
        verdict = UNKNOWN if level(counter, worst.site_share, form) == FAIL else PASS
    evidence: dict[str, float | str] = {
        "share": worst.share,
        "worst_share": worst.site_share,
        "worst": worst.place,
        "operand": worst.operand,
        "steps_counted": float(worst.steps),
        "tensors": float(worst.sites),
    }
    energy = record.peaks["underflow_energy"].get(worst.site)
    if counter.key == "underflow" and energy is not None:
        evidence["underflow_energy"] = energy
        verdict = FAIL if energy >= 1e-3 and verdict != PASS else verdict
        where += f", with {words.share(energy)} of its energy"
    text = f"{record.label}: {share} {what} ({where})."
    return Finding(verdict, text, record.label, counter.key, evidence, _SEEN)


def _skipped(record: Record) -> list[Finding]:
    """Steps that moved nothing because the scaled loss overflowed."""
    if not record.skipped_steps:
        return []
    share = record.skipped_steps / max(record.last_step, 1)
    text = (
        f"{record.label}: {record.skipped_steps:,} of {record.last_step:,} steps were skipped "
        "because the scaled loss overflowed."
    )
    verdict = FAIL if share >= 0.1 else PASS
    evidence = {"skipped": float(record.skipped_steps), "share": share}
    return [Finding(verdict, text, record.label, "loss_scale", evidence)]


def _stale(record: Record) -> list[Finding]:
    """Delayed scales that were chosen for a smaller tensor."""
    peaks = record.peaks["stale"]
    site = max(peaks, key=lambda s: peaks[s], default=None)
    if site is None or peaks[site] <= 1.0:
        return []
    ratio = peaks[site]
    text = (
        f"{record.label}: a delayed scale was up to {ratio:.2g} times too small "
        f"({site.name}, {words.operand(site.operand)}): what lies above it saturates."
    )
    evidence: dict[str, float | str] = {"stale": ratio, "worst": site.name, "operand": site.operand}
    return [Finding(FAIL if ratio > 2 else UNKNOWN, text, record.label, "scale", evidence, _SEEN)]
