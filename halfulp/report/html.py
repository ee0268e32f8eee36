"""HTML from Python calls; every string is escaped unless it is Markup already."""

import unicodedata
from html import escape as _escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None


def printable(text: object) -> str:
    """`text` with "�" for everything invisible that could rearrange or break it.

    That is control and format characters (also those that turn the writing direction), private
    ones and half surrogates; line breaks stay.
    """
    invisible = ("Cc", "Cf", "Cs", "Co", "Cn")
    return "".join(
        "\ufffd" if c != "\n" and unicodedata.category(c) in invisible else c for c in str(text)
    )


def escape(text: object) -> str:
    """`text` safe inside an element or a quoted attribute."""
    return _escape(printable(text), quote=True)


def tag(name: str, *children: Child, **attributes: str | None) -> Markup:
    """An element; a trailing _ is cut from attribute names, other _ become -, None leaves out."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{pairs}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """The children one after another; None is nothing."""
    parts = (c if isinstance(c, Markup) else escape(c) for c in children if c is not None)
    return Markup("".join(parts))


def table(
    head: list[Child],
    rows: list[list[Child]],
    *,
    numeric: frozenset[int] = frozenset(),
    caption: str,
) -> Markup:
    """A table with a hidden caption; columns in `numeric` align right, the first is a header."""

    def cell(i: int, child: Child) -> Markup:
        kind = "number" if i in numeric else None
        return tag("td", child, class_=kind) if i else tag("th", child, scope="row")

    header = [
        tag("th", child, scope="col", class_="number" if i in numeric else None)
        for i, child in enumerate(head)
    ]
    body = [tag("tr", *(cell(i, child) for i, child in enumerate(row))) for row in rows]
    inside = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *header)),
        tag("tbody", *body),
    )
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)
