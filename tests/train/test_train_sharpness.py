from pathlib import Path

import pytest
import torch
from processes import train_together, watch_together, watched_model
from safetensors.torch import load_file

from halfulp.errors import CheckError, ConfigError
from halfulp.run import Run
from halfulp.sharpness.critical import adam_direction
from halfulp.sharpness.first_order import sampled_labels
from halfulp.sharpness.noise import SharpnessMonitor
from halfulp.train.loop import config_of, train
from halfulp.train.model import next_token_loss
from halfulp.train.open import Start, open_session
from halfulp.train.parallel import open_world
from halfulp.train.sharpness import measure, measure_gnb
from halfulp.train.step import batch_of, key_of, run_step


def state(path: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((path / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    return {f"{f.stem}/{name}": t for f in files for name, t in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def said(path: Path, *kinds: str) -> list[dict]:
    dull = ("time", "seconds")
    events = (e for e in Run.open(path, writer=False).events() if e["event"] in kinds)
    return [{k: v for k, v in e.items() if k not in dull} for e in events]


@pytest.mark.parametrize("recipe", ["fp32", "te_delayed", "bf16_weights_sr"])
def test_a_measured_run_has_the_bits_of_one_that_is_not(make_config, recipe):
    """50 steps, measured after every fifth: weights, moments, delayed scales and every event."""
    options = {"steps": 50, "checkpoint_every": 25, "eval_every": 10, "count_every": 10}
    runs = []
    for name, every in (("plain", 0), ("measured", 5)):
        sharpness = {"every": every, "draws": 2 if every else 1}
        config = make_config(name, policy={"recipe": recipe}, train=options, sharpness=sharpness)
        torch.manual_seed(7)
        runs.append(train(config).path)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(7).get_state())
    plain, measured = runs
    assert same(state(plain, 25), state(measured, 25))
    assert same(state(plain, 50), state(measured, 50))
    kinds = ("step", "eval", "counters", "loss_scale")
    assert said(plain, *kinds) == said(measured, *kinds)
    assert [e["step"] for e in said(measured, "sharpness")] == list(range(5, 51, 5))
    assert said(plain, "sharpness") == []


def by_hand(s, parts: int, key: int, draw: int = 0) -> dict[str, float]:
    """B ‖∇‖² per block: the mean loss of the next `parts` micro-batches, labels as documented."""
    grads, positions = None, 0
    for i in range(parts):
        micro = draw * s.micro_batches + i
        batch = batch_of(s, micro)
        seed = key_of(s.config.train.seed, s.step, micro, key)
        generator = torch.Generator().manual_seed(seed)
        with s.precision.handle.off():
            logits = s.model(input_ids=batch[:, :-1]).logits.float().flatten(0, -2)
            labels = sampled_labels(logits, generator)
            loss = torch.nn.functional.cross_entropy(logits, labels) / parts
            found = torch.autograd.grad(loss, list(s.model.parameters()), allow_unused=True)
        grads = found if grads is None else [a + b for a, b in zip(grads, found, strict=True)]
        positions += len(labels)
    total: dict[str, float] = {}
    names = [name for name, _ in s.model.named_parameters()]
    for piece in s.pieces:
        part = piece.of(grads[names.index(piece.parameter)])
        square = part.double().square().sum().item()
        total[piece.block] = total.get(piece.block, 0.0) + positions * square
    return total


def traced(event: dict) -> dict[str, float]:
    return {row["block"]: row["sharpness"] * row["parameters"] for row in event["blocks"]}


@pytest.fixture
def opened(make_config):
    """A session of one process with two micro-batches a step, two steps in."""
    config = make_config(
        model={"preset": "gpt2-tiny", "hidden": 0},
        policy={"recipe": "te_delayed"},
        train={"accumulate": 2, "clip": 0.0},
    )
    with (
        open_world(config.train) as world,
        open_session(config, world, Start(command=("test",)), None) as s,
    ):
        for _ in range(2):
            run_step(s, interrupted=False)
            s.step += 1
            s.cursor.advance()
        yield s


def test_a_draw_is_the_squared_gradient_of_sampled_labels(opened):
    s = opened
    expected = [by_hand(s, 1, key=3)]
    report = measure_gnb(s, draws=3, key=3)
    rows = {row.name: row for row in report.rows("block")}
    assert set(rows) == set(expected[0])
    assert report.positions == 2 * 32
    assert report.traces.shape == (3, len(s.pieces))
    first = {}
    for piece, trace in zip(s.pieces, report.traces[0].tolist(), strict=True):
        first[piece.block] = first.get(piece.block, 0.0) + trace
    assert first == pytest.approx(expected[0], rel=1e-5)
    assert all(p.grad is None for p in s.model.parameters())
    again, other = measure_gnb(s, draws=3, key=3), measure_gnb(s, draws=3, key=4)
    assert torch.equal(report.traces, again.traces)
    assert (report.traces != other.traces).any(1).all()
    assert len({tuple(row.tolist()) for row in report.traces}) == 3


def test_every_parameter_is_in_one_block(opened):
    report = measure_gnb(opened, draws=2, key=0)
    total = sum(p.numel() for p in opened.model.parameters())
    assert sum(row.parameters for row in report.rows("block")) == total
    assert {"qk", "vo"} <= set(report.by_type)  # out of the fused projection of GPT-2


def test_the_logits_are_those_of_the_same_pass(opened):
    s = opened
    measured = measure(s, draws=1, key=0)
    with torch.no_grad(), s.precision.handle.off():
        batch = batch_of(s, 0)
        loss = next_token_loss(s.model, batch).item()
        logits = s.model(input_ids=batch[:, :-1]).logits
    assert measured.logits.loss_nats == measured.report.loss_nats == pytest.approx(loss, rel=1e-5)
    assert measured.logits.logz == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)
    assert measured.logits.positions == 64


def test_modes_switches_and_dropout_are_left_as_they_were(opened):
    s = opened
    plain = measure_gnb(s, draws=1, key=0)
    for module in s.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    s.model.transformer.h[0].mlp.eval()
    modes = [m.training for m in s.model.modules()]
    dropped = measure_gnb(s, draws=1, key=0)
    assert torch.equal(plain.traces, dropped.traces)
    assert [m.training for m in s.model.modules()] == modes
    assert s.precision.handle.clock.enabled


def test_recomputed_activations_give_the_same_sharpness(make_config):
    found = []
    for recompute in (False, True):
        train_ = {"steps": 4, "activation_checkpointing": recompute, "checkpoint_every": 0}
        config = make_config(f"{recompute}", train=train_, sharpness={"every": 2})
        found.append(said(train(config).path, "sharpness"))
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
def test_compiled_runs_give_the_same_bits_measured_or_not(make_config):
    runs = []
    for name, every in (("plain", 0), ("measured", 2)):
        options = {"steps": 4, "compile": True, "eval_every": 0, "count_every": 0}
        sharpness = {"every": every}
        runs.append(train(make_config(name, train=options, sharpness=sharpness)).path)
    assert same(state(runs[0], 4), state(runs[1], 4))
    assert [e["step"] for e in said(runs[1], "sharpness")] == [2, 4]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
def test_processes_measure_their_own_tokens(make_config, parallel, preset):
    """ddp: the mean of each process's draw; fsdp2: one draw of the positions of both."""
    options = {"parallel": parallel, "clip": 0.0, "steps": 2, "checkpoint_every": 0}
    model = {"preset": preset, "hidden": 0 if preset.startswith("gpt2") else 32}
    policy = {"recipe": "te_delayed"}
    two = make_config("two", model=model, policy=policy, train=options, sharpness={"every": 2})
    assert train_together(two.to_dict()) == ["finished"] * 2
    bare = make_config("bare", model=model, policy=policy, train=options, sharpness={"every": 0})
    assert train_together(bare.to_dict()) == ["finished"] * 2
    assert same(state(Path(two.run.out), 2), state(Path(bare.run.out), 2))
    (event,) = said(Path(two.run.out), "sharpness")
    one = make_config("one", model=model, policy=policy, train={**options, "accumulate": 2})
    with (
        open_world(one.train) as world,
        open_session(one, world, Start(command=("test",)), None) as s,
    ):
        for _ in range(2):
            run_step(s, interrupted=False)
            s.step += 1
            s.cursor.advance()
        if parallel == "ddp":
            report = measure_gnb(s, draws=2, key=0)
            expected = {row.name: row.trace for row in report.rows("block")}
        else:
            expected = by_hand(s, 2, key=0)
    # gpt2's bias of keys has no gradient but rounding.
    assert traced(event) == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert event["positions"] == 2 * 2 * 32
    assert sum(row["parameters"] for row in event["blocks"]) == sum(
        p.numel() for p in s.model.parameters()
    )


def test_a_resumed_run_measures_the_same_once(make_config):
    sharpness = {"every": 3}
    whole = train(make_config("whole", sharpness=sharpness)).path
    path = train(make_config("resumed", sharpness=sharpness, train={"keep": 3})).path
    (path / "summary.json").unlink()
    train(config_of(path), resume=path, from_step=4)
    assert said(path, "sharpness") == said(whole, "sharpness")
    assert [e["step"] for e in said(path, "sharpness")] == [3, 6, 9, 12]
    assert same(state(path, 12), state(whole, 12))


def test_a_run_is_measured_by_default_and_numbers_out_of_range_are_refused(make_config):
    assert (make_config().sharpness.every, make_config().sharpness.draws) == (100, 1)
    for bad in ({"every": -1}, {"draws": 0}):
        with pytest.raises(ConfigError, match=r"sharpness\.\w+ = -?\d+ is too small"):
            make_config(sharpness=bad)


def test_the_direction_of_a_checkpoint_is_the_update_that_made_it(make_config):
    options = {"weight_decay": 0.0, "checkpoint_every": 1, "keep": 2, "steps": 5, "clip": 0.0}
    config = make_config(train=options)
    path = train(config).path
    lr = said(path, "step")[-1]["lr"]
    betas, eps = config.train.betas, config.train.eps
    found = adam_direction(path / "checkpoints/step-00000005", betas=betas, eps=eps)
    before, after = (
        load_file(path / f"checkpoints/step-0000000{n}/model.safetensors") for n in "45"
    )
    assert found.keys() == after.keys()
    for name, direction in found.items():
        moved = after[name] - before[name]
        assert moved.abs().max() > 0
        assert torch.allclose(moved, lr * direction, rtol=1e-2, atol=1e-7), name
    with pytest.raises(CheckError, match=r"does not exist\. Give a checkpoint"):
        adam_direction(path, betas=betas, eps=eps)


def test_processes_of_ddp_are_micro_batches_of_the_free_monitor(tmp_path):
    model, batches = watched_model()
    alone = SharpnessMonitor(model)
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        alone.on_microbatch(45)
    alone.on_step(weight=1.0)
    expected = alone.report().traces[0].tolist()
    found = watch_together(str(tmp_path / "store"))
    assert len(found) == 2
    for traces in found:
        assert traces == pytest.approx(expected, rel=1e-4, abs=1e-9)
