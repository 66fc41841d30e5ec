"""CEL is loaded without its interactive shell, which others can still load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cdcbridge.routing.cel_library import cel

SHELL_AFTER = "from cdcbridge.routing.cel_library import cel; import cel.cli; assert callable(cel.cli.main)"
SHELL_BEFORE = "import cel.cli; from cdcbridge.routing.cel_library import cel; import cel.cli; assert cel.cli.main"
WITHOUT = """
import sys
from cdcbridge.routing.filters import Filter
assert Filter("record.id > 1").wants(dict(op="", topic="", key="", record={"id": 2}, old={}, meta={}))
assert not {"cel.cli", "prompt_toolkit"} & set(sys.modules)
"""


def test_the_language_is_there() -> None:
    assert cel.compile("a + 1").execute({"a": 2}) == 3


@pytest.mark.parametrize("code", [WITHOUT, SHELL_AFTER, SHELL_BEFORE])
def test_the_shell_is_loaded_by_those_alone_who_ask_for_it(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
