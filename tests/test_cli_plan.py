"""`halfulp plan`, `plan laws` and `plan kausik` as they are typed, and their exit codes."""

import json
import tomllib

import pytest

from halfulp.cli import main
from halfulp.corpus.growth import Growth
from halfulp.corpus.stats import Stats
from halfulp.train.config import load_config


def write_statistics(path) -> None:
    """A corpus of 2.72e8 tokens of which 3 % repeat; sequences as the specification measured."""

    def count(name, distinct, slope):
        return Growth(
            name=name, occurrences=272_000_000, distinct=distinct, exact=False, rel_std=0.004,
            f=(1,), slope=slope, slope_se=0.01, doubling_factor=2 ** (1 / slope),
            curve=((10**8, distinct // 2), (272_000_000, distinct)), unique_symbols=263_840_000,
        )  # fmt: skip

    counts = [count("documents", 70_000, 1.0), count("tokens:5", 86_000_000, 0.783)]
    counts += [count("tokens:8", 127_700_000, 0.842)]
    Stats(
        paths=("tokens.bin",), files=1, text_bytes=None, symbols={"tokens": 272_000_000},
        empty_documents=0, tokenizer=None, skipped={}, invalid={}, unmarked=(), split=False,
        counts={c.name: c for c in counts},
    ).save(path)  # fmt: skip


@pytest.fixture
def type_(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_statistics(tmp_path / "stats.json")

    def run(text: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["plan", *text.split()])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_a_plan_says_everything_and_writes_it(type_, tmp_path):
    code, out, _ = type_(
        "--gpu H100 --gpu-hours 1000 --gpus 8 --json p.json --html p.html --plot p.svg "
        "--write-config run.toml --data stdlib --tokenizer bpe:4096 --length 1024"
    )
    assert code == 0
    for said in (
        "parameters", "tokens", "1,000 GPU-hours: 5.21 days on 8 GPUs", "$3,500 ($2,000 to $5,000",
        "80 % band", "steplaw", "deepseek", "twice the budget", "pass: weights",
        "out of range: deepseek", "note: price: 3.5 $/GPU-hour, listings of 2026", "pays from",
        "NeMo", "does not multiply nvfp4", "FLOPs (6 N D)",
    ):  # fmt: skip
        assert said in out
    table = json.loads((tmp_path / "p.json").read_text(), parse_constant=pytest.fail)
    chosen = table["chosen"]
    assert 6 * chosen["parameters"] * chosen["tokens"] == pytest.approx(chosen["flops"])
    assert table["days"] == pytest.approx(1000 / 8 / 24)
    assert table["law"]["coefficients"]["alpha"] == 0.3478
    assert {o["precision"] for o in table["options"]} == {"bf16", "fp8"}
    config = load_config(tomllib.loads((tmp_path / "run.toml").read_text()))
    step = config.train.rows * config.train.accumulate * config.data.length * 8
    assert config.train.steps * step == pytest.approx(chosen["tokens"], rel=1e-3)
    assert step == pytest.approx(table["batch_tokens"], rel=0.05)
    assert (tmp_path / "p.svg").read_text().count("<svg") == 1
    assert "<h1>" in (tmp_path / "p.html").read_text()


def test_files_are_not_replaced_without_force(type_, tmp_path):
    assert type_("--flops 1e20 --json p.json")[0] == 0
    before = (tmp_path / "p.json").read_text()
    code, _, err = type_("--flops 2e20 --json p.json")
    assert (code, (tmp_path / "p.json").read_text()) == (2, before)
    assert "--force" in err
    assert type_("--flops 2e20 --json p.json --force")[0] == 0
    assert (tmp_path / "p.json").read_text() != before


def test_a_corpus_gives_the_unique_tokens_and_the_criterion(type_):
    code, out, _ = type_("--gpu-hours 3 --corpus stats.json --language ja")
    assert code == 0
    assert "epochs of 264 million unique tokens" in out
    assert "corpus: n = 8: the corpus holds 1.28e+08 distinct 8-token sequences" in out
    assert "(tokenizer that of the token files)" in out
    assert "twice the unique tokens" in out
    assert "損失" in out
    assert (
        "epochs of 1 billion" in type_("--gpu-hours 3 --corpus stats.json --unique-tokens 1e9")[1]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "none was given"),
        ("--flops 1e20 --gpu-hours 3", "exactly one budget"),
        ("--flops 1e20 --gpu H900", "GPU 'H900' is unknown"),
        ("--flops 1e20 --precision nvfp4", "does not multiply nvfp4"),
        ("--flops 1e20 --mfu 1.5", "MFU of 1.5"),
        ("--flops 1e20 --price 0", "price of 0"),
        ("--flops 1e20 --gpus 0", "0 GPUs"),
        ("--flops 1e20 --speed fp8=x", "not understood"),
        ("--flops 1e20 --law nothing.json", "does not exist"),
        ("--flops 1e20 --corpus nothing.json", "cannot be read"),
        ("--flops 1e20 --language de", "not written yet"),
        ("--flops 1e20 --write-config run.toml", "--data"),
        ("--gpu-hours 3 --money 5", "were given"),
        ("--target-loss 1.8173", "Give a larger target"),
        ("--target-loss 30", "a smaller target loss"),
        ("--gpu-hours 1000 --unique-tokens 1e6", "1e+06 unique tokens cannot use 1.42e+21 FLOPs"),
        ("--gpu-hours 1000 --unique-tokens 1e300", "Give 1000 to 1e+18"),
        ("--flops 1e20 --length 5", "only matters to --write-config"),
        ("--flops 1e20 --json no/where.json", "cannot be written"),
        ("--flops 1e20 --html x --json x", "Give four names"),
        ("--flops many", "Invalid value for '--flops'"),
        ("--flops 1e20 laws", "options of laws after its name"),
        ("laws --law epok", "Nearest: epoch"),
        ("laws --at 7e10", "such as 70e9,1.4e12"),
        ("laws --at 7e10,-1", "not positive"),
        ("kausik --ref 1e9", "such as 70e9,1.4e12"),
        ("kausik --ref 1e9,2e10 --tokens 0", "no size of a corpus"),
        ("kausik --ref 1e9,2e10 --law steplaw", "does not give a loss"),
    ],
)
def test_bad_input_exits_with_two_and_a_cure(type_, text, said):
    code, out, err = type_(text)
    assert code == 2
    assert said in err
    assert "Traceback" not in err + out


def test_what_a_plan_reads_is_not_written(type_, tmp_path):
    before = (tmp_path / "stats.json").read_bytes()
    code, _, err = type_("--flops 1e20 --corpus stats.json --json stats.json --force")
    assert (code, (tmp_path / "stats.json").read_bytes()) == (2, before)
    assert "is read by this command" in err


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: f["counts"].pop("documents"),
        lambda f: f["counts"]["tokens:5"].update(distinct="x"),
        lambda f: f["counts"].update({"tokens:zz": f["counts"]["tokens:5"]}),
        lambda f: f["symbols"].update(tokens=-5),
        lambda f: f["symbols"].update(tokens="x"),
        lambda f: f.update(symbols=[]),
        lambda f: f.update(tokenizer=5),
    ],
)
def test_edited_statistics_are_refused(type_, tmp_path, edit):
    facts = json.loads((tmp_path / "stats.json").read_text())
    edit(facts)
    (tmp_path / "edited.json").write_text(json.dumps(facts))
    code, _, err = type_("kausik --ref 1e9,2e10 --corpus edited.json")
    assert code == 2
    assert "edited.json is damaged or was edited" in err


def test_nothing_is_written_where_the_plan_fails(type_, tmp_path):
    assert type_("--flops 1e20 --language de --json p.json")[0] == 2
    assert not (tmp_path / "p.json").exists()


def test_laws_are_listed_and_evaluated(type_):
    code, out, _ = type_("laws")
    assert code == 0
    for name in ("epoch", "hoffmann_tex", "muennighoff", "steplaw", "kausik", "arXiv:2404.10102"):
        assert name in out
    _, out, _ = type_("laws --law epoch --at 70e9,1.4e12")
    assert "1.97388" in out
    assert "482.01 ± 124.58" in out
    assert out.count("out of range") == 3
    _, out, _ = type_("laws --at 70e9,1.4e12")
    assert "N = 7e+10 is 4.38 times above what it was fitted on" in out
    for value in ("1.93665", "1.92084", "1.97388", "2.0246"):
        assert value in out
    assert "says nothing" in type_("laws --law kausik --at 1e9,1e10")[1]


def test_kausik_names_its_n_and_tokenizer_and_says_where_there_is_no_bound(type_):
    _, out, _ = type_("kausik --ref 1e9,2e10 --law hoffmann")
    assert out.count("0.440 to 0.720") == 2
    assert "2.62 to 4.83 times the corpus" in out
    _, out, _ = type_("kausik --ref 1e8,2.6384e8 --corpus stats.json --law kausik")
    assert "n = 5: the corpus holds 8.6e+07 distinct 5-token sequences" in out
    assert "tokenizer that of the token files" in out
    assert "may still uncover" in out
    _, out, _ = type_("kausik --ref 1e9,2e10 --law floating")
    assert "no lower bound to 0.484" in out
    assert "at least 4.19 times the corpus" in out


def test_help_names_every_budget(type_):
    code, out, _ = type_("--help")
    assert code == 0
    for option in ("--gpu-hours", "--money", "--flops", "--target-loss", "laws", "kausik"):
        assert option in out


@pytest.mark.parametrize(
    ("language", "measured", "published"),
    [("en", "At the speed that you gave, FP8", "At every speed published"),
     ("ja", "ご指定の速度では", "公表されているどの速度でも")],
)  # fmt: skip
def test_the_paragraph_says_whose_speed_it_is(type_, language, measured, published):
    own = type_(f"--gpu-hours 1000 --speed fp8=1.6 --language {language}")[1]
    assert measured in own
    assert published not in own
    theirs = type_(f"--gpu-hours 1000 --language {language}")[1]
    assert published in theirs
    assert measured not in theirs
