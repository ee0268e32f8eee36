"""What every page is made of: the file, the document around the content, a card for a figure."""

from pathlib import Path

from halfulp.errors import RunError
from halfulp.report.html import Child, Markup, escape, tag
from halfulp.report.style import CSS


def claim(out: str | Path, *, force: bool = False) -> Path:
    """`out` as a path where a page may be written; RunError if it exists without `force`."""
    out = Path(out)
    if out.is_dir() or (out.exists() and not force):
        cure = "Name a file." if out.is_dir() else "Give another name, or --force (force=True)."
        raise RunError(f"the report is to be written to {out}, which exists. {cure}")
    return out


def save(text: str, out: Path) -> Path:
    """Write `text` to `out`, whole or not at all; RunError if that is not possible."""
    waiting = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        waiting.write_text(text, encoding="utf-8")
        waiting.replace(out)
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {out}: {error.strerror or error}. Give another place."
        ) from error
    return out


def document(title: str, body: Markup, *, style: str = "", language: str = "en") -> str:
    """The page around `body`: no script, nothing from elsewhere; `style` adds to the sheet."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", f"{title} · halfulp"),
        tag("style", Markup(CSS + style)),
    )
    html = tag("html", head, "\n", tag("body", body), lang=language)
    return f"<!DOCTYPE html>\n{html}\n"


def figure_card(drawing: Markup, *caption: Child) -> Markup:
    """A card with a drawing that scrolls sideways, and its caption."""
    inside = tag("div", drawing, class_="scroll")
    return tag("figure", inside, tag("figcaption", *caption), class_="card")
