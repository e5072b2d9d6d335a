"""Hook of MkDocs: a page that loads a script, a style, a font or a picture from another site is an error."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?P<url>(?:https?:)?//[^\"'\s>]+)"
)


def on_post_page(output: str, page: Page, config: Any) -> str:
    """Refuse a page that loads something.

    Raises:
        PluginError: Names the page and the address.
    """
    for loaded in _LOADED.finditer(output):
        raise PluginError(f"{page.file.src_uri} loads {loaded['url']}; keep a copy of it in docs/")
    return output
