"""The page of a plan and its words: complete, self-contained, readable in both languages."""

import dataclasses
import re
from html import unescape

import browser
import pytest

from halfulp.errors import PlanError, RunError
from halfulp.plan.budget import Plan, plan
from halfulp.plan.facts import Facts, Order
from halfulp.plan.laws import LOSS_KINDS, law_names, load_law
from halfulp.plan.said import said
from halfulp.plan.sentences import SENTENCES
from halfulp.plan.speeds import read_speeds
from halfulp.report.amounts import amount, digits, dollars
from halfulp.report.plan_page import render_plan, write_plan
from halfulp.report.plan_plots import precision_figure, sequences_figure
from halfulp.report.plan_texts import TEXTS
from halfulp.report.plan_words import paragraph
from halfulp.report.words import nats

HOSTILE = "\"><script>alert(1)</script>'&amp; \u202e"


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan("b200", money_usd=25_000, gpus=8)


@pytest.fixture(scope="module")
def facts() -> Facts:
    curve = tuple((10.0**k, 10 ** (0.8 * k)) for k in range(5, 10))
    orders = tuple(
        Order(n=n, unit="token", unique=10 ** (7.2 + n / 4), exponent=0.8, doubling=2.4,
              curve=curve)
        for n in (2, 5, 8)
    )  # fmt: skip
    return Facts(
        file=HOSTILE,
        unit="token",
        tokenizer="bytes",
        symbols=1e9,
        unique_symbols=9e8,
        orders=orders,
    )


def test_first_screen_is_a_paragraph_and_four_numbers(made):
    text = render_plan(made, command="halfulp plan --money 25000")
    start = text[: text.index("The plan</h2>")]
    assert paragraph(made).replace("'", "&#x27;") in start
    assert start.count("<strong>") == 4
    assert "$25,000" in start
    for part in ("halfulp plan --money 25000", "alpha = 0.3478", "Pays from", "nvfp4", "fitted on"):
        assert part in text
    assert text.count("<svg") == 3


def test_page_is_self_contained_and_reproducible(made, facts):
    text = render_plan(made, facts=facts, language="ja")
    assert text == render_plan(made, facts=facts, language="ja")
    assert text.count("<svg") == 4
    assert 'lang="ja"' in text
    assert len(text) < 300_000
    assert re.findall(r"(?i)<script|<img|https?://|url\((?!#)|@import|\bnan\b", text) == []
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [1200, 420])
def test_browser_shows_no_error_no_overflow_and_no_texts_on_one_another(
    made, facts, tmp_path, width
):
    few = plan("h100", gpu_hours=3, unique_tokens=3e8)
    for number, one in enumerate((made, few)):
        path = write_plan(one, tmp_path / f"{number}.html", facts=facts)
        seen = browser.measure(path, tmp_path, width=width)
        assert seen["messages"] == []
        assert seen["scroll"] <= seen["window"]
        for plot in seen["plots"]:
            assert plot["touching"] == []
            assert plot["outside"] == []


def test_existing_pages_are_kept(made, tmp_path):
    out = write_plan(made, tmp_path / "plan.html")
    with pytest.raises(RunError, match="exists"):
        write_plan(made, out)
    assert write_plan(made, out, force=True) == out


def test_figures_without_data_are_absent(made):
    alone = plan("a100", flops=1e21)
    assert alone.comparisons == ()
    assert precision_figure(alone) is None
    assert render_plan(alone).count("<svg") == 2
    assert sequences_figure((Order(n=2, unit="token", unique=5, exponent=None, doubling=None),),
                            1e9) is None  # fmt: skip


def test_both_languages_say_the_same_things(made):
    assert TEXTS["en"].keys() == TEXTS["ja"].keys()
    for key in TEXTS["en"]:
        fields = [set(re.findall(r"\{(\w+)[:}]", TEXTS[lang][key])) for lang in ("en", "ja")]
        assert fields[0] == fields[1], key
    band = made.chosen.band_nats
    assert band is not None
    losses = [nats(value) for value in (made.chosen.loss_nats, *band)]
    for lang in ("en", "ja"):
        text = paragraph(made, lang)
        for number in (*losses, "$25,000", "31.6", "MXFP8"):
            assert number in text
    assert "14.4 billion" in paragraph(made, "en")
    assert "144億" in paragraph(made, "ja")
    with pytest.raises(PlanError, match="en or ja"):
        paragraph(made, "de")


def test_paragraph_says_what_has_to_be_done(made):
    assert "At every speed published for the models nearest to this size, MXFP8" in paragraph(made)
    four = plan("b200", gpu_hours=6000, precision="nvfp4")
    assert "Try both on a short run first" in paragraph(four)
    small = plan("h100", flops=1e23, gpus=2, unique_tokens=1e10)
    text = paragraph(small)
    assert "does not fit into the memory of 2 GPUs" in text
    assert "Your text is read" in text
    assert "memory of 1 GPU: at least" in paragraph(plan("h100", flops=1e23, gpus=1))
    assert "not known" in paragraph(plan("a100", flops=1e21, law="hoffmann"))
    priceless = plan("mi300x", flops=1e21)
    assert "$" not in paragraph(priceless)
    assert "no price is listed" in render_plan(priceless)
    calm = dataclasses.replace(made, flags=())
    assert "smaller run first" in paragraph(made)
    assert "smaller run first" not in paragraph(calm)


def test_paragraph_promises_no_more_than_the_figures_hold(made):
    far = plan("h100", flops=1e25)
    names = {flag.partition(":")[0] for flag in far.flags}
    assert len(names) < len(far.flags)
    assert f"Of the rules behind this plan, {len(names)} are used beyond" in paragraph(far)
    one = dataclasses.replace(made, flags=made.flags[:1] * 2)
    assert "one is used beyond" in paragraph(one)
    for language, told in (
        ("en", ("luck of a single run", "training in BF16 reaches 40 %", made.gpu.price_date)),
        ("ja", ("1 回ごとのばらつき", "最大性能の 40 %", made.gpu.price_date)),
    ):
        for words in told:
            assert words in paragraph(made, language)


@pytest.mark.parametrize(
    ("value", "english", "japanese"),
    [
        (3.8005e9, "3.8 billion", "38億"),
        (79.66e9, "79.7 billion", "797億"),
        (1.2e12, "1.2 trillion", "1.2兆"),
        (9.384e7, "93.8 million", "9,380万"),
        (999.9e9, "1 trillion", "1兆"),
        (512, "512", "512"),
        (0.0, "0", "0"),
    ],
)
def test_amounts(value, english, japanese):
    assert amount(value) == english
    assert amount(value, "ja") == japanese


def test_digits_and_dollars():
    found = [digits(x) for x in (0.00123, 1.0, 12.34, 999.6, 123456, float("inf"))]
    assert found == ["0.00123", "1", "12.3", "1,000", "123,000", "–"]
    assert [dollars(x) for x in (1.5, 10.5, 99.999, 3500.2)] == [
        "$1.50",
        "$10.50",
        "$100",
        "$3,500",
    ]


def visible(page: str) -> str:
    """The page's texts, those of its figures among them, one a line."""
    page = re.sub(r"(?s)<style.*?</style>", "", page)
    return unescape(re.sub(r"<[^>]*>", "\n", page))


def test_the_japanese_page_has_no_english_sentence(facts):
    word_counts = dataclasses.replace(
        facts, file="c.json", unit="word", tokenizer=said("only_words")
    )
    plans = [
        plan("b200", money_usd=25_000, gpus=8, serve_tokens=1e12),
        plan("h100", gpu_hours=300, unique_tokens=1e9, law="hoffmann"),
        plan("a100", target_loss_nats=2.6, price_usd=2.0),
        plan("mi300x", flops=1e21, law="muennighoff", gpus=1),
        plan("h100", gpu_hours=100, speeds=read_speeds("fp8=1.3")),
    ]
    for number, one in enumerate(plans):
        page = render_plan(one, facts=word_counts if number % 2 else None, language="ja")
        text = visible(page)
        laws = map(load_law, ("floating", "muennighoff", "inference", one.law.law.name))
        sources = [text for law in laws for text in (law.source, law.formula)]
        sources += [option.speed.source for option in one.options]
        sources += [one.gpu.name, one.gpu.price_source]
        for source in sorted(filter(None, sources), key=len, reverse=True):
            text = text.replace(source, "")
        text = re.sub(r"law [a-z]+", "", text)
        assert re.findall(r"[A-Za-z]{2,}[ ,]+[a-z]{2,}[ ,]+[a-z]{2,}", text) == []
        english = {text for text in TEXTS["en"].values() if re.fullmatch(r"[A-Za-z ]{5,}", text)}
        lines = {line.strip() for line in text.split("\n")}
        assert lines & english == set()


def test_sentences_of_plans_exist_in_both_languages():
    assert SENTENCES["en"].keys() == SENTENCES["ja"].keys()
    fields = {
        lang: {key: set(re.findall(r"\{(\w+)", text)) for key, text in SENTENCES[lang].items()}
        for lang in ("en", "ja")
    }
    # English alone has a plural.
    assert fields["en"].pop("memory") - {"gpus"} == fields["ja"].pop("memory")
    assert fields["en"] == fields["ja"]
    for name in law_names(*LOSS_KINDS):
        law = load_law(name)
        assert bool(law.warning) == bool(law.warning_ja)
    for name in ("muennighoff", "floating", "inference"):
        assert load_law(name).note().japanese != load_law(name).note()


def test_japanese_page_in_a_browser(made, facts, tmp_path):
    path = write_plan(made, tmp_path / "ja.html", facts=facts, language="ja")
    seen = browser.measure(path, tmp_path, width=1200)
    assert seen["messages"] == []
    assert seen["scroll"] <= seen["window"]
    for plot in seen["plots"]:
        assert plot["touching"] == []
        assert plot["outside"] == []
