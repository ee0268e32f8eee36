import json
import re
from pathlib import Path

import pytest
import torch
from own_loops import Loop, act_early, batches, llama, loss_of, model_trained, noise, same
from torch import nn

import halfulp
from halfulp.errors import ConfigError, PolicyError, RunError, StoppedError
from halfulp.policy import Rule

HALF = halfulp.Budget(raised=0.5)  # the models have three units with a GEMM


@pytest.fixture(autouse=True)
def _early(monkeypatch):
    act_early(monkeypatch)


@pytest.mark.parametrize(
    ("policy", "accumulate", "summed"),
    [
        (None, 1, False),
        (None, 3, False),
        ("te_delayed", 1, False),
        ("te_delayed", 2, True),
        ("nvfp4_all", 2, False),
    ],
)
def test_a_healthy_loop_is_bit_identical_to_one_without_a_guard(policy, accumulate, summed):
    data = batches(28 * accumulate)  # counters are looked at in step 25
    plain, watched = (
        Loop(policy=policy, accumulate=accumulate, summed=summed, guarded=guarded).run(data)
        for guarded in (False, True)
    )
    assert same(plain.state(), watched.state())
    assert not watched.events
    assert all(watched.answers)


def test_a_bad_batch_is_withheld_and_the_run_is_that_of_a_loop_that_skipped_it():
    data = batches(36)
    watched = Loop(policy="nvfp4_all").run([*data[:30], noise(), *data[30:]])
    skipped = Loop(policy="nvfp4_all", guarded=False).run(data)
    assert watched.withheld == [31]
    (event,) = watched.events
    assert (event["trigger"], event["verdict"], event["action"]) == ("spike", "data", "skip")
    assert same(watched.state(), skipped.state())
    unguarded = Loop(policy="nvfp4_all", guarded=False).run([*data[:30], noise(), *data[30:]])
    assert not same(unguarded.state(), skipped.state())


def test_a_healthy_llama_too():
    plain, watched = (
        Loop(policy="te_delayed", make=llama, guarded=guarded).run(batches(4))
        for guarded in (False, True)
    )
    assert same(plain.state(), watched.state())


class Damage:
    """Multiplies the head's weights in one step, and keeps what the loop was at another."""

    def __init__(self, step: int, factor: float, keep: int) -> None:
        self.step, self.factor, self.keep = step, factor, keep
        self.kept: dict = {}
        self.rate = 0.0

    def __call__(self, loop: Loop, step: int) -> None:
        if step == self.keep + 1 and not self.kept:
            self.kept = loop.state()
            self.rate = loop.optimizer.param_groups[0]["lr"]
        if step == self.step:
            with torch.no_grad():
                loop.model.get_parameter("lm_head.weight").mul_(self.factor)


@pytest.mark.parametrize("factor", [8.0, float("nan")])
def test_a_damaged_weight_is_rolled_back_bit_by_bit(factor):
    damage = Damage(36, factor, keep=20)
    loop = Loop(before=damage, options={"snapshot_every": 5, "snapshots": 4})
    loop.run(batches(36))
    (event,) = loop.events
    assert event["verdict"] == "state or learning rate"
    assert event["action"] == "roll back"
    back = event["to"]
    assert 10 <= back < 35
    assert loop.withheld == [36]
    assert "the data goes on" in event["done"][-1]
    assert not loop.guard.rewound
    # The same loop stopped at the snapshot's step has the same weights, moments and rate.
    stopped = Loop().run(batches(36)[:back])
    assert same(loop.state(), stopped.state())
    rates = [x.optimizer.param_groups[0]["lr"] for x in (loop, stopped)]
    assert rates[0] == rates[1]
    assert loop.scheduler.last_epoch == back
    loop.run(batches(10, seed=3))
    assert loop.answers[-10:] == [True] * 10


class Loader:
    """Batches that can be taken again."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def __iter__(self):
        while self.at < len(self.data):
            self.at += 1
            yield self.data[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_loader_that_rewinds_gives_the_run_that_never_was_damaged():
    data, damage = batches(50), Damage(36, 8.0, keep=20)
    loader = Loader(data)
    loop = Loop(guarded=False)
    loop.guard = halfulp.Guard(
        loop.model, loop.optimizer, policy="te_delayed", also=[loop.scheduler, loader],
        log=loop.events.append, snapshot_every=5,
    )  # fmt: skip
    times = 0
    while loader.at < len(data):
        times += 1
        for batch in loader:
            damage(loop, len(loop.answers) + 1)
            loop.step([batch])
            if loop.guard.rewound:
                break
    assert times == 2
    (event,) = loop.events
    assert event["done"][-1] == "the loader is rewound"
    plain = Loop(policy="te_delayed", guarded=False).run(data)
    assert same(loop.state(), plain.state())


def test_a_stale_scale_raises_the_guilty_block_only():
    def outgrown(loop: Loop, step: int) -> None:
        history = loop.model.halfulp.sites["layers.1.ffn.down_proj"].histories.get("fprop_x")
        if step >= 20 and history is not None:
            history.scale = history.scale * 16

    loop = Loop(policy="te_delayed", before=outgrown, options={"budget": HALF}).run(batches(30))
    (event,) = loop.events
    assert (event["trigger"], event["verdict"]) == ("numeric", "precision")
    assert event["step"] == 24  # five looks
    raised = {block: recipe for block, recipe in loop.guard.map().items() if recipe != "te_delayed"}
    assert list(raised) == ["layers.1.ffn"]
    assert all(loop.answers)
    policy = loop.guard.policy()
    assert "layers.1.ffn" in policy.to_toml()


def test_a_gemm_that_breaks_is_raised_and_its_batch_is_done_again():
    def outgrown(loop: Loop, step: int) -> None:
        site = loop.model.halfulp.sites.get("layers.0.ffn.up_proj")
        history = site.histories.get("fprop_w") if site else None
        if step == 20 and history is not None:
            history.scale = history.scale * float("nan")

    options = {"budget": HALF}
    loop = Loop(policy="te_delayed", before=outgrown, options=options).run(batches(24))
    assert loop.events[0]["trigger"] == "nonfinite"
    assert loop.events[0]["verdict"] == "precision"
    assert loop.events[0]["action"] == "retry"
    assert loop.events[0]["units"] == ["layers.0.ffn"]
    assert all(loop.answers)  # nothing is lost: the step was made with the raised block
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def test_a_slowed_unit_has_a_lower_rate_during_the_step_only():
    loop = Loop().run(batches(3))
    (group,), before = loop.optimizer.param_groups, loop.state()
    rate = group["lr"]
    loop.guard._keeper.rates = {"head": [0.0, -1000]}  # the one group holds the head as well
    loss = loss_of(loop.model, batches(1, seed=9)[0])
    loss.backward()
    assert loop.guard.step(loss)
    loop.optimizer.step()
    assert group["lr"] == rate
    after = loop.state()
    names = [name for name, _ in loop.model.named_parameters()]
    assert all(torch.equal(before[name], after[name]) for name in names)
    loop.guard._keeper.rates = {}
    loop.optimizer.step()
    assert not torch.equal(before["lm_head.weight"], loop.model.get_parameter("lm_head.weight"))


def test_lost_updates_raise_what_the_optimizer_stores():
    model, events = model_trained(), []
    handle = halfulp.quantize(model, "bf16_weights")
    optimizer = halfulp.AdamW(halfulp.param_groups(model, handle.resolution), lr=1e-6)
    guard = halfulp.Guard(model, optimizer, log=events.append)
    for batch in batches(60):
        loss = loss_of(model, batch)
        loss.backward()
        assert guard.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    (event,) = events
    assert (event["trigger"], event["action"], event["step"]) == ("numeric", "raise", 51)
    assert all(name.startswith("lost_updates of ") for name in event["signals"])
    stored = {group["block"]: group["weight"] for group in optimizer.param_groups}
    assert stored == {"emb": "fp32", "layers.0.ffn": "fp32", "layers.1.ffn": "fp32", "head": "fp32"}


def test_a_model_of_ones_own_with_dropout_and_a_loss_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, hints = torch.randn(16, 8), {"0": "ffn", "2": "head"}

    def loss(output, args, kwargs):
        return (output - args[0].sum(1, keepdim=True)).square().mean()

    guard = halfulp.Guard(model, optimizer, loss=loss, hints=hints)
    value = loss(model(x), (x,), {})
    value.backward()
    drawn = torch.get_rng_state()
    assert guard.step(value)  # the rehearsal must draw the same mask again
    assert torch.equal(torch.get_rng_state(), drawn)


def test_autocast_is_that_of_the_loop():
    model = model_trained()
    optimizer = torch.optim.AdamW(model.parameters())
    guard = halfulp.Guard(model, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batches(1)[0])
    loss.backward()
    assert guard.step(loss)
    assert not any("last bits" in note for note in guard.notes)


def test_steps_that_a_loss_scaler_skips_are_no_incidents():
    model, events = model_trained(), []
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    guard = halfulp.Guard(model, optimizer, scaler=scaler, log=events.append)
    for i, batch in enumerate(batches(4)):
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        if i == 2:
            model.get_parameter("lm_head.weight").grad[0, 0] = float("inf")
        before = model.get_parameter("lm_head.weight").detach().clone()
        scaler.unscale_(optimizer)
        assert guard.step(loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.get_parameter("lm_head.weight")) == (i == 2)
    guard.state_dict()
    assert not events
    assert guard._host.done == 3


def test_a_saved_guard_goes_on_bit_by_bit_with_its_raised_block_and_its_snapshots(tmp_path):
    def outgrown(loop: Loop, step: int) -> None:
        history = loop.model.halfulp.sites["layers.1.ffn.down_proj"].histories.get("fprop_x")
        if 5 <= step <= 9 and history is not None:
            history.scale = history.scale * 16

    data = batches(30)
    whole = Loop(policy="te_delayed", before=outgrown, options={"snapshot_every": 4})
    whole.run(data[:15])
    torch.save(
        [x.state_dict() for x in (whole.model, whole.optimizer, whole.scheduler, whole.guard)],
        tmp_path / "all.pt",
    )
    whole.run(data[15:])
    other = Loop(policy="te_delayed", options={"snapshot_every": 4})
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    for part, state in zip(
        (other.model, other.optimizer, other.scheduler, other.guard), saved, strict=True
    ):
        part.load_state_dict(state)
    other.run(data[15:])
    assert other.guard.map() == whole.guard.map() != Loop(policy="te_delayed").guard.map()
    assert same(other.state(), whole.state())
    for a, b in zip(
        other.guard.state_dict()["ring"], whole.guard.state_dict()["ring"], strict=True
    ):
        assert a["step"] == b["step"]
        assert same(a["tensors"], b["tensors"])
    with pytest.raises(RunError, match="belongs to another policy"):
        Loop(policy="mxfp8").guard.load_state_dict(saved[-1])


def test_incidents_go_to_a_file(tmp_path):
    data = batches(26)
    Loop(options={"log": tmp_path / "guard.jsonl"}).run([*data, noise()])
    (line,) = (tmp_path / "guard.jsonl").read_text().splitlines()
    assert json.loads(line)["verdict"] == "data"


def test_it_stops_when_nothing_helps():
    budget = halfulp.Budget(rollbacks=1)
    loop = Loop(options={"budget": budget, "snapshot_every": 5}, before=Damage(30, 8.0, keep=20))
    loop.run(batches(29))
    with torch.no_grad():
        loop.model.get_parameter("lm_head.weight").fill_(float("nan"))
    loop.step(batches(1))
    assert loop.answers[-1] is False
    with torch.no_grad():
        loop.model.get_parameter("lm_head.weight").fill_(float("nan"))
    with pytest.raises(StoppedError, match="stopped the loop at step"):
        loop.step(batches(1))


class Fused(Loop):
    """As on a GPU: the device decides, and the host looks at it in the next step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        if self.guard is not None:
            self.guard.close()
            halfulp.unquantize(self.model) if self.policy else None
            options = {"log": self.events.append, **self.options}
            self.guard = halfulp.Guard(self.model, self.optimizer, policy=self.policy, **options)
            self.guard._in_flight = True


def test_the_device_withholds_a_bad_update_without_an_answer_from_the_host():
    data = batches(36)
    watched = Fused().run([*data[:30], noise(), *data[30:]])
    skipped = Fused(guarded=False).run(data)
    assert all(watched.answers)
    (event,) = watched.events
    assert (event["step"], event["verdict"], event["action"]) == (31, "data", "skip")
    assert same(watched.state(), skipped.state())


def test_what_the_device_has_withheld_is_rolled_back_one_step_later():
    damage = Damage(36, 8.0, keep=20)
    loop = Fused(before=damage, options={"snapshot_every": 5}).run(batches(37))
    (event,) = loop.events
    assert (event["step"], event["action"]) == (36, "roll back")
    assert loop.withheld == [37]
    assert same(loop.state(), Fused(guarded=False).run(batches(36)[: event["to"]]).state())


def test_what_only_the_host_can_see_is_rolled_back_one_step_later():
    damage = Damage(36, 2.0, keep=20)  # no spike, but a weight that has jumped
    loop = Fused(before=damage, options={"snapshot_every": 5}).run(batches(37))
    (event,) = loop.events
    assert (event["trigger"], event["action"]) == ("weight", "roll back")
    assert event["units"] == ["head"]
    assert loop.withheld == [37]
    assert same(loop.state(), Fused(guarded=False).run(batches(36)[: event["to"]]).state())


def test_a_block_is_raised_for_the_step_after_the_one_that_the_device_has_withheld():
    def outgrown(loop: Loop, step: int) -> None:
        site = loop.model.halfulp.sites.get("layers.0.ffn.up_proj")
        history = site.histories.get("fprop_w") if site else None
        if step == 20 and history is not None:
            history.scale = history.scale * float("nan")

    options = {"budget": HALF}
    loop = Fused(policy="te_delayed", before=outgrown, options=options).run(batches(24))
    (event,) = loop.events
    assert (event["step"], event["verdict"], event["action"]) == (20, "precision", "retry")
    assert "is not repeated" in event["done"][-1]
    assert all(loop.answers)
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def one_step(loop: Loop, loss: object) -> None:
    for batch in batches(2):
        (loss_of(loop.model, batch) / 2).backward()
    loop.guard.step(loss)


def test_what_cannot_be_repeated_is_told_in_the_first_step():
    loop = Loop()
    last = loss_of(loop.model, batches(2)[-1]).detach()
    loop.guard._host.recorder.take()
    with pytest.raises(ConfigError, match="mean loss of the micro-batches"):
        one_step(loop, last)
    loop = Loop()
    loss = loss_of(loop.model, batches(1)[0])
    loss.backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.01)
    with pytest.raises(ConfigError, match="before gradients are clipped"):
        loop.guard.step(loss)
    model = nn.Sequential(nn.Linear(4, 4))
    guard = halfulp.Guard(model, torch.optim.SGD(model.parameters()), hints={"0": "ffn"})
    value = model(torch.ones(2, 4)).sum()
    value.backward()
    with pytest.raises(ConfigError, match="no loss, so the guard cannot do a step again"):
        guard.step(value)
    value = model(torch.ones(2, 4)).sum()
    with pytest.raises(ConfigError, match=r"guard.step\(loss\)"):
        guard.step()


def test_wrong_arguments_are_told():
    model = model_trained()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = halfulp.Policy((Rule("layers.*", halfulp.load_recipe("mxfp8")),))
    with pytest.raises(PolicyError, match="no rule decides"):
        halfulp.Guard(model, optimizer, policy=layers)
    with pytest.raises(ConfigError, match="cannot rewind"):
        halfulp.Guard(model, optimizer, also=[torch.utils.data.DataLoader([1])])
    with pytest.raises(ConfigError, match="cannot be put back"):
        halfulp.Guard(model, optimizer, also=[object()])
    with pytest.raises(ConfigError, match=r"budget.rollbacks = 0"):
        halfulp.Guard(model, optimizer, budget=halfulp.Budget(rollbacks=0))
    with pytest.raises(ConfigError, match=r"budget.wasted = 0"):
        halfulp.Guard(model, optimizer, budget=halfulp.Budget(wasted=0.0))
    with pytest.raises(ConfigError, match=r"guard\.attach"):
        halfulp.Guard(model).step(1.0)
    guard = halfulp.Guard(model, optimizer)
    with pytest.raises(ConfigError, match="no forward pass"):
        guard.step(1.0)
    with pytest.raises(ConfigError, match="an optimizer already"):
        guard.attach(optimizer)


def test_a_model_that_is_quantized_keeps_its_policy():
    model = model_trained()
    halfulp.quantize(model, "mxfp8")
    optimizer = torch.optim.AdamW(model.parameters())
    assert set(halfulp.Guard(model, optimizer).map().values()) == {"mxfp8"}
    halfulp.Guard(model, optimizer, policy="mxfp8")
    with pytest.raises(PolicyError, match="quantized already, by another policy"):
        halfulp.Guard(model, optimizer, policy="nvfp4_all")


def test_the_example_in_the_docs_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "guard_own_loop.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    exec(compile(example, page.name, "exec"), {})
    assert 'recipe = "te_delayed"' in capsys.readouterr().out
