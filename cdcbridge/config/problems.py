"""Turn validation errors into this program's own messages: the file's line, the given value, the allowed values.

Pydantic reports which check failed. Its own wording is never shown for a known kind of error. This module reads the
names of environment variables, and never accesses a file or a database.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, get_args

from pydantic import BaseModel, SecretStr

from cdcbridge.config.file import ConfigFile, Location
from cdcbridge.words import as_given, did_you_mean, one_of

# Keys that hold secrets wherever they are, also in places that no model describes.
_SECRET_KEYS: Final = frozenset({"secret", "token", "tokens", "password", "urls", "url", "credentials", "headers"})
_HIDDEN: Final = object()  # stands for a value that may contain a secret
_CHOICE: Final = re.compile(r"'([^']*)'")
# The meaning of the patterns in this package's models, by the last key of the path.
_FORMS: Final = {
    "name": "write a-z, 0-9, _ . and -, at most 63 of them, first a letter or a digit",
    "slot": "write a-z, 0-9 and _, at most 63 of them",
    "publication": "write a-z, 0-9 and _, at most 63 of them, first no digit",
    "schema": "write a-z, 0-9 and _, at most 54 of them, first no digit",
    "listen": "write host:port, as in 127.0.0.1:9187",
}
_KINDS: Final = {
    "string": "a text (put it in quotes)",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list, as in [a, b]",
    "list": "a list, as in [a, b]",
    "dict": "keys with values, as in {key: value}",
    "model": "keys with values, as in {key: value}",
}
_BOUNDS: Final = {
    "greater_than_equal": ("ge", "at least {}"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
}


def describe(file: ConfigFile, model: type[BaseModel], problems: Iterable[Any]) -> list[str]:
    """Return one line for each problem, in the order of the file.

    If a value fits no member of a union, pydantic reports a problem for each member. These make one line.

    Args:
        file: The file that was read.
        model: The model that refused the file's values.
        problems: The errors of pydantic's ValidationError.
    """
    lines: dict[Location, list[Any]] = {}
    for problem in problems:
        location = _location(file.values, model, tuple(problem["loc"]))
        lines.setdefault((*location, "\0value") if problem["type"] == "value_error" else location, []).append(problem)
    ordered = sorted(lines.items(), key=lambda item: file.line(_real(item[0])) or 0)
    described = [(at := _real(location), _text(model, at, _hide(model, at, found))) for location, found in ordered]
    return [f"{_where(file, at)}: {text}" for at, text in described]


def _real(location: Location) -> Location:
    return location[:-1] if location and location[-1] == "\0value" else location


def _location(values: Any, model: Any, loc: Location) -> Location:
    """Return the path in the file, without the parts that pydantic adds for the members of a union."""
    found: list[str | int] = []
    for part in loc:
        name = "schema" if part == "schema_" else part
        fields = _fields(model)
        if isinstance(values, list) and isinstance(name, int):
            values, model = (values[name] if name < len(values) else None), _element(model)
        elif isinstance(name, str) and (name in fields or (isinstance(values, dict) and name in values)):
            values = values.get(name) if isinstance(values, dict) else None
            model = fields.get(name)
        else:
            continue
        found.append(name)
    return tuple(found)


def _fields(model: Any) -> dict[str, Any]:
    """Return the keys of a model, each with its type."""
    model = _model(model)
    if model is None:
        return {}
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation, for example `Columns` in `Columns | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model(arg)) is not None), None)


def _element(annotation: Any) -> Any:
    return next((arg for arg in get_args(annotation) if arg is not Ellipsis), None)


def _where(file: ConfigFile, location: Location) -> str:
    """Return the place in the file, or the environment variable that overrides the file."""
    name = f"CDCBRIDGE_{'__'.join(str(part) for part in location)}".upper()
    for given in os.environ:
        if given.upper() == name or (location and name.startswith(f"{given.upper()}__")):
            return f"{file.path}: the environment variable {given}"
    return file.where(location)


def _text(model: type[BaseModel], location: Location, problems: list[Any]) -> str:
    """Return the message for all problems of one place."""
    problem = problems[0]
    kinds = {p["type"] for p in problems}
    if "extra_forbidden" in kinds:
        known = _known(model, location)
        return "unknown key" + (did_you_mean(str(location[-1]), known) or f". Known: {', '.join(known)}")
    if "missing" in kinds:
        return "missing"
    if kinds == {"value_error"}:
        return str(problem["msg"]).removeprefix("Value error, ") + _given_after(problem)
    if len(problems) > 1:
        return _not_one_of(problem, [name for p in problems for name in _allowed(p)])
    if kinds & {"model_type", "model_attributes_type", "dict_type"}:
        return _no_mapping(model, location, problem)
    return _single(location, problem)


def _no_mapping(model: type[BaseModel], location: Location, problem: Any) -> str:
    """Return the message for a value that should be a mapping: with an example and the known keys."""
    known = list(_fields(_annotation(model, location)))
    parent = _model(_annotation(model, location[:-1])) if location else None
    fields = parent.model_fields if parent is not None else {}
    field = next((f for name, f in fields.items() if location and location[-1] in (name, f.alias)), None)
    example = field.examples[0] if field is not None and field.examples else f"{{{known[0] if known else 'key'}: …}}"
    given = _shown(problem.get("input"))
    keys = f". Its keys: {', '.join(known)}" if known else ""
    return f"{given} is given, but expected keys with values, as in {example}{keys}"


def _single(location: Location, problem: Any) -> str:
    kind, given, context = problem["type"], problem.get("input"), problem.get("ctx") or {}
    if kind in ("literal_error", "enum"):
        return _not_one_of(problem, _allowed(problem))
    if kind == "string_pattern_mismatch" or (kind == "string_type" and location[-1] in _FORMS and given is not None):
        form = _FORMS.get(str(location[-1]), f"it must match {context.get('pattern')}")
        return f"{_shown(given)} cannot be used: {form}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        limit = context.get(key)
        return f"{_shown(given)} is out of range: write {words.format(as_given(limit))}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_too_long":
        return f"{_shown(given)} is too long: at most {context.get('max_length')} characters"
    expected = _KINDS.get(re.split(r"_", kind)[0])
    if expected is not None:
        return f"{_shown(given)} is given, but expected {expected}"
    return f"{str(problem['msg'])[:1].lower()}{str(problem['msg'])[1:]}{_given_after(problem)}"


def _allowed(problem: Any) -> list[str]:
    kind = problem["type"]
    if kind in ("literal_error", "enum"):
        return _CHOICE.findall(str((problem.get("ctx") or {}).get("expected", "")))
    return ["true", "false"] if kind.startswith("bool") else [_KINDS.get(kind.split("_")[0], kind).partition(";")[0]]


def _not_one_of(problem: Any, allowed: list[str]) -> str:
    given, names = problem.get("input"), list(dict.fromkeys(allowed))
    near = did_you_mean(given, names) if isinstance(given, str) else ""
    return f"{_shown(given)} is not {'one of ' if len(names) > 2 else ''}{one_of(names)}{near}"


def _known(model: type[BaseModel], location: Location) -> list[str]:
    return list(_fields(_annotation(model, location[:-1])))


def _annotation(model: Any, location: Location) -> Any:
    """Return the type of the value at this place."""
    for part in location:
        model = _element(model) if isinstance(part, int) else _fields(model).get(str(part))
    return model


def _hide(model: type[BaseModel], location: Location, problems: list[Any]) -> list[Any]:
    """Return the problems without the given values, if these may contain a secret."""
    if not _secret(model, location):
        return problems
    return [{**one, "input": None if one.get("input") is None else _HIDDEN} for one in problems]


def _secret(model: type[BaseModel], location: Location) -> bool:
    """Return whether a value at this place may contain a secret, by the key or by the type that is expected there.

    A value of the wrong type counts, too: people write `alerts: slack://…` where keys with values are expected.
    """
    keys = [str(part) for part in location if isinstance(part, str)]
    if any(key in _SECRET_KEYS for key in keys[-2:]) or (keys and keys[-1].endswith("dsn")):
        return True
    return _holds_secrets(_annotation(model, location))


def _holds_secrets(annotation: Any) -> bool:
    """Return whether a type is a secret, or contains one at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, SecretStr):
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_secrets(field.annotation) for field in annotation.model_fields.values())
    return any(_holds_secrets(arg) for arg in get_args(annotation))


def _shown(given: Any) -> str:
    """Return the value as it was given, unless it may contain a secret."""
    return "the value" if given is _HIDDEN else as_given(given)


def _given_after(problem: Any) -> str:
    given = problem.get("input")
    if given is _HIDDEN or isinstance(given, dict | list | tuple | Mapping):
        return ""
    shown = as_given(given)
    return "" if shown in problem["msg"] else f" (given {shown})"
