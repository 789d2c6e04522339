"""The Jinja2 environment of all HTML pages. Style sheets and scripts are inlined, so each page is one file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def get_template(name: str) -> Template:
    """A template of reports/templates.

    Every value is escaped, and an undefined value is an error. In templates, `source("page.css")` inserts a file of the
    same folder unescaped, and the filter `tojson` gives JSON that cannot end a script element, and raises an error for
    NaN.
    """
    return _environment.get_template(name)


def _source(name: str) -> Markup:
    """The text of a style sheet or a script. It is not parsed as a template."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


_environment = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.globals["source"] = _source
_environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
