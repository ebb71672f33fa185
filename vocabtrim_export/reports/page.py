"""A report as one HTML page that needs no network, no fonts and no other files."""

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vocabtrim_export.reports.charts import draw
from vocabtrim_export.reports.gather import ExportReport
from vocabtrim_export.reports.sections import key_figures, sections


def to_html(report: ExportReport) -> str:
    """Returns the page. All text is escaped, and its policy lets a browser run the page's own script alone."""
    loader = PackageLoader("vocabtrim_export.reports", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    style, script = (loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    return environment.get_template("page.html.jinja").render(
        title=f"Export {report.name}",
        key_figures=key_figures(report),
        sections=sections(report),
        draw=draw,
        style=Markup(style),
        script=Markup(script),
        style_digest=_digest(style),
        script_digest=_digest(script),
    )


def _digest(text: str) -> str:
    """Returns the digest of an inline style or script in the form that a content security policy uses."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
