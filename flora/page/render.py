"""Sections -> one HTML file. Texts are escaped by the template, plots travel as JSON without a `<`, and the page's own policy lets
its two scripts run by their digests and nothing else: no other script, no request.
"""
import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flora.page.gather import Series
from flora.page.parts import Section, widths
from flora.plots import COLOURS

MARK = '<meta name="generator" content="flora report">'
DARK = ("#4FA8E0", "#F58A4B", "#2FC79E", "#E3A0C8", "#F3BF55", "#8FD0F5", "#B5B5B5")     # the same hues, light enough on dark
# The shapes of style.MARKS, in a box of 22 by 10.
SHAPES = ("M7 5a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M7.5 1.5h7v7h-7z", "M11 0l5 5l-5 5l-5 -5z", "M11 0.5l4.8 8.5h-9.6z",
          "M7.5 3l2 -2l1.5 2l1.5 -2l2 2l-2 2l2 2l-2 2l-1.5 -2l-1.5 2l-2 -2l2 -2z",
          "M11 0l1.3 3.6h3.7l-3 2.2l1.1 3.7l-3.1 -2.3l-3.1 2.3l1.1 -3.7l-3 -2.2h3.7z", "M11 9.5l4.8 -8.5h-9.6z")
HERE = Path(__file__).parent


def page(series: Sequence[Series], parts: Sequence[Section]) -> str:
    """The whole page as text."""
    figures = {f"{part.key}-{n}": json.loads(plot.figure.to_json()) for part in parts for n, plot in enumerate(part.plots)}
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html.j2").render(
        mark=Markup(MARK), shapes=[Markup(f'<path d="{path}" fill="currentColor"/>') for path in SHAPES],
        policy=_policy(scripts), css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts], series=series, parts=parts, widths=widths, light=COLOURS, dark=DARK,
        data=Markup(_inert({"figures": figures, "light": COLOURS, "dark": DARK})), title=_title(series),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))


def _title(series: Sequence[Series]) -> str:
    names = [one.name for one in series]
    return names[0] if len(names) == 1 else f"{', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _inert(value: Mapping[str, Any]) -> str:
    """JSON that ends no script element, whatever its texts are."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: Sequence[str]) -> str:
    """What the page may do: these scripts by digest, styles of its own, images that it holds itself."""
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return (f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
            "form-action 'none'")
