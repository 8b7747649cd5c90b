"""Shows tables in a notebook, and sizes in bytes."""

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from adapters_jax.texts import visible

# All colours are the page's own, so that a table is readable on light and dark pages.
_TABLE = "border-collapse: collapse; color: inherit; background: none; margin: 0.5em 0"
_CELL = "padding: 0.2em 0.7em; vertical-align: top; color: inherit; background: none"
_LINE = "border-bottom: 1px solid rgba(128, 128, 128, 0.4)"


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, notes: Iterable[str] = ()
) -> str:
    """A table in HTML, for `_repr_html_`; it scrolls in itself where it is wider than the page.

    The keyboard reaches it, so that it can be scrolled without a mouse.

    Args:
        header: the names of the columns.
        rows: the cells, any texts: tags in them are shown, and so are control characters.
        words: how many of the first columns are words; the others are numbers.
        notes: lines below the table.

    Example:
        >>> table = html_table(["label", "n"], [["<img src=x>", "2"]], notes=["two rows"])
        >>> "&lt;img src=x&gt;" in table, table.count("<td"), table.endswith("two rows</div></div>")
        (True, 2, True)
    """
    page = ElementTree.Element("div", style="overflow-x: auto; max-width: 100%", tabindex="0")
    table = ElementTree.SubElement(page, "table", style=_TABLE)
    head = ElementTree.SubElement(ElementTree.SubElement(table, "thead"), "tr")
    for i, name in enumerate(header):
        _cell(head, "th", name, i < words)
    body = ElementTree.SubElement(table, "tbody")
    for row in rows:
        line = ElementTree.SubElement(body, "tr")
        for i, text in enumerate(row):
            _cell(line, "td", text, i < words)
    for note in notes:
        ElementTree.SubElement(page, "div").text = visible(note)
    return ElementTree.tostring(page, encoding="unicode", method="html")


def _cell(row: ElementTree.Element, tag: str, text: str, is_word: bool) -> None:
    where = "left" if is_word else "right; white-space: nowrap"
    style = f"{_CELL}; {_LINE}; text-align: {where}"
    ElementTree.SubElement(row, tag, style=style).text = visible(text)


def bytes_text(n: float) -> str:
    """A number of bytes with its unit, in powers of 1024.

    Example:
        >>> bytes_text(1536)
        '1.5 KiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(n, 1), 1024)), len(units) - 1)
    return f"{n / 1024**power:.1f} {units[power]}" if power else f"{n} B"
