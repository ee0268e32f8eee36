import json

import synthetic
from test_page import HOSTILE, Page

from halfulp.report import write_report

BEGIN = {"emb": 1.0, "qk": 1.0}
LATER = {"emb": 10.0, "qk": 7.94, "norm": 1.0}


def test_every_change_of_ratios_is_a_row_with_its_reason(tmp_path):
    runs = [synthetic.write_run(tmp_path / name, "fp32") for name in ("with", "without")]
    with (runs[0] / "events.jsonl").open("a", encoding="utf-8") as file:
        for step, ratios, why in ((1, BEGIN, "one rate"), (1200, LATER, f"measured {HOSTILE}")):
            event = {"event": "lr_ratios", "step": step, "ratios": ratios, "why": why}
            file.write(json.dumps(event) + "\n")
    page = write_report(runs, tmp_path / "report.html")
    text = Page(page).text
    assert "Learning rates per block" in text
    assert text.count("Ratios of ") == 1
    for shown in ("1,200", "7.94", "one rate", "<script>alert(1)", "–"):
        assert shown in text, shown
    assert "<script>" not in page.read_text(encoding="utf-8")


def test_runs_at_one_rate_have_no_such_section(tmp_path):
    run = synthetic.write_run(tmp_path / "run", "fp32")
    assert "Learning rates per block" not in Page(write_report([run], tmp_path / "r.html")).text
