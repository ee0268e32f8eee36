import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import browser
import matplotlib.image
import numpy as np
import pytest
import synthetic

from halfulp.errors import RunError
from halfulp.report import findings, write_report
from halfulp.report.html import escape, join, printable, tag
from halfulp.report.strips import colors
from halfulp.report.tables import policy_table

HOSTILE = (
    "\"><script>alert(1)</script><img src=x onerror=alert(2)>'$\\frac{}{$ &amp; \u202e\x1b 日本 🙂"
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="session")
def page(six, tmp_path_factory) -> Path:
    return write_report(six, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")

    def rows(progress, rng):
        made = synthetic.unscaled_rows(progress, rng)
        for row in made["gemms"]:
            row |= {"gemm": HOSTILE, "format": HOSTILE, "operand": row["operand"] + HOSTILE}
            row["block"] = row["block"].replace("layers.0", HOSTILE + "x" * 300)
        return made

    settings = synthetic.config(HOSTILE)
    settings[HOSTILE] = "</style><script>alert(3)</script>"
    paths = [
        synthetic.write_run(root / "fp32", "fp32"),
        synthetic.write_run(
            root / "<b>&", HOSTILE + "x" * 300, rows=rows, settings=settings, nan_at=212, price=0.2
        ),
    ]
    return write_report(paths, root / "report.html", title=HOSTILE)


def test_page_is_small_and_needs_nothing_from_elsewhere(page):
    assert page.stat().st_size < 1_000_000
    parsed = Page(page)
    assert not parsed.tags.keys() & {"script", "iframe", "object", "embed", "base", "form"}
    assert [v for v in parsed.values("src", "href") if not v.startswith(("#", "data:"))] == []
    assert re.findall(r"(?i)https?://|url\((?!#)|@import", page.read_text()) == []
    assert [v for v in parsed.values("content") if "default-src 'none'" in v]


def test_same_runs_give_the_same_bytes_in_another_process(six, page, tmp_path):
    code = "import sys, halfulp.report as r; r.write_report(sys.argv[2:], sys.argv[1])"
    out = tmp_path / "again.html"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MPLCONFIGDIR": str(tmp_path)}
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: path\naxes.grid: False\n")
    arguments = [str(out), *map(str, six)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)
    assert out.read_bytes() == page.read_bytes()


def test_ids_are_unique_and_every_reference_has_its_target(page):
    parsed = Page(page)
    ids = parsed.values("id")
    assert [name for name, n in Counter(ids).items() if n > 1] == []
    text = page.read_text()
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)
    assert set(parsed.values("aria-labelledby")) <= set(ids)


def test_first_screen_holds_headline_verdicts_and_three_numbers(page):
    text = page.read_text()
    assert text.index("<h1>") < text.index('class="numbers"') < text.index("<table>")
    assert text.count("<strong>") == 3
    parsed = Page(page)
    for words in ("Two of five recipes train within 0.01 nats of fp32.", "Pass", "Could not tell"):
        assert words in parsed.text
    assert "fp8_unscaled: +34\u00a0% perplexity" in parsed.text


def test_every_finding_stands_on_the_page(six, page):
    text = Page(page).text
    for finding in findings(six):
        assert finding.sentence in text


def test_figures_have_text_and_theme_colors(page):
    parsed = Page(page)
    assert parsed.tags["svg"] == 4  # losses, lost updates, underflow, saturation
    assert parsed.values("role").count("img") == 4
    svg = "".join(re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL))
    assert "Last values in nats: fp32 2." in svg
    assert not re.findall(r"(?i)(?:fill|stroke): ?#(?!000000)[0-9a-f]{6}", svg)
    for label in ("bf16_weights_sr", "te_current", "nvfp4"):
        assert f">{label}</text>" in svg


def test_one_run_alone_and_empty_runs_make_a_page(six, tmp_path):
    alone = Page(write_report([six[4]], tmp_path / "alone.html"))
    assert alone.tags["svg"] == 3
    assert "its price is unknown" in alone.text
    assert "above its reference" not in alone.text
    empty = synthetic.write_run(tmp_path / "empty", "nvfp4", steps=0, finish=False)
    nothing = Page(write_report([empty], tmp_path / "empty.html"))
    assert nothing.tags["svg"] == 0
    assert "nvfp4 recorded no step." in nothing.text


def test_existing_file_is_not_replaced_without_force(six, tmp_path):
    out = tmp_path / "deep" / "report.html"
    write_report([six[0]], out)
    with pytest.raises(RunError, match="exists"):
        write_report([six[1]], out)
    write_report([six[1]], out, force=True, title="The second")
    assert "The second" in out.read_text()
    with pytest.raises(RunError, match="Name a file"):
        write_report([six[0]], tmp_path, force=True)
    assert list(out.parent.iterdir()) == [out]


def test_hostile_strings_stay_text(hostile):
    parsed = Page(hostile)
    assert not parsed.tags.keys() & {"script", "img", "b><"}
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in parsed.text
    assert "\u202e" not in hostile.read_text()
    assert "\x1b" not in hostile.read_text()


def test_escape():
    assert escape('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    assert (
        tag("p", "<b>", tag("i", "&"), class_='"') == '<p class="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    )
    assert join("<", None, 3) == "&lt;3"
    assert printable("a\x00b\ud800\u200bc\nd\u00a0e") == "a\ufffdb\ufffd\ufffdc\nd\u00a0e"


def test_colors_are_blank_at_zero_and_grow_with_the_share():
    shades = colors(np.array([[np.nan, 0.0, 1e-9, 1e-3, 0.5, 1.0]]), 1e-4)[0]
    assert shades[:2, 3].tolist() == [0, 0]
    assert (np.diff(shades[2:, 3].astype(int)) > 0).all()
    assert shades[-1].tolist() == [0xC4, 0x4A, 0x00, 255]


def test_browser_reports_errors_when_there_are_some(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>nothing()</script>")
    _, log = browser.open_page(bad, "--dump-dom")
    assert browser.messages(log)


def test_browser_opens_the_page_without_a_message(page):
    dom, log = browser.open_page(page, "--dump-dom")
    assert browser.messages(log) == []
    assert dom.count("<svg") == 4


@pytest.mark.parametrize(("name", "width"), [("page", 1280), ("page", 420), ("hostile", 1280)])
def test_figures_have_a_size_and_no_texts_on_one_another(request, tmp_path, name, width):
    seen = browser.measure(request.getfixturevalue(name), tmp_path, width=width)
    assert seen["messages"] == []
    assert seen["scroll"] <= seen["window"]
    assert (seen["scripts"], seen["images"]) == (1, 0)  # the probe, and nothing a string brought
    for plot in seen["plots"]:
        assert plot["width"] >= min(width / 2, 700)
        assert plot["height"] > 100
        assert plot["texts"] > 10
        assert plot["touching"] == []
        assert plot["outside"] == []


@pytest.mark.parametrize(("theme", "scheme"), [("light", 1), ("dark", 0)])
def test_screenshot_shows_the_page_in_both_themes(page, tmp_path, theme, scheme):
    shot = tmp_path / f"{theme}.png"
    browser.open_page(
        page,
        f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={scheme}",
        height=1800,
    )
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (1800, 1280)
    background = np.median(pixels)
    assert background > 0.9 if theme == "light" else background < 0.2
    drawn = np.abs(pixels - np.median(pixels, axis=(0, 1))).max(axis=-1) > 0.25
    assert 0.01 < drawn.mean() < 0.5
    assert all(band.any() for band in np.array_split(drawn, 9))


def test_the_policy_table_names_what_a_hint_left_unquantized():
    summary = {"policy": [["*", "mxfp8", 13]], "unquantized": ["layers.*.experts.down_proj"]}
    record: Any = SimpleNamespace(label="a", summary=summary, stages=(), formats={})
    text = str(policy_table([record]))
    assert "<code>layers.*.experts.down_proj</code> left unquantized by a hint" in text
