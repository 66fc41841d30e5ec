"""The wheel and the sdist: what they contain, and that each of them runs the demo where nothing else is installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

import cdcbridge
from tests.harness.world import clean_environment

ROOT = Path(__file__).parents[2]
CACHES = (
    "__pycache__",
    ".pyc",
    ".hypothesis",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".venv",
    "node_modules",
    "docs/javascripts",
)
NAME = f"cdcbridge-{cdcbridge.__version__}"


class Packages(NamedTuple):
    """The wheel of the checkout, its sdist, and the wheel that pip builds of the sdist."""

    wheel: Path
    sdist: Path
    of_sdist: Path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    folder = tmp_path_factory.mktemp("dist")
    called("-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    again = folder / "again"
    called("-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(again), str(sdist),
           cwd=folder)  # fmt: skip
    return Packages(wheel, sdist, next(again.glob("*.whl")))


def called(*arguments: str, cwd: Path, python: str = sys.executable) -> str:
    """Run Python, or a program given as `python`, in a clean environment. Return what it wrote to stdout."""
    environment = {name: value for name, value in clean_environment().items() if not name.startswith(("PYTHON", "PG"))}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_below(folder: str) -> Iterator[str]:
    for path in (ROOT / folder).rglob("*"):
        name = str(path.relative_to(ROOT))
        if path.is_file() and not any(cache in name for cache in CACHES):
            yield name


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(wheel_files(wheel)[f"{NAME}.dist-info/METADATA"].decode())


def test_the_wheel_is_the_package_with_its_sql_and_nothing_else(packages: Packages) -> None:
    found = wheel_files(packages.wheel)
    package = {name for name in found if not name.startswith(f"{NAME}.dist-info/")}
    assert package == {*files_below("cdcbridge"), *(f"cdcbridge/{name}" for name in files_below("sql"))}
    assert {"cdcbridge/py.typed", "cdcbridge/sql/schema.sql"} <= package
    assert found[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"cdcbridge = cdcbridge.cli:main" in found[f"{NAME}.dist-info/entry_points.txt"]
    assert metadata(packages.wheel)["License-Expression"] == "Apache-2.0"


def test_the_sdist_makes_the_same_wheel(packages: Packages) -> None:
    assert wheel_files(packages.of_sdist) == wheel_files(packages.wheel)
    with tarfile.open(packages.sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    wanted = {name for folder in ("cdcbridge", "config", "docs", "tests", "scripts") for name in files_below(folder)}
    assert wanted | {f"cdcbridge/{name}" for name in files_below("sql")} <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= names
    assert not [name for name in names if any(cache in name for cache in CACHES)]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_in_a_fresh_environment_it_runs_the_demo(packages: Packages, tmp_path: Path, kind: str) -> None:
    wheel = packages.wheel if kind == "wheel" else packages.of_sdist
    fresh, elsewhere = tmp_path / "fresh", tmp_path / "elsewhere"
    elsewhere.mkdir()
    called("-m", "venv", "--without-pip", str(fresh), cwd=tmp_path)
    python = str(fresh / "bin" / "python")
    called("-m", "pip", "--quiet", "--python", python, "install", "--no-index", "--no-deps", str(wheel), cwd=tmp_path)
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(link_dependencies(wheel, tmp_path / "dependencies")))

    where = called("-c", "import cdcbridge; print(cdcbridge.__file__)", cwd=elsewhere, python=python)
    assert Path(where.strip()) == site / "cdcbridge" / "__init__.py"
    program = str(fresh / "bin" / "cdcbridge")
    assert called("--version", cwd=elsewhere, python=program).split()[-1] == cdcbridge.__version__
    shown = called("demo", cwd=elsewhere, python=program)
    for part in (
        '"customer":"Ada"',
        'ack → {"acked":3}',
        'ack → {"acked":4}',
        "cdcbridge lag",
        "Everything was removed",
    ):
        assert part in shown, shown
    assert list(elsewhere.iterdir()) == []


def link_dependencies(wheel: Path, folder: Path) -> Path:
    """Fill a folder with links to the packages that the wheel's metadata name, and to those that these name.

    They are the ones installed here, since a download for each run would take long. A package that the metadata forget
    is not there, even if the tests have it.
    """
    folder.mkdir()
    wanted = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    extras, seen = {"", "demo"}, set()
    while wanted:
        requirement = wanted.pop()
        key = (requirement.name, *sorted(requirement.extras))
        if key in seen or not applies(requirement, extras):
            continue
        seen.add(key)
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version), f"{requirement}: {found.version} is installed"
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
        of_it = {"", *requirement.extras}
        wanted += [further for line in found.requires or () if applies(further := Requirement(line), of_it)]
    return folder


def applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
