import json
import resource
from pathlib import Path

import pytest
import torch

from halfulp.errors import RunError
from halfulp.train import checkpoint
from halfulp.train.checkpoint import Checkpoint


def content(step: int) -> Checkpoint:
    tensors = {
        "model": {"w": torch.full((64, 64), float(step))},
        "optimizer": {"w/exp_avg": torch.ones(3, dtype=torch.bfloat16), "w/step": torch.tensor(2)},
        "quantizers": {},
    }
    return Checkpoint(step, {"tokens": 10 * step}, tensors, "{}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_a_checkpoint_comes_back_as_it_went(folder):
    path = checkpoint.save(folder, content(5), keep=2)
    assert path.name == "step-00000005"
    checkpoint.verify(folder, 5)
    back = checkpoint.load(folder, 5)
    assert back.step == 5
    assert back.state["tokens"] == 50
    for part, tensors in content(5).tensors.items():
        assert set(back.tensors[part]) == set(tensors)
        for name, tensor in tensors.items():
            assert back.tensors[part][name].dtype == tensor.dtype
            assert torch.equal(back.tensors[part][name], tensor)


def test_only_the_newest_are_kept(folder):
    for step in (1, 2, 3, 4):
        checkpoint.save(folder, content(step), keep=2)
    assert checkpoint.steps_in(folder) == [3, 4]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_broken_checkpoint_does_not_push_out_a_good_one(folder):
    for step in (1, 2):
        checkpoint.save(folder, content(step), keep=2)
    truncate(folder / "step-00000002" / "model.safetensors")
    checkpoint.save(folder, content(3), keep=2)
    assert checkpoint.steps_in(folder) == [1, 2, 3]


def test_nothing_is_deleted_before_the_next_is_complete(folder, monkeypatch):
    checkpoint.save(folder, content(1), keep=1)
    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*No space left.*--resume"):
        checkpoint.save(folder, content(2), keep=1)
    assert checkpoint.steps_in(folder) == [1]
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    assert checkpoint.load(folder, 1).step == 1


def test_a_disk_that_takes_no_more_is_an_answer(folder):
    """For real: no file may grow beyond what one tensor needs."""
    checkpoint.save(folder, content(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write the checkpoint .*too large.*--resume"):
            checkpoint.save(folder, content(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def test_saving_an_earlier_step_sets_later_ones_aside(folder):
    """The run has gone back: what lay after it is of another course, and not among the newest."""
    for step in (4, 5, 6):
        checkpoint.save(folder, content(step), keep=2)
    checkpoint.save(folder, content(3), keep=2)
    assert checkpoint.steps_in(folder) == [3]
    assert sorted(p.name for p in (folder / "dropped").iterdir()) == [
        "step-00000005",
        "step-00000006",
    ]


def test_a_half_written_checkpoint_is_not_seen_and_is_cleaned_up(folder):
    checkpoint.save(folder, content(1), keep=1)
    (folder / ".writing-step-00000002").mkdir()
    (folder / ".writing-step-00000002" / "state.json").write_text("{}")
    assert checkpoint.steps_in(folder) == [1]
    checkpoint.save(folder, content(2), keep=2)
    assert checkpoint.steps_in(folder) == [1, 2]


@pytest.mark.parametrize("name", ["model", "optimizer", "quantizers"])
def test_a_truncated_file_is_named_with_the_command_that_goes_on(folder, name):
    for step in (10, 20):
        checkpoint.save(folder, content(step), keep=2)
    truncate(folder / "step-00000020" / f"{name}.safetensors")
    with pytest.raises(RunError) as error:
        checkpoint.verify(folder, 20)
    said = str(error.value)
    assert f"{name}.safetensors has" in said
    assert "step-00000020 is broken" in said
    assert f"halfulp train --resume {folder.parent} --from-step 10" in said
    checkpoint.verify(folder, 10)


def test_a_flipped_bit_is_found(folder):
    checkpoint.save(folder, content(3), keep=1)
    file = folder / "step-00000003" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"sha256.*start again with.*--from-step 0"):
        checkpoint.verify(folder, 3)


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"files": {}}', '{"files": {"model.safetensors": 3}}']
)
def test_a_damaged_state_is_a_broken_checkpoint(folder, damage):
    checkpoint.save(folder, content(3), keep=1)
    (folder / "step-00000003" / "state.json").write_text(damage)
    with pytest.raises(RunError, match="is broken"):
        checkpoint.verify(folder, 3)


def test_later_checkpoints_are_moved_aside(folder):
    for step in (1, 2, 3):
        checkpoint.save(folder, content(step), keep=9)
    checkpoint.drop_after(folder, 1)
    checkpoint.save(folder, content(2), keep=9)
    moved = checkpoint.drop_after(folder, 1)
    assert [p.name for p in moved] == ["step-00000002.1"]
    assert checkpoint.steps_in(folder) == [1]
    assert json.loads((folder / "dropped/step-00000003/state.json").read_text())["step"] == 3


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def disk_full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")
