"""Texts of others and for people: JSON read with bounds, texts shown without effect, tables.

A terminal obeys control characters, and marks of the direction of writing reorder a line; Markdown
and HTML have tags and links. Labels, file names and generated texts may hold all of these.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from adapters_jax.errors import UserError, shortened, visible

DEEPEST = 32  # nested lists and objects
_TOO_DEEP = f"it is nested more than {DEEPEST} deep"
MOST_DIGITS = 40  # of an integer; transformers writes 10**30 for "no limit"


def parse_json(text: str) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is not JSON; or, as a UserError, it is nested more than 32 deep, or has a
            duplicate key, a number that is not finite or an integer of over 40 digits; or it has
            half a character.

    Example:
        >>> parse_json('{"r": 4, "r": 8}')
        Traceback (most recent call last):
        adapters_jax.errors.UserError: duplicate key 'r'
    """
    try:
        values = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=lambda text: int(text) if len(text) <= MOST_DIGITS else _no_number(text),
            parse_float=lambda text: x if math.isfinite(x := float(text)) else _no_number(text),
            parse_constant=_no_number,
        )
    except RecursionError:  # json stops well above the depth that is allowed here
        raise UserError(_TOO_DEEP) from None
    # Most rows of data have few brackets, and need no walk; brackets in texts only cost one.
    if text.count("[") + text.count("{") > DEEPEST:
        check_nesting(values)
    if "\\u" in text:  # a lone surrogate is valid JSON, but not text
        # UnicodeEncodeError is a ValueError, as documented.
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    return values


def check_nesting(value: Any) -> None:
    """Raises UserError if lists and mappings are nested more than 32 deep, as `parse_json` does."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [x for x in level if isinstance(x, Mapping | list | tuple)]
        level = [y for x in inner for y in (x.values() if isinstance(x, Mapping) else x)]
        if not inner:
            return
    raise UserError(_TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        # json keeps the last of equal keys, and other readers the first.
        keys = [key for key, _ in pairs]
        raise UserError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return values


def _no_number(text: str) -> Any:
    raise UserError(f"{shortened(text, 30)} is not a finite number of at most {MOST_DIGITS} digits")


# Besides Markdown's own characters: GitHub turns @name, https:// and www. into links.
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def markdown(text: str) -> str:
    """The text in a line of Markdown, or in a cell of a table, without tags, links and emphasis.

    Example:
        >>> print(markdown("a|b <img src=x> [c](https://d)"))
        a&#124;b &#60;img src=x&#62; &#91;c&#93;(https&#58;//d)
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", visible(text, lines=False))


def markdown_code(text: str) -> str:
    """The text as code in a line of Markdown.

    Example:
        >>> print(markdown_code("label"), markdown_code("x` <img src=y>"))
        `label` `` x` <img src=y> ``
    """
    shown = visible(text, lines=False)
    fence = _fence(shown, 1)
    space = " " if not shown.strip() or "`" in (shown[0], shown[-1]) or len(fence) > 1 else ""
    return f"{fence}{space}{shown}{space}{fence}"


def markdown_block(code: str, language: str = "") -> str:
    """Lines of code as a block of Markdown."""
    shown = visible(code)
    fence = _fence(shown, 3)
    return f"{fence}{language}\n{shown}\n{fence}"


def _fence(text: str, least: int) -> str:
    """Backticks, more than there are in a row in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


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
    # ElementTree escapes every text and attribute, so that no label becomes a tag.
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
