"""A headless Chromium that opens one file and nothing else."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run --hide-scrollbars "
    "--enable-logging=stderr"
)

# Boxes of the figures and of their texts, and texts that lie on one another, into the page's DOM.
_PROBE = """
<script>
const plots = [...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(
    t => [t.textContent, t.getBoundingClientRect()]);
  const touching = [], outside = [];
  texts.forEach(([a, p], i) => {
    if (p.left < box.left - 1 || p.right > box.right + 1 || p.top < box.top - 1 ||
        p.bottom > box.bottom + 1) outside.push(a);
    texts.slice(i + 1).forEach(([b, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      // Line boxes are taller than letters: neighbors may share a few pixels of air.
      if (wide > 1 && high > 0.3 * Math.min(p.height, q.height)) touching.push([a, b]);
    });
  });
  return {width: box.width, height: box.height, texts: texts.length, touching, outside};
});
const probe = document.createElement("pre");
probe.id = "probe";
probe.textContent = JSON.stringify({
  plots, scroll: document.documentElement.scrollWidth, window: innerWidth,
  scripts: document.scripts.length, images: document.images.length});
document.body.append(probe);
</script>
"""


def find() -> str:
    """The browser's path; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium found: install chromium to check the page in a browser")
    return found


def open_page(page: Path, *options: str, width: int = 1280, height: int = 2400) -> tuple[str, str]:
    """What Chromium prints, and what it logs while it opens `page`."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *(find(), *_FLAGS.split(), f"--user-data-dir={profile}"),
                *(f"--window-size={width},{height}", *options, page.resolve().as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    return done.stdout, done.stderr


def messages(log: str) -> list[str]:
    """The console messages in Chromium's log."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def measure(page: Path, folder: Path, *, width: int = 1280) -> dict:
    """Sizes and overlaps in a copy of `page` whose policy lets a probe run."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = folder / f"probe-{width}.html"
    copy.write_text(text.replace("</body>", f"{_PROBE}</body>"))
    dom, log = open_page(copy, "--dump-dom", width=width)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    return {**json.loads(unescape(found[1])), "messages": messages(log)}
