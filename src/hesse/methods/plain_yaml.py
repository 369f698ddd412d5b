"""Read YAML as plain data: the subset that recipes need, without objects or expensive constructs."""

from pathlib import Path
from typing import Any

import yaml

from hesse.errors import OptionError, reason

LARGEST = 1 << 22  # bytes: a rule for each of ten thousand layers
DEEPEST = 20  # levels; a recipe has seven


class _Loader(yaml.SafeLoader):
    """Loader that refuses duplicate keys, of which YAML would keep the last."""

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
    """Read the content of the YAML file `path`.

    Raises:
        OptionError: the file is missing, too large or not YAML, or has aliases, tags, duplicate keys or deep nesting.
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
    """Refuse aliases, which merge keys multiply, and deep nesting, which needs recursion."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise OptionError(f"the recipe {path} has the alias *{event.anchor}: write out its value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise OptionError(f"the recipe {path} is nested more than {DEEPEST} levels deep, but a recipe has seven")
