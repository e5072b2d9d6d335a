"""Registries of named objects that others may add: passes, recipes, backends and stages of graphs.

Both fxquant and other packages add objects by the entry points ``fxquant.passes``, ``fxquant.recipes``,
``fxquant.backends`` and ``fxquant.stages``. An entry point is imported when its name is first requested, so the core
never imports its plugins. Notebooks and scripts register with a decorator instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from fxquant.errors import DuplicateNameError, PluginError, UnknownNameError

T = TypeVar("T")

OWN = "fxquant."
"""Modules of fxquant itself begin with this."""


class Registry(Generic[T]):
    """A mapping from names to objects of one kind that refuses duplicates and unknown names.

    Args:
        kind: What the objects are, for messages ("pass", "recipe", "backend", "stage").
        group: Entry-point group to load lazily from, or None for a registry that only code fills.
        check: Raises a ConfigurationError for an object that an entry point names and that is not of the kind; it gets
            the name and the object.
    """

    def __init__(self, kind: str, group: str | None = None, check: Callable[[str, Any], None] | None = None) -> None:
        self.kind = kind
        self.group = group
        self._check = check
        self._objects: dict[str, T] = {}
        self._pending: dict[str, EntryPoint] | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under ``name``.

        Raises:
            DuplicateNameError: If the name is taken, by code or by an installed package.
        """

        def decorate(item: T) -> T:
            known = self._objects.get(name)
            entry = self._entries().get(name)
            again = known is not None and _path(known) == _path(item)  # As a cell of a notebook that runs twice does.
            if not again and (known is not None or (entry is not None and not _defines(entry, item))):
                holder = known if known is not None else entry
                raise DuplicateNameError(f"{self.kind} {name!r} is already registered by {holder!r}")
            self._objects[name] = item
            return item

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._objects:
            entry = self._entries().get(name)
            if entry is None:
                raise UnknownNameError(self.kind, name, self)
            try:
                loaded = entry.load()  # Importing may run the decorator, which then has registered the object already.
                if self._check is not None:
                    self._check(name, loaded)
            except (Exception, SystemExit) as error:  # Whatever the code of another package raises.
                if self.module_of(name).startswith(OWN):
                    raise
                package = f" of the package {entry.dist.name}" if entry.dist is not None else ""
                raise PluginError(
                    f"the {self.kind} {name!r}{package} cannot be imported from {entry.value}: "
                    f"{type(error).__name__}: {error}; repair or uninstall the package, or use another {self.kind}"
                ) from error
            self._objects.setdefault(name, loaded)
        return self._objects[name]

    def loaded(self, name: str) -> T | None:
        """The object of a name if it is here already; None if nothing was registered, or no package imported yet."""
        return self._objects.get(name)

    def remove(self, name: str) -> None:
        """Forget an object that code registered; one that an entry point names is loaded again if asked for."""
        del self._objects[name]

    def module_of(self, name: str) -> str:
        """The module in which an object is defined; nothing is imported.

        Raises:
            UnknownNameError: If there is no object of the name.
        """
        if name in self._objects:
            return str(getattr(self._objects[name], "__module__", ""))
        if name not in self._entries():
            raise UnknownNameError(self.kind, name, self)
        return self._entries()[name].module

    def own(self) -> list[str]:
        """Names of the objects that belong to fxquant itself, sorted; without those of other packages and scripts."""
        return [name for name in self if self.module_of(name).startswith(OWN)]

    def __contains__(self, name: object) -> bool:
        return name in self._objects or name in self._entries()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._objects, *self._entries()}))

    def __len__(self) -> int:
        return len({*self._objects, *self._entries()})

    def _entries(self) -> dict[str, EntryPoint]:
        if self._pending is None:
            found: dict[str, EntryPoint] = {}
            for entry in entry_points(group=self.group) if self.group else ():
                other = found.setdefault(entry.name, entry)
                if other.value != entry.value:
                    raise DuplicateNameError(
                        f"two installed packages offer {self.kind} {entry.name!r}: {other.value} and {entry.value}"
                    )
            self._pending = found
        return self._pending


def _path(item: object) -> tuple[str, str] | object:
    """Where an item is defined; for what has no such place, the item itself."""
    found = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    return item if None in found else found


def _defines(entry: EntryPoint, item: object) -> bool:
    """Whether the entry point names ``item`` itself, which is the case if its module is imported and decorates it."""
    module = getattr(item, "__module__", None)
    if hasattr(item, "__qualname__"):
        return (entry.module, entry.attr) == (module, item.__qualname__)
    # An instance does not know the variable that holds it. While its module is imported, the variable is not set yet.
    return module == entry.module and getattr(sys.modules.get(entry.module), entry.attr, item) is item
