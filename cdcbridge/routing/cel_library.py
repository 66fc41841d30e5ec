"""Load the CEL library without its interactive shell, which would delay each command by 0.4 s.

The library's package also loads the shell, and the shell loads a terminal interface. Import `cel` from here: no other
module may import the library itself, and this one must never start the shell. The module is pure.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Final

__all__ = ["cel"]

_SHELL: Final = "cel.cli"

sys.modules[_SHELL] = sys.modules.get(_SHELL) or ModuleType(_SHELL)
try:
    import cel
finally:
    if not hasattr(sys.modules[_SHELL], "__file__"):
        del sys.modules[_SHELL]  # a later import of the shell itself loads the real one
