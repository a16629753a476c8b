"""The rooms of the package: what each may import, and that nothing runs in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import MAY_IMPORT

ROOT = Path(__file__).parents[2]
PACKAGE = "persona_nnsight"


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(name: str, tree: ast.AST, *, typing: bool = True) -> Iterator[str]:
    """Modules of the package that a module imports, wherever; with `typing` for checkers too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            if (node.module or "").split(".")[0] == PACKAGE:
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from [module for module in below if module in MODULES] or [str(node.module)]
        yield from imports(name, node, typing=typing)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_is_known() -> None:
    assert {room(module) for module in MODULES} == {"", *MAY_IMPORT}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_takes_from_those_below(name: str) -> None:
    """Exactly the table's, which is bottom up: an arrow that is gone leaves the table too."""
    order = list(MAY_IMPORT)
    assert MAY_IMPORT[name] <= set(order[: order.index(name)])
    taken = {
        room(target)
        for module, tree in MODULES.items()
        if room(module) == name
        for target in imports(module, tree)
    }
    assert taken - {name} == MAY_IMPORT[name]


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = {
        module: set(imports(module, tree, typing=False)) - {module}
        for module, tree in MODULES.items()
    }
    while free := {module for module, wanted in left.items() if not wanted & left.keys()}:
        left = {module: wanted for module, wanted in left.items() if module not in free}
    assert not left, f"a circle among {sorted(left)}"


def test_a_package_file_holds_no_logic() -> None:
    """But the one of the package itself, which finds its names when they are first used."""
    for path in (ROOT / PACKAGE).rglob("__init__.py"):
        if path.parent.name != PACKAGE:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), path
