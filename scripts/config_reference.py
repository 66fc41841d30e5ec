"""Print docs/CONFIGURATION.md, made from the program's own model: python -m scripts.config_reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cdcbridge.cli.schema import file_schema

HEAD = """# Configuration

`python -m scripts.config_reference` makes this page from the program's own model. `make docs` runs it, and a test compares.
The page has every key, with its default. config/cdcbridge.example.yaml shows the keys in one file, and
`cdcbridge config schema` prints them for editors.

- `cdcbridge config check` reads the file and reports every mistake in it. `cdcbridge config show` prints the values that are used.
- A value `${VAR}` is the environment variable VAR. `${VAR:-x}` is x where VAR is not set.
- The environment can set a key as well: CDCBRIDGE_SOURCE__SLOT is `source.slot`. It wins over the file.
- A duration is a number and one of ms, s, m, h and d, for example `30s` or `1.5h`.
- A size is a number and one of B, kB, MB, GB and TB, for example `10GB`. A kB has 1024 bytes. A number alone is bytes.

The smallest file:

```yaml
source: {dsn: "${DATABASE_URL}"}
consumers:
  - {name: billing, tables: [public.orders]}
```
"""
MARKS = {"[0-9]{1,15}(\\.[0-9]{1,15})?\\s*(ms|": "duration", "(B|kB|": "size"}


def keys(schema: dict[str, Any], node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, property) of each key. The keys of a mapping follow the mapping."""
    for name, one in node["properties"].items():
        yield f"{path}{name}", one
        below = [part.get("$ref") or part.get("items", {}).get("$ref") for part in parts(one)]
        nodes = [schema["$defs"][reference.rpartition("/")[2]] for reference in filter(None, below)]
        inner = f"{path}{name}[]." if one.get("type") == "array" else f"{path}{name}."
        if len(nodes) > 1:
            yield from keys_of_types(schema, nodes, inner)
        elif nodes:
            yield from keys(schema, nodes[0], inner)


def keys_of_types(
    schema: dict[str, Any], nodes: list[dict[str, Any]], path: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the keys of a mapping that has several types: first those of all types, then those of each type."""
    shared = set.intersection(*(set(node["properties"]) for node in nodes))
    types = [node["properties"]["type"] for node in nodes]
    yield f"{path}type", {"description": types[0]["description"], "enum": [one["examples"][0] for one in types]}
    common = {name: one for name, one in nodes[0]["properties"].items() if name in shared and name != "type"}
    yield from keys(schema, {"properties": common}, path)
    for node, one in zip(nodes, types, strict=True):
        own = {name: value for name, value in node["properties"].items() if name not in shared}
        yield from keys(schema, {"properties": own}, f"{path.removesuffix('.')}({one['examples'][0]}).")


def parts(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a property and its alternatives."""
    yield node
    for one in (*node.get("anyOf", []), *node.get("oneOf", [])):
        yield from parts(one)


def kind(node: dict[str, Any]) -> str:
    """Return the values that a key accepts, in words. `null` and `${VAR}` are omitted."""
    found: list[str] = []
    patterns = "".join(str(part.get("pattern", "")) for part in parts(node))
    if mark := next((word for piece, word in MARKS.items() if piece in patterns), None):
        return mark
    for part in parts(node):
        if "enum" in part and all(isinstance(value, str) for value in part["enum"]):
            found += [f"`{value}`" for value in part["enum"]]
        elif "const" in part:
            found.append(f"`{part['const']}`")
        elif part.get("type") == "array":
            found.append("list")
        elif part.get("type") in ("integer", "number"):
            bounds = [part.get("minimum"), part.get("maximum")]
            return "number" + (f", {bounds[0]} to {bounds[1]}" if None not in bounds else "")
        elif part.get("type") == "boolean":
            found += ["`true`", "`false`"]
        elif part.get("type") == "string" and not found and "pattern" not in part:
            found.append("text")
        elif "$ref" in part or part.get("type") == "object":
            found.append("keys")
    return ", ".join(dict.fromkeys(found)) or "text"


def default(node: dict[str, Any]) -> str:
    """Return the default as it is written in the file."""
    value = node.get("default")
    if "default" not in node or value is None or isinstance(value, dict):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(value)}]`" if isinstance(value, list) else f"`{value}`"


def cell(text: str) -> str:
    """Escape a cell of a Markdown table."""
    return text.replace("|", "\\|")


def reference() -> str:
    """Return the whole page."""
    schema = file_schema()
    pieces = [HEAD]
    section = ""
    for path, node in keys(schema, schema):
        first = path.partition(".")[0].removesuffix("[]")
        if first != section:
            section = first
            pieces.append(
                f"\n## {section}\n\n{node['description']}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
            )
            continue
        given = node.get("examples", [""])[0]
        example = f" Example: `{given}`" if given and f"`{given}`" != default(node) else ""
        pieces.append(f"| `{path}` | {cell(kind(node))} | {default(node)} | {cell(node['description'] + example)} |\n")
    return "".join(pieces)


if __name__ == "__main__":
    print(reference(), end="")
