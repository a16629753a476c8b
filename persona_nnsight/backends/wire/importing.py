"""What a job's block does first on the far side: make the shipped modules importable.

The text of this file travels with every job and is executed there, so it imports the standard
library alone. Source text is sent, not pickled functions or classes: it means the same under
another version of Python, where bytecode does not.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def run(lm: Any, sources: dict[str, str], entry: str, request: dict[str, Any]) -> dict[str, Any]:
    """Call the shipped function ``entry`` ("module:function") with the model and the request.

    Args:
        lm: the model of the server.
        sources: text by full module name; a package is a module whose name others begin with.
        entry: what to call.
        request: its keyword arguments besides ``lm``, plain data.
    """
    module, _, function = entry.partition(":")
    with _importable(sources):
        answer: dict[str, Any] = getattr(import_module(module), function)(lm, **request)
        return answer


@contextmanager
def _importable(sources: dict[str, str]) -> Iterator[None]:
    """Make the modules importable, and forget them afterwards: the process serves others too."""
    finder = _Shipped(sources)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in sources:
            sys.modules.pop(name, None)


class _Shipped(MetaPathFinder, Loader):
    """Finds and executes modules whose text is at hand."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.sources:
            return None
        package = any(name.startswith(f"{fullname}.") for name in self.sources)
        return ModuleSpec(fullname, self, is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        text, filename = self.sources[module.__name__], f"<{module.__name__}>"
        # nnsight reads the source of every `with` block it runs, and tracebacks show it.
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        exec(compile(text, filename, "exec"), module.__dict__)
