"""The grammar of pipeline text: ``pass{option=value option=value},pass ; pass``.

A value is text without spaces, quotes, commas and braces; or a text in double quotes, written as JSON writes it; or a
list in JSON, ``[1,2]``. An error shows the text with a mark under the character where reading stopped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from rich.cells import cell_len

from fxquant.errors import ConfigurationError, shortened

_NAME = re.compile(r"[\w.-]+")
_KEY = re.compile(r"[^\s=,{}]*")
_BARE = re.compile(r"[^\s}]*")
_PLAIN = re.compile(r'[^\s{},"]*')
_SHOWN = 100  # Characters of a long text that an error shows.
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Value:
    """The text of an option as it was given.

    Attributes:
        text: The text; for a quoted text what stands between the quotes.
        at: Where it begins in the whole text.
        quoted: Whether it was given in quotes.
    """

    text: str
    at: int
    quoted: bool = False


@dataclass(frozen=True)
class Option:
    """One option of a name, ``key=value``; the value is None if the equals sign is missing."""

    key: str
    at: int
    value: Value | None


@dataclass(frozen=True)
class Item:
    """A name with its options."""

    name: str
    at: int
    options: list[Option] = field(default_factory=list)


def point_at(text: str, at: int, what: str) -> str:
    """Two lines that show a text and a mark with a message under one of its characters.

    Args:
        text: The whole text; of a long one, the part around the character is shown.
        at: Position of the character.
        what: The message.
    """
    # Control characters would move what follows, or change colours.
    text = "".join(" " if char.isspace() else char if char.isprintable() else "?" for char in text)
    start = max(0, min(at - _SHOWN // 2, len(text) - _SHOWN))
    stop = start + _SHOWN
    before, after = "..." * (start > 0), "..." * (stop < len(text))
    return f"  {before}{text[start:stop]}{after}\n  {' ' * (len(before) + cell_len(text[start:at]))}^ {what}"


def is_plain(text: str) -> bool:
    """Whether a text can be an option without quotes."""
    return _PLAIN.fullmatch(text) is not None


def quoted(text: str) -> str:
    """A text in double quotes."""
    return json.dumps(text, ensure_ascii=False)


class Reader:
    """Reads items from a text.

    Args:
        text: The text.
        kind: Kind of the named objects, for messages: ``pass`` or ``backend``.
    """

    def __init__(self, text: str, kind: str) -> None:
        self.text = text
        self.kind = kind
        self.at = 0

    def error(self, at: int, what: str, message: str | None = None) -> ConfigurationError:
        """An error that points at a character.

        Args:
            at: Position of the character.
            what: What is wrong there, for the mark.
            message: The first line; by default it says that the text is not such an object.
        """
        kind = self.kind
        message = (
            message
            or f"{shortened(self.text.strip())!r} is not a {kind}; write name or name{{option=value option=value}}"
        )
        return ConfigurationError(f"{message}\n{point_at(self.text, at, what)}")

    def items(self, end: str = "") -> list[Item]:
        """Items separated by commas, up to a character of ``end`` or the end of the text; empty ones are left out."""
        found = []
        while True:
            self._skip_spaces()
            if self._next not in ("", ",", *end):
                found.append(self.item())
                self._skip_spaces()
            if self._next == ",":
                self.at += 1
            elif self._next in ("", *end):
                return found
            else:
                raise self.error(self.at, "a comma should come here, or the end")

    def single(self) -> Item:
        """The only item of the text."""
        self._skip_spaces()
        found = self.item()
        self._skip_spaces()
        if self._next:
            raise self.error(self.at, "the text should end here")
        return found

    def item(self) -> Item:
        """The item that begins here."""
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise self.error(self.at, f"the name of a {self.kind} should come here")
        item = Item(match[0], self.at)
        self.at = match.end()
        if self._next != "{":
            return item
        opened, self.at = self.at, self.at + 1
        while True:
            self._skip_spaces()
            if not self._next:
                raise self.error(opened, "this brace is not closed")
            if self._next == "}":
                self.at += 1
                return item
            item.options.append(self._option())

    def _option(self) -> Option:
        match = _KEY.match(self.text, self.at)
        assert match is not None
        key, at = match[0], self.at
        self.at = match.end()
        if not key or not (self._next in ("", "=", "}") or self._next.isspace()):
            raise self.error(self.at, "option=value should come here")
        if self._next != "=":
            return Option(key, at, None)
        self.at += 1
        return Option(key, at, self._value())

    def _value(self) -> Value:
        at = self.at
        if self.text.startswith(('"', "["), at):
            try:
                value, end = _DECODER.raw_decode(self.text, at)
            except (ValueError, RecursionError) as error:
                if not isinstance(error, json.JSONDecodeError):  # A very long number, or very many brackets.
                    raise self.error(at, f"this list cannot be read: {str(error).partition(';')[0]}") from None
                if self.text[at] == '"':
                    where = at if "Unterminated" in error.msg else error.pos
                    raise self.error(where, f"this text in quotes cannot be read: {error.msg}") from None
            else:
                if end == len(self.text) or self.text[end] in "}" or self.text[end].isspace():
                    self.at = end
                    is_text = isinstance(value, str)
                    return Value(value if is_text else self.text[at:end], at, is_text)
                if self.text[at] == '"':
                    raise self.error(end, "a space or } should come after the quotes")
        match = _BARE.match(self.text, at)
        assert match is not None
        self.at = match.end()
        return Value(match[0], at)

    @property
    def _next(self) -> str:
        """The character that comes next, empty at the end of the text."""
        return self.text[self.at : self.at + 1]

    def _skip_spaces(self) -> None:
        while self._next.isspace():
            self.at += 1
