"""HTML pages, each a single file: the style and the pictures are inside.

The templates in `templates/` escape every value. A value that a template needs and does not get
raises an error.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from adapters_jax.errors import visible


def _shown(value: Any) -> Any:
    """A value of a template: a text with its control characters written out."""
    if type(value) is not str or value.isprintable():  # Markup is HTML already
        return value
    return visible(value)


_TEMPLATES = Environment(
    loader=PackageLoader("adapters_jax.finetune.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_shown,
)


def render(name: str, **values: Any) -> str:
    """Renders a page.

    Args:
        name: name of the template, such as "run" or "comparison".
        **values: the values that the template shows, as plain text; every page has a `title`.

    Raises:
        jinja2.UndefinedError: the template reads a value that is not given.
    """
    return _TEMPLATES.get_template(f"{name}.html.jinja").render(values)
