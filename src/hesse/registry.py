"""Registries: named objects of one kind, to which other packages add their own.

A package adds its entries from a module that its metadata names under the entry point group `hesse.methods`. Such
modules are imported when a registry is listed, or asked for a name that it does not have yet.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from hesse.errors import OptionError, printable

ENTRY_POINTS = "hesse.methods"
Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A mapping from names to entries of one kind, in the order of registration.

    `entries` are there from the start. `modules` register the entries of this package when they are imported, which
    happens on first use: so an entry can live on a higher floor than its registry.
    """

    def __init__(self, kind: str, modules: tuple[str, ...] = (), entries: Mapping[str, Entry] | None = None) -> None:
        self.kind = kind
        self._entries = dict(entries or {})
        self._modules = modules

    def register(self, name: str, entry: Entry) -> Entry:
        """Add an entry and return it.

        Raises:
            OptionError: the name is taken.
        """
        if not any(map(_is_being_imported, self._modules)):  # else it is one of these that registers
            self._import_modules()
        if name in self._entries:
            raise OptionError(f"there is already a {self.kind} {name!r}: choose another name")
        self._entries[name] = entry
        return entry

    def find(self, name: str) -> Entry:
        """Return the entry of that name.

        Raises:
            OptionError: there is none; the message lists all names.
        """
        if name not in self:
            raise OptionError(f"there is no {self.kind} {name!r}; there are {', '.join(self)}")
        return self[name]

    def __getitem__(self, name: str) -> Entry:
        self._import_modules()
        if name not in self._entries:
            import_packages()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._import_modules()
        import_packages()
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _import_modules(self) -> None:
        modules, self._modules = self._modules, ()
        for module in modules:
            import_module(module)


class _Packages:
    """Installed packages that add entries; imported once."""

    imported = False


def import_packages() -> None:
    """Import what installed packages name under the entry point group, once.

    A package that fails is reported in one line of the log, and the others are imported nevertheless.
    """
    if _Packages.imported:
        return
    _Packages.imported = True
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (_package(point), point.name)):
        try:
            point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a module of somebody else raises, even SystemExit
            message = " ".join(str(error).split()) or "no message"
            line = f"the package {_package(point)} could not add its methods: {type(error).__name__}: {message}"
            logging.getLogger("hesse").warning("%s", printable(line))


def _package(point: EntryPoint) -> str:
    return point.value if point.dist is None else point.dist.name


def _is_being_imported(module: str) -> bool:
    """True from when the import of a module begins until it ends."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
