"""Read a grid out of a research script, without running the script.

What is looked for, among the assignments at the top level of the file:

- personas and tasks: a dictionary whose name contains "persona" or "task" (in any case),
  mapping a key to a text. The text may also be the "text", "description" or "prompt" of a
  nested dictionary (whose "markers" or "tags" are kept), or the first string of a list or tuple.
- markers: a dictionary whose name contains "marker", mapping persona keys to lists of words.
- baselines: a string whose name contains "base" and "persona" or "task", or the entry called
  "baseline" or "base" of the dictionaries above. The built-in baselines fill in for missing ones.

Names with "marker" in them are never personas or tasks, names with both "persona" and "task"
are neither, and empty dictionaries are passed over. When several dictionaries fit, one is taken
only if it alone maps two keys or more to texts (plain strings or nested dictionaries); otherwise
that is an error which names them. Nothing is merged. A dictionary that other statements change
is refused, because only running the script would tell what is in it. The template is always the
default one.
"""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.grids import Grid, is_key, slug
from persona_nnsight.prompts.strict_yaml import read_small_file

__all__ = ["grid_from_script"]

_TEXT_FIELDS = ("text", "description", "prompt")
_BASELINE_KEYS = ("baseline", "base")
_MUTATORS = ("update", "setdefault", "pop", "popitem", "clear")
#: A key that is a larger number is a mistake, and Python may refuse to write it in a message.
_MOST_BITS = 64
_KEEP_ONE = "keep one of them in a copy of the script, or rename the others"


def grid_from_script(path: Path) -> Grid:
    """Build a grid from the dictionaries of personas and tasks that a Python file spells out.

    The file is parsed and never executed; the module's description says what is found in it.
    The grid is named after the file, and keys that a grid cannot have are simplified.
    """
    raw = read_small_file(path)
    try:
        script = _Script(_parse(raw))
        return Grid.from_dict({"name": slug(path.stem, "imported"), **script.grid_data()})
    except PersonaError as problem:
        raise PersonaError(f"{path}: {problem}") from None
    except RecursionError:
        raise PersonaError(
            f"{path}: expressions are nested too deep to read; write the texts as plain strings"
        ) from None


class _Assignment(NamedTuple):
    name: str
    node: ast.expr

    def __str__(self) -> str:
        return f"{self.name} (line {self.node.lineno})"

    def named(self, *parts: str) -> bool:
        return any(part in self.name.lower() for part in parts)

    def fits(self, role: str) -> bool:
        """Whether the name says that this is about the personas, or about the tasks."""
        other = "task" if role == "persona" else "persona"
        return self.named(role) and not self.named(other, "marker")

    def is_dict(self) -> bool:
        """Whether a dictionary with something in it is spelled out here."""
        if isinstance(self.node, ast.Dict):
            return bool(self.node.keys)
        return _is_dict_call(self.node) and bool(self.node.args or self.node.keywords)

    def value(self) -> Any:
        try:
            return _literal(self.node)
        except _NotLiteralError as problem:
            try:
                source = repr(ast.unparse(problem.node)[:60])
            except ValueError:  # Python writes no numbers of thousands of digits
                source = "a huge number"
            raise PersonaError(
                f"line {problem.node.lineno}: {self.name} holds {source}, "
                "which is not a plain literal; the script is read and not run, so write it out"
            ) from None


class _Script:
    """The top-level assignments of a script, and the grid that can be made of them."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        # A name assigned twice holds the later value, as when the script runs.
        self.found = list({found.name: found for found in _assignments(tree)}.values())

    def grid_data(self) -> dict[str, Any]:
        """Give the YAML layout as plain data, without the name."""
        personas = self._entries("persona", "markers")
        tasks = self._entries("task", "tags")
        baselines = {
            "persona": self._baseline("persona", personas),
            "task": self._baseline("task", tasks),
        }
        self._add_markers(personas)
        return {
            "baseline": {role: text for role, text in baselines.items() if text is not None},
            "personas": _with_grid_keys(personas, "persona"),
            "tasks": _with_grid_keys(tasks, "task"),
        }

    def _entries(self, role: str, extra: str) -> dict[Any, dict[str, Any]]:
        """Give the script's keys with {text, extra}, a baseline entry included."""
        source = self._dictionary(role)
        entries: dict[Any, dict[str, Any]] = {}
        for key, value in source.value().items():
            text = _text_of(value)
            if text is None:
                raise PersonaError(
                    f"{source} has no text for {key!r}; write a string, or a dictionary with "
                    f"one of {', '.join(_TEXT_FIELDS)}"
                )
            words = value.get(extra) if isinstance(value, dict) else None
            entries[key] = {"text": text, extra: words if _is_words(words) else []}
        return entries

    def _dictionary(self, role: str) -> _Assignment:
        """Find the one dictionary that holds the personas, or the tasks."""
        fitting = [found for found in self.found if found.fits(role)]
        candidates = [found for found in fitting if found.is_dict()]
        if not candidates:
            self._none_found(role, fitting)
        if len(candidates) > 1:
            of_texts = [found for found in candidates if _maps_to_texts(found.value())]
            if len(of_texts) != 1:
                raise PersonaError(
                    f"several dictionaries could hold the {role}s: "
                    f"{', '.join(map(str, candidates))}; {_KEEP_ONE}"
                )
            candidates = of_texts
        self._refuse_changes(candidates[0])
        return candidates[0]

    def _none_found(self, role: str, fitting: list[_Assignment]) -> NoReturn:
        unusable = [found for found in fitting if not isinstance(found.node, ast.Constant)]
        dicts = [found for found in self.found if found.is_dict()]
        if unusable:
            seen = (
                f"{', '.join(map(str, unusable))} is not a dictionary with its entries spelled out"
            )
        elif dicts:
            seen = f"the dictionaries at its top level are {', '.join(map(str, dicts))}"
        else:
            seen = "there is no dictionary at its top level"
        raise PersonaError(
            f"no {role}s found in the script: {seen}; "
            f"write {role.upper()}S = {{'key': 'text', ...}}"
        )

    def _refuse_changes(self, source: _Assignment) -> None:
        for name, line in _changes(self.tree):
            if name == source.name:
                raise PersonaError(
                    f"line {line}: {name} is changed after it is written; the script is read "
                    "and not run, so write the final dictionary out in one assignment"
                )

    def _baseline(self, role: str, entries: dict[Any, dict[str, Any]]) -> str | None:
        """Take the baseline out of the entries and the string constants, None if there is none."""
        texts = {
            str(found): text
            for found in self.found
            if found.fits(role) and found.named("base")
            if (text := _string(found.node)) is not None
        }
        for key in [key for key in entries if _is_baseline(key)]:
            texts[f"the {role} {key!r}"] = entries.pop(key)["text"]
        if not entries:
            raise PersonaError(f"the script has no {role} other than the baseline; add one")
        if len(set(texts.values())) > 1:
            raise PersonaError(
                f"several texts could be the baseline {role}: {', '.join(texts)}; {_KEEP_ONE}"
            )
        return next(iter(texts.values()), None)

    def _add_markers(self, personas: dict[Any, dict[str, Any]]) -> None:
        candidates = [
            found
            for found in self.found
            if found.named("marker") and not found.named("task") and found.is_dict()
        ]
        if len(candidates) > 1:
            raise PersonaError(
                "several dictionaries could hold the markers: "
                f"{', '.join(map(str, candidates))}; {_KEEP_ONE}"
            )
        for source in candidates:
            self._refuse_changes(source)
            for key, words in source.value().items():
                if _is_baseline(key):
                    continue
                if key not in personas:
                    raise PersonaError(
                        f"{source} has markers for {key!r}, which is not a persona; "
                        f"the personas are {', '.join(map(repr, personas))}"
                    )
                if not _is_words(words):
                    raise PersonaError(
                        f"{source} must give {key!r} a list of strings, such as ['one', 'two']"
                    )
                personas[key]["markers"] = words


def _parse(raw: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as for "\d" in somebody's string
            return ast.parse(raw)
    except SyntaxError as problem:
        raise PersonaError(
            f"line {problem.lineno or 1} is not valid Python ({problem.msg}); "
            "check that it is a Python script and that it runs"
        ) from None
    except (ValueError, MemoryError) as problem:
        why = str(problem) or "nested too deep"  # a MemoryError says nothing
        raise PersonaError(f"not readable as Python ({why}); is it a script?") from None


def _assignments(tree: ast.Module) -> Iterator[_Assignment]:
    """Give `a = v`, `a: T = v`, `a = b = v` and `a, b = v, w` of the top level, in order."""
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            yield from _targets(statement.target, statement.value)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                yield from _targets(target, statement.value)


def _targets(target: ast.expr, value: ast.expr) -> Iterator[_Assignment]:
    if isinstance(target, ast.Name):
        yield _Assignment(target.id, value)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for part, part_value in zip(target.elts, value.elts, strict=False):
            yield from _targets(part, part_value)


def _changes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Give name and line of what changes a variable, other than a top-level assignment.

    Function and class bodies are left out: they do not run when the script is imported.
    """
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        assigns = isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement):
            changed: ast.expr | None = None
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and not assigns:
                changed = node  # a |= b, del a, or an assignment within an if or a loop
            elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                changed = node.value  # a[k] = v, del a[k]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                changed = node.func.value if node.func.attr in _MUTATORS else None
            while isinstance(changed, ast.Subscript):
                changed = changed.value
            if isinstance(changed, ast.Name):
                yield changed.id, changed.lineno


class _NotLiteralError(Exception):
    def __init__(self, node: ast.expr) -> None:
        super().__init__()
        self.node = node


def _is_dict_call(node: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"


def _literal(node: ast.expr) -> Any:
    """Evaluate like `ast.literal_eval`, with `dict(a=1)` and `"a" + "b"`; sets become lists."""
    if isinstance(node, ast.Dict):
        pairs = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):  # a computed key, or None in {**other}
                raise _NotLiteralError(key or value)
            if isinstance(key.value, int) and key.value.bit_length() > _MOST_BITS:
                raise _NotLiteralError(key)
            pairs[key.value] = _literal(value)
        return pairs
    if _is_dict_call(node):
        for unnamed in [*node.args, *(word.value for word in node.keywords if word.arg is None)]:
            raise _NotLiteralError(unnamed)
        return {word.arg: _literal(word.value) for word in node.keywords}
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(item) for item in node.elts]
    text = _string(node)
    if text is not None:
        return text
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, OverflowError):
        raise _NotLiteralError(node) from None


def _string(node: ast.expr) -> str | None:
    """Give the text of a string, or of strings joined by +."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _string(node.left), _string(node.right)
        return None if left is None or right is None else left + right
    return None


def _text_of(value: object) -> str | None:
    if isinstance(value, dict):
        value = [value.get(field) for field in _TEXT_FIELDS]
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, str)), None)
    return value if isinstance(value, str) else None


def _maps_to_texts(value: dict[Any, Any]) -> bool:
    return len(value) > 1 and all(
        isinstance(entry, str | dict) and _text_of(entry) is not None for entry in value.values()
    )


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _is_baseline(key: object) -> bool:
    return isinstance(key, str) and key.lower() in _BASELINE_KEYS


def _with_grid_keys(entries: dict[Any, dict[str, Any]], role: str) -> dict[str, dict[str, Any]]:
    """Replace keys that a grid cannot have by slugs, numbered where two would be the same."""
    valid = {key for key in entries if isinstance(key, str) and is_key(key)}
    renamed: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    for key, entry in entries.items():
        name = base = key if key in valid else slug(str(key), role)
        while name in renamed or (key not in valid and name in valid):
            numbers[base] = numbers.get(base, 1) + 1
            name = f"{base}-{numbers[base]}"
        renamed[name] = entry
    return renamed
