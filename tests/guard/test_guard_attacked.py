"""Loops that are unusual and healthy, and loops that are wrong."""

import math
import random

import pytest
import torch
from own_loops import Loop, act_early, batches, llama, loss_of, model_trained, same
from torch import nn

import halfulp
from halfulp.errors import ConfigError
from halfulp.guard.detect import Detector
from halfulp.guard.numeric import YOUNG


def test_a_matrix_that_begins_at_zero_does_not_jump_when_it_begins_to_learn():
    detector = Detector()
    for _ in range(100):
        detector.accept(2.0, 1.0, {}, {"adapter": 0.0, "w": 3.0})
    for norm in (0.01, 0.02, 0.03):
        assert detector.jump(101, {"adapter": norm, "w": 3.0}) is None
        detector.accept(2.0, 1.0, {}, {"adapter": norm, "w": 3.0})
    # That it came from zero does not blind the guard to what follows.
    for norm in (1.0, math.nan):
        found = detector.jump(104, {"adapter": norm, "w": 3.0})
        assert found is not None
        assert found[1] == "adapter"


@pytest.mark.parametrize(("noise", "diverges"), [(0.02, True), (0.5, False)])
def test_where_a_phase_has_begun_a_divergence_is_measured_in_the_noise_before(noise, diverges):
    # In small batches the best of noisy means lies half a nat below what is usual.
    detector, chance, kinds = Detector(), random.Random(0), []
    for step in range(100):
        detector.accept(2 + 3 * 0.8**step + noise * chance.gauss(0, 1), 1.0, {})
    detector.begin_phase()
    # The descent of the first steps, a quarter of them, may make it half as large again.
    assert noise / 2 < detector.noise < noise * 2
    detector.best_short = 1.6
    for step in range(101, 160):
        loss = 2.4 + noise * chance.gauss(0, 1)
        found = detector.judge(step, loss, 1.0)
        kinds += [found.kind] if found else []
        detector.accept(loss, 1.0, {})
    assert ("divergence" in kinds) == diverges
    assert detector.state()["noise"] == detector.noise


def test_scales_that_grow_from_zero_in_the_first_steps_are_no_incident(monkeypatch):
    # A slow warm-up from zero weights: each amax is over 1.5 times that of the step before, for
    # more than the five steps of the rule `stale`.
    def zeroed() -> nn.Module:
        model = llama()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "down_proj" in name or "o_proj" in name:
                    p.zero_()
        return model

    def warm(loop: Loop, step: int) -> None:
        for group in loop.optimizer.param_groups:
            group["lr"] = 1e-3 * (step / 20) ** 3

    data = batches(YOUNG - 1)
    loop = Loop(policy="te_delayed", make=zeroed, before=warm).run(data)
    assert not loop.events
    monkeypatch.setattr("halfulp.guard.loop.YOUNG", 0)
    assert Loop(policy="te_delayed", make=zeroed, before=warm).run(data).events


@pytest.mark.parametrize("loss", ["2.0", torch.ones(2), [2.0]])
def test_what_is_no_loss_of_a_step_is_refused(loss):
    model = model_trained()
    guard = halfulp.Guard(model, torch.optim.SGD(model.parameters()))
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(ConfigError, match="one number"):
        guard.step(loss)


def test_a_forward_pass_that_an_exception_left_is_not_part_of_the_step(monkeypatch):
    model = model_trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = halfulp.Guard(model, optimizer)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    for batch in batches(3):
        hook = last.register_forward_pre_hook(full)
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model, batch)
        hook.remove()
        loss_of(model, batch).backward()
        assert guard.step()
        optimizer.step()
        optimizer.zero_grad()
    assert not guard.incidents


def test_a_loop_whose_rate_is_zero_at_first_and_its_matrix_too(monkeypatch):
    act_early(monkeypatch)

    def freed(loop: Loop, step: int) -> None:
        for group in loop.optimizer.param_groups:
            group["lr"] = 1e-3 if step > 26 else 0.0
        if step == 1:
            with torch.no_grad():
                next(p for p in loop.model.parameters() if p.ndim >= 2).zero_()

    assert not Loop(before=freed).run(batches(32)).events


def test_a_step_that_the_loop_gives_up_is_forgotten():
    given_up, plain = Loop(policy="te_delayed"), Loop(policy="te_delayed")
    text = batches(4)
    for batch in text[:2]:
        given_up.step([batch])
        plain.step([batch])
    loss_of(given_up.model, text[2])
    given_up.guard.forget()
    given_up.step([text[3]])
    plain.step([text[3]])
    assert same(given_up.state(), plain.state())


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ConfigError, match="no parameter of the guarded model"):
        halfulp.Guard(llama(), torch.optim.SGD(llama().parameters(), lr=0.1))
