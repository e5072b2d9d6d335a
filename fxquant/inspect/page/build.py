"""Makes the page: one HTML file of the template, the styles, the scripts, the libraries and the data.

The file loads nothing. A content security policy allows the scripts of this file only, by their digests, so that text
from a model or a plan can never run. Data are in a JSON element, in which the characters that could end it are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_STYLES = ("vendor/uPlot.min.css", "assets/style.css")
_LIBRARIES = {"vendor/dagre.min.js": "vendor/dagre.LICENSE.txt", "vendor/uPlot.min.js": "vendor/uPlot.LICENSE.txt"}
_SCRIPTS = (
    "dom",
    "data",
    "scene",
    "cards",
    "view",
    "details",
    "search",
    "charts",
    "panels",
    "compare",
    "graphtab",
    "app",
)
"""Our own scripts in the order in which they run; they share one scope."""

_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page_html(data: Mapping[str, Any], title: str) -> str:
    """The page as text.

    Args:
        data: What :func:`fxquant.inspect.page.data.page_data` returns.
        title: Title of the document.
    """
    scripts = [_with_licence(library, licence) for library, licence in _LIBRARIES.items()]
    scripts += [_asset(f"assets/{name}.js") for name in _SCRIPTS]
    parts = {
        "policy": _policy(scripts),
        "title": html.escape(title),
        "styles": "\n".join(f"<style>\n{_asset(name)}</style>" for name in _STYLES),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "data": json_for_html(data),
    }
    text, *rest = _asset("assets/page.html").split("{{")  # One walk, so that nothing in the data is a place to fill.
    for piece in rest:
        name, _, after = piece.partition("}}")
        text += parts[name] + after
    return text


def json_for_html(data: Any) -> str:
    """JSON without the characters that have a meaning in HTML or end a line in JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def _policy(scripts: list[str]) -> str:
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:"


def _with_licence(library: str, licence: str) -> str:
    return f"/*!\n{_asset(licence)}\n*/\n{_asset(library)}"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
