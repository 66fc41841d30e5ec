"""The CEL library without its interactive shell, which would delay each command by 0.4 s. Pure.

The library's package loads the shell, and with it a terminal interface, beside the language. Import `cel` from here: no
other module may import it, and this one must never start the shell.
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
        del sys.modules[_SHELL]  # whoever imports the shell itself gets it
