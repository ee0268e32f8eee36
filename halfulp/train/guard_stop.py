"""What a run that the guard has stopped says: why, and the command that goes on."""

import shlex

from halfulp.guard.attribute import HARDWARE
from halfulp.guard.incident import Incident
from halfulp.guard.ladder import FALLBACK
from halfulp.train.checkpoint import path_of, steps_in
from halfulp.train.session import Session


def stopped(s: Session, incident: Incident) -> str:
    """Why the run was stopped, and the command that goes on."""
    trigger, verdict = incident.trigger, incident.verdict
    units = f" in {', '.join(verdict.units[:4])}" if verdict.units else ""
    return (
        f"the guard stopped the run at step {trigger.step}: {incident.done[-1]}. It saw {trigger}; "
        f"its verdict is {verdict.kind}{units}. Nothing of that step was updated or saved. What "
        f"happened: halfulp guard explain {shlex.quote(str(s.run.path))}. {_cure(s, incident)}"
    )


def _cure(s: Session, incident: Incident) -> str:
    resume = shlex.join(["halfulp", "train", "--resume", str(s.run.path)])
    over = incident.exceeded
    if over is not None and over.enough is not None:
        return f"To go on with a larger budget: {resume} --set guard.{over.budget}={over.enough:g}"
    if incident.verdict.kind == HARDWARE:
        return f"To go on from the last checkpoint, on another machine: {resume}"
    folder = s.run.path / "checkpoints"
    earlier = [step for step in steps_in(folder) if step != s.saved]
    again = f"To go on from an earlier checkpoint: {resume} --from-step {max(earlier, default=0)}"
    return (
        f"It would meet the same again. To start anew from the last good weights, with a lower "
        f"learning rate and in {FALLBACK}: {_anew(s)}. {again}"
    )


def _anew(s: Session) -> str:
    """The command of a run from the last checkpoint's weights that is less likely to fail."""
    path, config = s.run.path, s.config
    words = ["halfulp", "train", str(path / "config.toml"), "--recipe", FALLBACK]
    words += ["--lr", f"{config.train.lr / 2:g}", "--out", f"{path}-anew"]
    if s.saved:
        words += ["--model", str(path_of(path / "checkpoints", s.saved))]
        words += [w for key in ("layers", "hidden") for w in ("--set", f"model.{key}=0")]
    if config.policy.schedule:
        words += ["--set", "policy.schedule=[]"]
    return shlex.join(words)
