"""Pages that need nothing but themselves: the style is in them, and so are the pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

_NUMBER = ' class="number"'


def page(title: str, sections: Mapping[str, str]) -> str:
    """A whole page.

    Args:
        title: in words; it is escaped.
        sections: their headings with what is below, which is HTML already.
    """
    body = "".join(f"<h2>{html.escape(name)}</h2>{part}" for name, part in sections.items())
    return _PAGE.format(title=html.escape(title), body=body)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table that scrolls sideways on a narrow page; its first columns are words.

    Example:
        >>> "<td>a &amp; b</td>" in table(["x", "y"], [["a & b", "1"]])
        True
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        parts = [
            f"<{tag}{'' if i < words else _NUMBER}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    kind = ' class="broad"' if len(header) > 5 else ""
    found = f"<table{kind}><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{found}</div>'


def paragraph(text: str) -> str:
    """Words, escaped."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Lines of code, escaped."""
    return f'<pre class="wide"><code>{html.escape(text)}</code></pre>'


def picture(path: Path, words: str) -> str:
    """A PNG, inside the page; `words` say what it shows."""
    inside = base64.b64encode(path.read_bytes()).decode()
    shown = f'<img alt="{html.escape(words)}" src="data:image/png;base64,{inside}">'
    return f'<div class="wide">{shown}</div>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff;
  max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
  border-bottom: 1px solid #e3e3e3; }}
th {{ border-bottom: 2px solid #1c1e21; vertical-align: bottom; }}
.broad {{ min-width: 50rem; }}
.broad td:first-child {{ white-space: nowrap; }}
td:last-child {{ overflow-wrap: anywhere; }}
.number {{ text-align: right; }}
td.number {{ white-space: nowrap; }}
img {{ width: 100%; min-width: 36rem; height: auto; }}
pre {{ background: #f5f6f7; padding: .8rem; border-radius: .3rem; font-size: .88rem; }}
p {{ margin: .6rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
