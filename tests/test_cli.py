import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfulp.cli import main
from halfulp.cli.progress import Progress
from halfulp.cli.show import worst_counter
from halfulp.run import Run

COMMANDS = ("demo", "train", "check", "report", "recipes", "formats", "info")
TINY = (
    *("train", "--model", "llama-tiny", "--steps", "4"),
    *("--set", "model.hidden=32", "--set", "train.rows=2", "--set", "data.length=32"),
    *("--set", "train.eval_batches=1", "--set", "train.device=cpu"),
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("round off adds up until it does not. " * 12)
    return str(folder)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_help_lists_the_commands_with_whole_sentences(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w.*[^.]\.$", out, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"{command} [OPTIONS]" in out


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halfulp.cli.app.app", interrupted)
    assert run(capsys, "info") == (130, "", "error: interrupted\n")


def test_help_does_not_import_torch():
    script = "import sys, halfulp.cli.app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "absent.toml"), "cannot read the configuration absent.toml"),
        (("train", "--resume", "absent"), "absent is asked for as a run"),
        (("train", "--from-step", "3"), "--from-step belongs to --resume"),
        (("train", "--resume", "a", "--lr", "1"), "no other option can be given but --from-step"),
        (("train", "--set", "lr=3"), "Write section.key=value"),
        (("train", "--lr", "1", "--set", "train.lr=2"), "says again"),
        (("train", "--set", "train.stesp=3"), "Did you mean 'steps'"),
        (("train", "--recipe", "te_curent"), "te_current"),
        (("train", "--lr-blocks", "papr"), "Nearest: paper"),
        (("train", "--lr-blocks", "emb=1,qk=1,fnn=1,vo=1"), "Nearest: ffn"),
        (("train", "--model", "lama"), "neither a preset nor a local path"),
        (("formats", "e99"), "no such format"),
        (("recipes", "nvpf4"), "nvfp4"),
        (("report", "absent"), "absent is asked for as a run"),
        (("report", "absent", "--bar", "nan"), "--bar = nan cannot be used"),
    ],
)
def test_a_mistake_is_a_message_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("train", "--lr", "fast"), ("nonsense",), ("report",)])
def test_a_wrong_option_is_exit_code_2(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "Usage" in err


def test_formats_are_told_exactly(capsys):
    _, out, _ = run(capsys, "formats", "e4m3")
    header, row = out.splitlines()
    assert row.split() == ["e4m3", "8", "4", "3", "2^-4", "448", "2^-6", "2^-9", "nan"]
    assert header.startswith("format  bits  exponent  mantissa")
    _, out, _ = run(capsys, "formats")
    names = {line.split()[0] for line in out.splitlines() if line}
    assert {"fp32", "bf16", "e2m1", "int8", "mxfp8", "nvfp4"} <= names


def test_formats_with_scales_are_told_too(capsys):
    for word in ("nvfp4", "e2m1@1x16:nvfp4"):
        code, out, _ = run(capsys, "formats", word)
        assert code == 0
        assert out.splitlines()[1].split() == [word, "e2m1@1x16:nvfp4", "4.5"]
    assert run(capsys, "formats", "e2m1@1x16:nvfp")[0] == 2


def test_recipes_are_listed_and_shown(capsys):
    _, out, _ = run(capsys, "recipes")
    assert {"fp32", "nvfp4"} <= {line.split()[0] for line in out.splitlines()}
    _, out, _ = run(capsys, "recipes", "nvfp4_all")
    assert "e2m1@1x16:nvfp4:stochastic:hadamard(16)" in out


def test_info_names_kernel_and_versions(capsys):
    code, out, _ = run(capsys, "info")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert facts["kernel"] in ("c", "torch")
    assert facts["kernel reason"]
    assert facts["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", f"train.rows={10**12}"), "memory ran out: Unable to allocate"),
        (("--set", f"train.accumulate={10**14}"), "memory ran out: "),
        (("--out", "/dev/null/run"), "Not a directory"),
    ],
)
def test_a_lack_of_memory_or_disk_is_a_message_and_exit_code_2(
    capsys, tmp_path, text, arguments, message
):
    out = str(tmp_path / "run")
    code, _, err = run(capsys, *TINY, "--data", text, "--out", out, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_file_that_is_in_the_way_is_named(capsys, tmp_path, text, monkeypatch):
    arguments = (*TINY, "--data", text, "--out", str(tmp_path / "run"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "config.toml.part")

    monkeypatch.setattr("halfulp.run.write_whole", full)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: config.toml.part: No space left on device. Check that")
    monkeypatch.undo()
    assert run(capsys, *arguments)[0] == 0


def test_train_report_and_resume_of_a_finished_run(capsys, tmp_path, text):
    out_dir = tmp_path / "run"
    arguments = (*TINY, "--data", text, "--recipe", "te_current", "--out", str(out_dir))
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    first = out.splitlines()[0]
    assert re.search(r"[\d,]+ parameters, 64 tokens a step, [\d.e-]+ times the [\d,]+ train", first)
    assert first.endswith(f"; {out_dir}")
    assert "te_current: step 4/4, held-out loss" in out
    assert "finished after 4 steps, 256 tokens" in out
    assert f"run: {out_dir}" in out
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert str(out_dir) in err
    assert "--resume" in err
    assert "--force" in err
    assert run(capsys, *arguments, "--force")[0] == 0
    code, out, _ = run(capsys, "train", "--resume", str(out_dir))
    assert code == 0
    assert "finished after 4 steps" in out
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "report", str(out_dir), "-o", str(page))
    assert code == 0
    assert f"report: {page}" in out
    assert page.stat().st_size > 1000


def test_flags_override_the_file(capsys, tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text('[policy]\nfile = "absent.toml"\n[train]\nsteps = 9\nlr = 0.5\n')
    out_dir = tmp_path / "run"
    flags = (*TINY[1:], "--data", text, "--recipe", "fp32", "--out", str(out_dir))
    assert run(capsys, "train", str(file), *flags)[0] == 0
    config = Run.open(out_dir, writer=False).config()
    assert config["train"]["steps"] == 4
    assert config["train"]["lr"] == 0.5
    assert config["policy"]["recipe"] == "fp32"
    assert config["policy"]["file"] == ""


def test_a_number_keeps_its_sign_where_the_terminal_has_none(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr("halfulp.cli.app.app", lambda _: print("loss −0.055 nats", flush=True))
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert shown.getvalue() == b"loss \\u22120.055 nats\n"


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    capsys, tmp_path, text, monkeypatch
):
    out_dir = tmp_path / "run"
    show = Progress.event

    def interrupt(self, event):
        show(self, event)
        if event["event"] == "step" and event["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "event", interrupt)
    code, out, _ = run(capsys, *TINY, "--data", text, "--out", str(out_dir))
    assert code == 130
    assert f"resume with: halfulp train --resume {out_dir}" in out
    monkeypatch.undo()
    code, out, _ = run(capsys, "train", "--resume", str(out_dir))
    assert code == 0
    assert "checkpoint of step 2" in out


def test_torchrun_trains_with_two_processes(tmp_path, text):
    out_dir = tmp_path / "run"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    flags = ("--data", text, "--out", str(out_dir), "--set", "train.parallel=fsdp2")
    done = subprocess.run(
        [sys.executable, *launch, "-m", "halfulp", *TINY, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 4 steps, 512 tokens") == 1
    assert next(Run.open(out_dir, writer=False).events("start"))["world"] == 2


def test_the_worst_counter_is_the_largest_share():
    event = {
        "gemms": [{"block": "layers.0.qk", "n": 100, "saturated": 0, "underflow": 40}],
        "optimizer": [{"block": "emb", "n": 100, "asked": 50, "lost_updates": 30}],
    }
    assert worst_counter(event) == "updates lost 60.0%, emb"
    assert worst_counter({"gemms": [], "optimizer": []}) == ""
