"""Shows texts of unknown origin: on a terminal, in JSON and in Markdown, where they change nothing.

A terminal obeys control characters, and marks of the direction of writing reorder a line; Markdown
and HTML have tags and links. Labels, file names and generated texts may hold all of these.
"""

import re

# Controls but for \t and \n, marks of direction, separators of lines, halves of characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def visible(text: str, lines: bool = True) -> str:
    r"""The text with control characters and marks of direction written out.

    They become `\uXXXX`, which JSON reads as the same character.

    Args:
        text: any text.
        lines: whether tabs and ends of lines stay; otherwise they become `\t` and `\n`.

    Example:
        >>> print(visible("a\x1b[2Jb\u202ec"))
        a\u001b[2Jb\u202ec
    """
    shown = HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown if lines else shown.replace("\t", "\\t").replace("\n", "\\n")


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
