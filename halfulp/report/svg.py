"""matplotlib figures as inline SVG: real text, colors from CSS, same bytes for the same input."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from halfulp.report.html import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Drawn with these colors, shown with the CSS variable, so that the page's theme decides.
INK, MUTED, LINE, CARD = "#1c2126", "#66707a", "#dde1e5", "#fefefe"
# Okabe and Ito's palette without its yellow, the strongest on white first.
SERIES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
THEME = {INK: "ink", MUTED: "muted", LINE: "line", CARD: "card"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES)
}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5)))

_SHORTER = re.compile(r"(\d+\.\d{2})\d+")

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "halfulp",
    "svg.image_inline": True,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 1.0,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.major.size": 4.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "ytick.major.pad": 6.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "butt",
    "lines.scale_dashes": True,
}


def series_style(index: int) -> tuple[str, object]:
    """Color and dash of the `index`-th line: colors first, then other dashes, never only color."""
    return SERIES[index % len(SERIES)], DASHES[(index // len(SERIES) + index) % len(DASHES)]


def plain_decades(axis: "Axis") -> None:
    """Plain numbers at the powers of ten of a logarithmic axis: formulas are not drawn here."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def spell(value: float, _: object) -> str:
        return f"{value:,.0f}" if 1 <= value < 1e7 else f"{value:g}"

    axis.set_major_formatter(FuncFormatter(spell))
    axis.set_minor_formatter(NullFormatter())


@contextlib.contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure of `width` × `height` CSS pixels in the report's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def render(figure: "Figure", name: str, description: str) -> Markup:
    """The figure as an <svg> element whose ids begin with `name`; `description` is its text."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _own_fonts():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    opening, inner = body[: body.index(">") + 1], body[body.index(">") + 1 :]
    found = re.search(r'viewBox="([^"]*)"', opening)
    assert found is not None
    view = found[1]
    inner = _compact(_theme(_identify(inner, name)))
    title = f'<title id="{name}-title">{escape(description)}</title>'
    return Markup(
        f'<svg class="plot" role="img" aria-labelledby="{name}-title" viewBox="{view}" '
        f'style="min-width:{_width(view)}px">{title}{inner.strip()}'
    )


def standalone(figure: "Figure") -> str:
    """The figure as the text of an SVG file of its own: on white, with its own colors."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _own_fonts():
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor="white")
    return buffer.getvalue()


@contextlib.contextmanager
def _own_fonts() -> Iterator[None]:
    """No warnings of glyphs that a font lacks: the browser draws the text with its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _width(view: str) -> int:
    return min(720, round(float(view.split()[2])))


def _identify(svg: str, name: str) -> str:
    """Drop ids that nothing refers to; give the others the figure's name."""
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', svg)


def _theme(svg: str) -> str:
    """Colors as CSS variables; the page's font instead of matplotlib's."""
    for color, variable in THEME.items():
        svg = re.sub(rf"{color}\b", f"var(--{variable})", svg, flags=re.IGNORECASE)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", _font, svg)
    return re.sub(r"font-family: [^;\"]*;? ?", "", svg)


def _font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match[1])
    bold = "font-weight: 600; " if "bold" in match[1] or "700" in match[1] else ""
    return f"{bold}font-size: {size[0] if size else '12px'}"


def _compact(svg: str) -> str:
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Only coordinates are shortened: a factor in `transform` or a number in a text must stay.
    svg = re.sub(r' (?:d|x|y|points)="[^"]*"', lambda m: _SHORTER.sub(r"\1", m[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
