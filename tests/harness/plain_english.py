"""Words and signs that make a sentence hard to understand, counted per 1,000 words. Pure.

CONTRIBUTING.md explains the rules. A noun is clearer than a clause with "what" or "who", and a technical verb is
clearer than "goes" or "comes".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

LIMIT = 1.0  # per 1,000 words
_HARD = {
    "a clause with what or who": r"\b(what|who|whoever|whatever) (?!kind\b|if\b|to\b|happen)",
    "a person without a name": r"\b(nobody|somebody|anybody)\b",
    "go, come or stand": r"\b(go|goes|gone|going|went|come|comes|coming|came|stands?|stood)\b",
    "tell or say": r"\b(tells?|told|says?|said)\b",
    "behind or beside": r"\b(behind|beside)\b",
    "a semicolon": r";",
    "a sentence without a subject": r"(?:^|(?<=\. ))(Of|Where|Until|What|Those|Whether|So) [^.?]*\.",
}
_SHORTEST = 3  # words of a message
_NO_TEXT = {"SQL", "execute", "encode", "compile", "value", "fetchall"}  # calls whose texts are for programs
_STATEMENT = r"(select|with|insert|update|delete|create|alter|drop|set|copy|lock|begin|grant|revoke|commit|rollback)"
_SQL = re.compile(rf"\s*(-- |{_STATEMENT} )")
_SQL_FIX = re.compile(rf"\b{_STATEMENT} [^;]*;|(?<=x);$")
_QUESTION = re.compile(r"[^.?!:]*\?")
_QUOTED = "'(?:[^']|'')*'"
_RAISE = re.compile(rf"^ *raise (?:exception|warning|notice)\s((?:[^';]|{_QUOTED})*);", re.MULTILINE)
_LITERAL = re.compile(rf"{_QUOTED}(?:\s*\n\s*{_QUOTED})*")  # PostgreSQL joins literals on consecutive lines


def hard_places(text: str) -> dict[str, list[str]]:
    """Return for each kind the places in the text, without code, tables, headings and questions."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "x", text)
    text = re.sub(r"^(\||#|    ).*$", "", text, flags=re.MULTILINE)
    text = _QUESTION.sub("", " ".join(text.split()))
    return {
        kind: [text[max(0, m.start() - 40) : m.end() + 40] for m in re.finditer(pattern, text)]
        for kind, pattern in _HARD.items()
    }


def words(text: str) -> int:
    """Count the words of a text."""
    return len(re.findall(r"[A-Za-z']+", text))


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def messages(path: Path) -> Iterator[str]:
    """Yield the texts that a Python or SQL file shows to people: errors, hints, log values, help and descriptions.

    A text is a string literal of at least three words that is neither a docstring, nor SQL, nor a pattern. A value
    inside it becomes `x`. In an SQL file only the literals of RAISE statements count.
    """
    texts = _raised(path.read_text()) if path.suffix == ".sql" else _texts(path)
    for text in texts:
        if words(text) >= _SHORTEST and not _SQL.match(text):
            yield text


def _texts(path: Path) -> Iterator[str]:
    """Yield the string literals of a Python file, apart from docstrings and texts for programs."""
    tree = ast.parse(path.read_text())
    passed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed.update(id(part) for part in node.values)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in _NO_TEXT:
            passed.update(id(inner) for argument in node.args for inner in ast.walk(argument))
        yield _SQL_FIX.sub("x", _literal(node) if id(node) not in passed else "")


def _raised(code: str) -> Iterator[str]:
    """Yield the string literals of the RAISE statements: messages, details, hints, and parts of them."""
    for statement in _RAISE.findall(code):
        for literal in _LITERAL.findall(statement):
            text = re.sub(r"'\s*\n\s*'", "", literal)[1:-1].replace("''", "'")
            if " " in text:  # otherwise it is a name
                yield re.sub(r"%(\d+\$)?[sLI]?", "x", text)


def _literal(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) if isinstance(part, ast.Constant) else "x" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def comments(path: Path) -> str:
    """Return the comments of an SQL file, without lists and examples, which are indented."""
    return "\n".join(re.findall(r"^ *-- (?! )(.*)$", path.read_text(), re.MULTILINE))
