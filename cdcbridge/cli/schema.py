"""Make the JSON schema of the configuration file, for editors: it accepts every file that the program accepts.

The schema that pydantic makes accepts less. In the file, `${VAR}` may replace any scalar, and durations and sizes are
texts. Numbers and booleans may be texts too, because variables are. No key is required that the environment can give.
"""

from __future__ import annotations

from typing import Any, Final

from cdcbridge.config import Config
from cdcbridge.units import DURATION_PATTERN, SIZE_PATTERN, format_duration, format_size

_VARIABLE: Final = {"type": "string", "pattern": r"\$\{\w+(:-[^}]*)?\}"}
_REMARKS: Final = ("title", "description", "default", "examples")
_TRUTHS: Final = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
_AS_TEXT: Final[dict[str, list[dict[str, Any]]]] = {
    "integer": [{"type": "string", "pattern": r"^\s*[+-]?[0-9]+(\.0*)?\s*$"}],
    "number": [{"type": "string", "pattern": r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"}],
    "boolean": [
        {"enum": [0, 1]},
        {"type": "string", "pattern": "^(" + "|".join("".join(f"[{c}{c.upper()}]" for c in t) for t in _TRUTHS) + ")$"},
    ],
}
_CONSTRAINTS: Final = ("pattern", "enum", "const", "minLength", "maxLength")


def file_schema() -> dict[str, Any]:
    """Return the schema, made from the model so that it contains every key."""
    schema = Config.model_json_schema(by_alias=True)
    for definition in (schema, *schema["$defs"].values()):
        definition["properties"] = {key: _widened(node) for key, node in definition["properties"].items()}
    for definition in (schema, schema["$defs"]["Source"]):
        definition.pop("required", None)  # the environment can give it too, as CDCBRIDGE_SOURCE__DSN
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _widened(node: dict[str, Any]) -> dict[str, Any]:
    """Return a property's schema, extended to accept variables and the texts that the program converts."""
    made = {key: value for key, value in node.items() if key != "gt"}  # a limit of durations, which are texts here
    if "default" in made:
        made["default"] = _written(made)
    if "items" in made:
        made["items"] = _widened(made["items"])
    if "anyOf" in made:
        made["anyOf"] = [_widened(one) for one in made["anyOf"]]
    kind = made.get("type")
    if kind not in _AS_TEXT and not any(key in made for key in _CONSTRAINTS):
        return made
    remarks: dict[str, Any] = {key: made.pop(key) for key in _REMARKS if key in made}
    return {**remarks, "anyOf": [made, *_AS_TEXT.get(kind or "", []), _VARIABLE]}


def _written(node: dict[str, Any]) -> Any:
    """Return a default as it is written in the file. For example, 30.0 seconds are 30s."""
    if node.get("pattern") == DURATION_PATTERN:
        return format_duration(node["default"])
    sizes = {"type": "string", "pattern": SIZE_PATTERN} in node.get("anyOf", [])
    return format_size(node["default"]) if sizes and node["default"] is not None else node["default"]
