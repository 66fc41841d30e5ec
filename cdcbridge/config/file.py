"""Read the configuration file as it is written: its values, and the line of each.

This module never accesses anything but that file. It gets the environment variables from its caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from cdcbridge.errors import ConfigError

_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_NAME: Final = re.compile(r"[\w.-]+")
_MERGE: Final = "tag:yaml.org,2002:merge"
Location = tuple[str | int, ...]


@dataclass(slots=True)
class ConfigFile:
    """A configuration file that was read.

    Attributes:
        path: The file.
        values: The values in the file, with variables substituted.
        root: The YAML nodes, which have the line numbers.
        unset: An error message for each variable without a value, for example for `${DB_PASSWORD}`.
    """

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    root: yaml.Node | None = None
    unset: list[str] = field(default_factory=list)

    def line(self, location: Location) -> int | None:
        """Return the line of a key or an element, counted from 1.

        For a missing one, return the line of the mapping or list that should contain it, or None at the top.
        """
        node, line = self.root, None
        for part in location:
            child = _child(node, part)
            if child is None:
                break
            line, node = child[0] + 1, child[1]
        return line

    def where(self, location: Location) -> str:
        """Return the file, line and path of a key, for example `cdcbridge.yaml:12: consumers.billing.mode`."""
        line = self.line(location)
        place = f"{self.path}:{line}" if line is not None else str(self.path)
        return f"{place}: {self.name(location)}"

    def name(self, location: Location) -> str:
        """Return the path inside the file, with a consumer's name instead of its number."""
        parts = [str(part) for part in location]
        consumers = self.values.get("consumers")
        if len(location) > 1 and location[0] == "consumers" and isinstance(consumers, list):
            number = location[1]
            given = consumers[number] if isinstance(number, int) and number < len(consumers) else None
            name = given.get("name") if isinstance(given, dict) else None
            if isinstance(name, str) and _NAME.fullmatch(name) and location[2:] != ("name",):
                parts[1] = name
        return ".".join(parts) or "(top)"


def _child(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """Return the line and the node of an entry, or None if there is no such entry.

    If the key is found twice, the last one counts: keys that `<<` merges are placed before the mapping's own keys.
    """
    if isinstance(node, yaml.MappingNode):
        found = [(key.start_mark.line, value) for key, value in node.value if key.value == str(part)]
        return found[-1] if found else None
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line, node.value[part]
    return None


def read(path: Path, environment: Mapping[str, str]) -> ConfigFile:
    """Read the file and substitute variables in it.

    Args:
        path: The configuration file.
        environment: The variables that `${VAR}` can name.

    Raises:
        ConfigError: The file cannot be read, is not a YAML mapping, or names a variable that is not set.
    """
    file = ConfigFile(path)
    try:
        parsed = _parse(file, path.read_text(encoding="utf-8"))
        if not isinstance(parsed, dict):
            kinds = {list: "a list", str: "a text", type(None): "nothing"}
            found = kinds.get(type(parsed), "a value")
            raise ConfigError(f"{path}: expected a mapping with source, store and consumers, found {found}")
        file.values = parsed
        file.values = _substitute(file, parsed, environment, ())
        if file.unset:
            raise ConfigError("\n".join(file.unset), hint="Set it, or give a default, for example ${NAME:-value}.")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file",
            hint="`cdcbridge init` creates one. Name another with -c FILE or CDCBRIDGE_CONFIG.",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}", hint="Save the file in UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not YAML: {_yaml_words(error)}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # for example for the date 2026-02-30
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return file


def _parse(file: ConfigFile, text: str) -> Any:
    loader = _UniqueKeys(text)
    try:
        file.root = loader.get_single_node()
        return None if file.root is None else loader.construct_document(file.root)
    finally:
        loader.dispose()


_YAML_WORDS: Final = {
    "mapping values are not allowed here": "a colon where none is allowed (quote the value, or check the indentation)",
    "found character '\\t' that cannot start any token": "a tab (indent with spaces)",
    "could not find expected ':'": "a key without its colon",
    "found unexpected end of stream": "a quote or a bracket that is not closed",
    "expected <block end>, but found '-'": "a list that is not indented as its neighbours are",
    "expected <block end>, but found '<block mapping start>'": "a key that is not indented as its neighbours are",
    "expected ',' or ']', but got '<stream end>'": "a bracket that is not closed",
    "expected ',' or '}', but got '<stream end>'": "a brace that is not closed",
}


def _yaml_words(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(str(error.problem or error).split())
    if problem.startswith("expected the node content") and "stream end" in problem:
        return "a bracket or a brace that is not closed"
    return _YAML_WORDS.get(problem, problem)


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key that occurs twice. YAML itself would silently use the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=deep) for key in nodes]
        for number, key in enumerate(keys):
            if keys.index(key) < number:
                mark = nodes[number].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", mark)
        return super().construct_mapping(node, deep=deep)


def _substitute(file: ConfigFile, value: Any, environment: Mapping[str, str], location: Location) -> Any:
    if isinstance(value, dict):
        return {
            _key(file, key, location): _substitute(file, item, environment, (*location, key))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_substitute(file, item, environment, (*location, index)) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = environment.get(name) or default
        if found is None:
            file.unset.append(f"{file.where(location)}: the environment variable {name} is not set")
        return found or ""

    substituted = _VARIABLE.sub(replace, value)
    return substituted if _NO_TEXT.search(substituted) is None else checked_text(substituted, file.where(location))


def _key(file: ConfigFile, key: Any, location: Location) -> str:
    if not isinstance(key, str):
        where = file.where(location) if location else str(file.path)
        raise ConfigError(f"{where}: the key {key!r} is not a text")
    return key if _NO_TEXT.search(key) is None else checked_text(key, file.where(location))


def checked_text(value: str, where: str) -> str:
    r"""Return the text in a form that a server accepts.

    JSON is valid YAML, and can contain a character as a pair of surrogates, for example `"\ud83d\ude00"`. Such a pair
    is joined to one character.

    Args:
        value: The text.
        where: The place of the text, for the error message.

    Raises:
        ConfigError: The text contains NUL or a single surrogate, for example from an environment that is not UTF-8.
    """
    if _NO_TEXT.search(value) is None:
        return value
    try:
        text = value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        wrong = "half a character, such as '\\ud800' or a byte that is not UTF-8"
    else:
        if "\0" not in text:
            return text
        wrong = "a NUL character"
    raise ConfigError(f"{where}: the text has {wrong}", hint="Write characters as they are, and save them in UTF-8.")
