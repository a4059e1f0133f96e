"""The page itself: sections in order, written by the template page.html with the style page.css."""

import re
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from onnxqt.html.accuracy import schemes_section, verdict
from onnxqt.html.backends import matrix_section
from onnxqt.html.course import tails_section, training_section
from onnxqt.html.devices import devices_section
from onnxqt.html.layers import layers_section
from onnxqt.html.provenance import provenance_section
from onnxqt.html.source import Run
from onnxqt.html.tensors import tensors_section
from onnxqt.html.text import short, visible
from onnxqt.html.treatment import coverage_section, quantized_section

TEMPLATE, STYLE = "page.html", "page.css"

_SECTIONS = (
    *(schemes_section, matrix_section, training_section, layers_section, tensors_section, tails_section),
    *(quantized_section, coverage_section, devices_section, provenance_section),
)
# A full stop or bracket behind an address is none of it.
_ADDRESS = re.compile(
    r"https?://[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?:[/?#](?:[A-Za-z0-9%&=/?#._~+:@-]*[A-Za-z0-9/])?)?"
)


def make_page(run: Run) -> str:
    """The page of a run: one HTML document that needs no other file; the same run gives the same text.

    Raises:
        UsageError: naming the file and the field, if one holds what it cannot.
    """
    name = run.report.inner("model").text("file")
    digest = run.report.inner("model").text("sha256") or ""
    title = short(name) if name else f"model {short(digest[:12])}"
    template = _environment().get_template(TEMPLATE)
    return template.render(
        title=title,
        verdict=verdict(run),
        notes=run.notes,
        sections=[make(run) for make in _SECTIONS],
        style=Markup(_resource(STYLE)),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["linked"] = linked
    environment.filters["drawn"] = lambda picture: Markup(picture.markup())
    return environment


def _resource(name: str) -> str:
    return (files("onnxqt.html") / name).read_text(encoding="utf-8")


def _finalized(value: object) -> object:
    """Every text with its hidden characters made visible, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def linked(text: str) -> Markup:
    """A text, escaped, in which each address of a web page is a link."""
    text = visible(text)
    parts, at = [], 0
    for found in _ADDRESS.finditer(text):
        link = Markup('<a href="{0}" rel="noopener noreferrer">{0}</a>').format(found.group())
        parts += [escape(text[at : found.start()]), link]
        at = found.end()
    return Markup("").join([*parts, escape(text[at:])])
