"""The file of the page: what it may load, and that no text ends the element that it is in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files

import pytest

from fxquant.inspect.page.build import json_for_html, page_html

HOSTILE = "</script><script>alert(1)</script> <!-- & \u2028 \u2029 {{data}} ]]>"


class TestJson:
    def test_nothing_in_it_can_end_a_script_element(self):
        text = json_for_html({HOSTILE: [HOSTILE, 1.5, None]})
        assert not set("<>&\u2028\u2029") & set(text)
        assert json.loads(text) == {HOSTILE: [HOSTILE, 1.5, None]}

    def test_numbers_that_are_not_json_are_refused(self):
        with pytest.raises(ValueError, match="JSON compliant"):
            json_for_html([float("nan")])


class TestPage:
    def test_is_filled_in_one_walk(self):
        text = page_html({"models": [], "what": HOSTILE}, HOSTILE)
        assert text.count("alert(1)") == 2  # In the title and in the data, and nowhere twice.
        assert "<title>&lt;/script&gt;" in text
        found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
        assert found is not None and json.loads(found[1])["what"] == HOSTILE

    def test_policy_allows_the_scripts_of_the_file_only(self):
        text = page_html({}, "x")
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
        assert policy is not None and policy[1].startswith("default-src 'none'")
        allowed = set(re.findall(r"'sha256-([^']+)'", policy[1]))
        scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
        assert len(scripts) == 14 and digests == allowed

    def test_loads_nothing(self):
        text = page_html({}, "x")
        assert not re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=|<link|@import|url\(", text)
        assert "fetch(" not in text and "XMLHttpRequest" not in text

    def test_holds_the_licences_of_the_libraries(self):
        text = page_html({}, "x")
        assert "Copyright (c) 2012-2014 Chris Pettitt" in text
        assert "Copyright (c) 2022 Leon Sorokin" in text


_MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"


def test_our_scripts_write_text_and_never_markup():
    folder = files("fxquant.inspect.page").joinpath("assets")
    scripts = [entry for entry in folder.iterdir() if entry.name.endswith(".js")]
    assert len(scripts) == 12
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert not re.search(_MARKUP, text), script
        assert text.startswith("'use strict';\n//"), script
        assert len(text.splitlines()) < 400, script
