"""YAML as plain data: what a recipe needs of it, and nothing that takes long or makes objects."""

from pathlib import Path
from typing import Any

import yaml

from hesse.errors import OptionError, reason

LARGEST = 1 << 22  # bytes: a rule for each of ten thousand layers
DEEPEST = 20  # levels; a recipe has seven


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What the YAML file `path` holds.

    Raises:
        OptionError: it is missing, too large or no YAML, or has aliases, tags, a key twice, or too many levels.
    """
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            raise OptionError(f"the recipe {path} has more than {LARGEST:,} bytes: use patterns of layer names")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"the recipe {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    try:
        _check_events(text, path)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise OptionError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # PyYAML's own, for a date that does not exist, a number of thousands of digits, or `!!bool perhaps`
        raise OptionError(f"the recipe {path} holds a value that YAML does not have ({reason(error)})") from None


def _check_events(text: str, path: Path) -> None:
    """Refuse what grows when it is loaded: aliases, which merge keys multiply, and levels, which recursion follows."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise OptionError(f"the recipe {path} has the alias *{event.anchor}: write out what it stands for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise OptionError(f"the recipe {path} is nested more than {DEEPEST} levels deep, and a recipe has seven")
