"""The engine as text, for a server that has never heard of this package."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from persona_nnsight.errors import PersonaError

_PACKAGE = "persona_nnsight"


@cache
def shipped_sources(modules: tuple[str, ...]) -> dict[str, str]:
    """Source text by module name: `modules`, and what they import of this package.

    The package has a name of its own there, which holds a digest of the text: a server may have
    another version of it installed, or be running one for somebody else.
    """
    texts: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = _source(name)
            waiting += _imports(name, texts[name])
            waiting += _parents(name)
    digest = hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()
    private = _renamed(_PACKAGE, digest)
    return {
        _renamed(name, digest): text.replace(f"from {_PACKAGE}", f"from {private}")
        for name, text in sorted(texts.items())
    }


def shipped_name(name: str, sources: dict[str, str]) -> str:
    """What `name`, a module of this package, is called on the far side."""
    return next(iter(sources)) + name.removeprefix(_PACKAGE)


def _renamed(name: str, digest: str) -> str:
    return f"_{_PACKAGE}_{digest[:12]}{name.removeprefix(_PACKAGE)}"


def _source(name: str) -> str:
    if name == _PACKAGE:
        return ""  # its names are imported lazily, from modules that need not be there
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise PersonaError(f"The source of {name} is not on this machine; install it unzipped.")
    return Path(spec.origin).read_text(encoding="utf-8")


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _imports(name: str, text: str) -> list[str]:
    """Modules of this package that `text` imports, those for type checkers left out."""
    found = []
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            assert node.module is not None
            found.append(node.module)
        waiting += ast.iter_child_nodes(node)
    return found
