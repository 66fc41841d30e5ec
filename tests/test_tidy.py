"""The style that no linter knows: sizes, first lines, words, links between files."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from scripts.sync_client import CLIENT, FILES, made
from tests.campaigns.mutants import MUTANTS
from tests.harness import pure_modules

ROOT = Path(__file__).parents[1]
PROGRAM = sorted(path for path in (ROOT / "cdcbridge").rglob("*.py"))
SQL = sorted((ROOT / "sql").rglob("*.sql"))
TEXTS = [*PROGRAM, *SQL, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "config").iterdir()]
short = pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))


@short
def test_a_file_has_less_than_400_lines_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    assert ast.get_docstring(ast.parse(text)), "no docstring"


@short
def test_a_function_fits_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, node.name


@short
def test_nothing_that_protects_data_is_an_assert(path: Path) -> None:
    """An assert vanishes under -O."""
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_each_sql_function_has_its_header(path: Path) -> None:
    text = path.read_text()
    for match in re.finditer(r"create or replace (?:function|view) (\w+)", text):
        before = text[: match.start()].rstrip().splitlines()
        assert before and before[-1].startswith("--"), match[1]
        if "function" in match[0]:
            body = text[match.start() : text.index("$$", match.start())]
            pinned = "set search_path from current" in body or "set search_path = pg_catalog, pg_temp" in body
            # Those that are inlined run as what calls them, which has pinned it.
            inlined = "language sql immutable as" in body
            exposed = "security definer" in body or (path.parent.name == "api" and not inlined)
            assert pinned or not exposed, f"{match[1]} trusts its caller's search_path"


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_sql_has_short_lines_and_no_tabs(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100 and "\t" not in line and line == line.rstrip(), f"{path.name}:{number}"


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_sql_can_be_written_in_every_server_encoding(path: Path) -> None:
    assert path.read_text().isascii()


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_a_backslash_in_sql_means_the_same_whatever_the_session_says(path: Path) -> None:
    """Without E before the quote, standard_conforming_strings decides; an inlined function is read in its caller's session."""
    for line in path.read_text().splitlines():
        assert line.lstrip().startswith("--") or not re.search(r"(^|[^E])'[^']*\\[^']*'", line), line


@short
def test_sql_in_the_program_can_be_written_in_every_server_encoding(path: Path) -> None:
    tree = ast.parse(path.read_text())
    statement = re.compile(
        r"\s*(select|with|insert|update|delete|create|alter|drop|set|copy|listen|begin)\b", re.IGNORECASE
    )
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            assert node.value.isascii() or not statement.match(node.value), node.value


def test_confirm_is_for_lsns_and_ack_for_deliveries() -> None:
    for path in [*PROGRAM, *SQL]:
        text = path.read_text().lower()
        assert not re.search(r"\back(ed|s|ing)? (the |an? )?(lsn|wal|position)", text), path
        assert not re.search(r"confirm(ed|s|ing)? (the |an? )?(message|deliver|receipt)", text), path


def test_every_invariant_of_the_page_has_a_mutant() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"^\| (I\d+) \|", page, re.MULTILINE))
    assert listed == {mutant.invariant for mutant in MUTANTS}


def test_nothing_is_left_to_be_done_and_no_path_of_one_machine() -> None:
    for path in TEXTS:
        text = path.read_text()
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path
        assert not re.search(r"(?<![\w.])/(root|work|home/\w+)/", text), path


@pytest.mark.parametrize("source", FILES)
def test_the_synchronous_client_is_the_asynchronous_one(source: str) -> None:
    assert made(source) == (CLIENT / FILES[source]).read_text(), "run `make client`"


def test_one_class_name_means_one_thing() -> None:
    """Twins of the asynchronous and the synchronous client share their names, and nothing else does."""
    modules: dict[str, list[Path]] = {}
    for path in PROGRAM:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                modules.setdefault(node.name, []).append(path)
    several = {name: paths for name, paths in modules.items() if len({_twin(path) for path in paths}) > 1}
    assert not several, several


def _twin(path: Path) -> str:
    return path.stem.removesuffix("_async").replace("_threads", "_tasks")


def test_every_mutant_finds_its_place_and_its_test() -> None:
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant
        file, name = mutant.test.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), mutant


SOURCES = {name: path.read_text() for name, path in pure_modules.modules().items()}


@functools.cache
def _imported_by_tests() -> frozenset[str]:
    """Modules that unit, property and golden tests import."""
    tests = [path for folder in ("unit", "properties", "golden") for path in (ROOT / "tests" / folder).glob("*.py")]
    return frozenset(module for path in tests for module in pure_modules.imported(path.read_text(), SOURCES))


@pytest.mark.parametrize("module", pure_modules.pure(SOURCES))
def test_a_pure_module_has_its_unit_tests(module: str) -> None:
    """In tests/unit/test_NAME.py. A unit, property or golden test imports it by its name."""
    assert (ROOT / "tests" / "unit" / pure_modules.unit_test_of(module)).exists(), pure_modules.unit_test_of(module)
    assert module in _imported_by_tests(), "no unit, property or golden test imports it"


def test_what_is_pure_is_told_by_imports() -> None:
    sources = {
        "p": '"""Doc."""',
        "p.table": '"""Doc."""\nimport re\nfrom p.words import x',
        "p.words": '"""Doc."""\nx = 1',
        "p.late": '"""Doc."""\ndef f():\n    import socket',
        "p.behind": '"""Doc."""\nfrom p import late',
        "p.store": '"""Doc."""\nfrom psycopg import sql',
        "p.type": '"""Doc."""\nfrom p.behind import x',
    }
    assert pure_modules.pure(sources) == ["p.table", "p.words"]
    found = pure_modules.pure(SOURCES)
    assert {"cdcbridge.changes.keys", "cdcbridge.routing.collector", "cdcbridge.instants"} <= set(found)
    assert not {"cdcbridge.store.log", "cdcbridge.cli", "cdcbridge.background"} & set(found)
    files = [pure_modules.unit_test_of(name) for name in found]
    assert len(set(files)) == len(files), "two pure modules of one name would share a file"


def test_the_lock_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in text
    assert "://" not in text and "index-url" not in text


def test_sql_reaches_the_package_as_a_link() -> None:
    link = ROOT / "cdcbridge" / "sql"
    assert link.is_symlink() and link.readlink() == Path("../sql")
