"""Grids of prompts: who the model is asked to be, crossed with what it is asked to do.

A grid is data, kept in a YAML file or built from a plain mapping:

    name: mine
    template: As {persona}, {task}            # optional, this is the default
    baseline:                                 # optional, these are the defaults
      persona: a thoughtful person
      task: Give advice to someone facing a difficult decision.
    personas:
      yoda: Yoda
      chef: {text: a chef of fifteen years, markers: [simmer, mise en place]}
    tasks:
      haiku: Write a haiku about Monday mornings.
      plan: {text: "Review this plan: ...", tags: [review]}

Whatever is wrong with a grid is found when it is read and raised as one
`PersonaError`; a `Grid` in hand can be used without further checks.
"""

import os.path
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from persona_nnsight.errors import PersonaError, escaped, quoted
from persona_nnsight.method.marker_words import folded
from persona_nnsight.prompts.prompt import Span
from persona_nnsight.prompts.role_prompt import RolePrompt
from persona_nnsight.prompts.strict_yaml import parse_yaml, read_small_file

DEFAULT_TEMPLATE = "As {persona}, {task}"
DEFAULT_BASELINE_PERSONA = "a thoughtful person"
DEFAULT_BASELINE_TASK = "Give advice to someone facing a difficult decision."

_BUILTIN_NAMES = ("short", "long")
_FIELDS = ("name", "template", "baseline", "personas", "tasks")
_TEMPLATE_FIELD = re.compile(r"\{(persona|task)\}")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_KEY_RULE = (
    "use at most 64 ASCII letters, digits, '_', '-' or '.', starting with a letter, a digit or '_'"
)


@dataclass(frozen=True)
class Persona:
    """Someone the model is asked to be, with the words that give the role away (folded)."""

    key: str
    text: str
    markers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Something the model is asked to do."""

    key: str
    text: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One persona with one task."""

    persona: Persona
    task: Task


@dataclass(frozen=True)
class Grid:
    """Personas crossed with tasks, the template that joins them and the neutral baselines.

    `personas` and `tasks` always hold the whole grid in file order. `persona_keys` and
    `task_keys` name the part that is selected, which is what `cells` walks through.
    """

    name: str
    template: str
    baseline_persona: str
    baseline_task: str
    personas: tuple[Persona, ...]
    tasks: tuple[Task, ...]
    persona_keys: tuple[str, ...]
    task_keys: tuple[str, ...]

    @staticmethod
    def builtin_names() -> tuple[str, ...]:
        """Names that `Grid.load` knows without a file, smallest grid first."""
        return _BUILTIN_NAMES

    @classmethod
    def load(cls, source: str | Path) -> "Grid":
        """Read a built-in grid by name, or a YAML file by path.

        A string is tried as a built-in name first; a `Path` is always a file.
        """
        if isinstance(source, str) and source in _BUILTIN_NAMES:
            resource = files("persona_nnsight.prompts") / "builtin_grids" / f"{source}.yaml"
            raw = resource.read_bytes()
        elif isinstance(source, str) and not os.path.exists(source):
            raise PersonaError(
                f"no built-in grid and no file is called {source!r}; "
                f"the built-in grids are {_known(source, _BUILTIN_NAMES)}, "
                "and a file is given by its path, such as grids/mine.yaml"
            )
        else:
            raw = read_small_file(Path(source))
        try:
            return cls.from_dict(parse_yaml(raw))
        except PersonaError as problem:
            raise PersonaError(f"{source}: {problem}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Grid":
        """Check plain data in the YAML layout and build the grid from it.

        White space around texts is dropped (YAML block scalars end in a line break),
        markers are folded as texts are that they are looked for in
        (`persona_nnsight.method.marker_words`), and a marker or tag given twice is kept once.
        """
        top = _mapping(data, "the grid", _FIELDS)
        for field in ("name", "personas", "tasks"):
            if field not in top:
                raise PersonaError(
                    f"the grid has no {field!r}; it needs 'name', 'personas' and 'tasks', "
                    "and may have 'template' and 'baseline'"
                )
        baseline = _mapping(top.get("baseline", {}), "'baseline'", ("persona", "task"))
        personas = tuple(
            Persona(
                key,
                text,
                _unique(
                    _text(folded(marker), f"'personas.{key}.markers[{number}]'")
                    for number, marker in enumerate(markers)
                ),
            )
            for key, text, markers in _entries(top["personas"], "personas", "markers")
        )
        tasks = tuple(
            Task(key, text, _unique(tags))
            for key, text, tags in _entries(top["tasks"], "tasks", "tags")
        )
        return cls(
            name=_key(top["name"], "'name'"),
            template=_template(top.get("template", DEFAULT_TEMPLATE)),
            baseline_persona=_text(
                baseline.get("persona", DEFAULT_BASELINE_PERSONA), "'baseline.persona'"
            ),
            baseline_task=_text(baseline.get("task", DEFAULT_BASELINE_TASK), "'baseline.task'"),
            personas=personas,
            tasks=tasks,
            persona_keys=tuple(persona.key for persona in personas),
            task_keys=tuple(task.key for task in tasks),
        )

    @classmethod
    def single(cls, persona: str, task: str) -> "Grid":
        """Make a grid of one cell from two texts, with the default template and baselines."""
        persona = _text(persona, "the persona")
        task = _text(task, "the task")
        return cls.from_dict(
            {
                "name": "single",
                "personas": {slug(persona, "persona"): persona},
                "tasks": {slug(task, "task"): task},
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the whole grid, whatever is selected, as plain data that `from_dict` accepts."""
        return {
            "name": self.name,
            "template": self.template,
            "baseline": {"persona": self.baseline_persona, "task": self.baseline_task},
            "personas": {
                p.key: {"text": p.text, "markers": list(p.markers)} if p.markers else p.text
                for p in self.personas
            },
            "tasks": {
                t.key: {"text": t.text, "tags": list(t.tags)} if t.tags else t.text
                for t in self.tasks
            },
        }

    def to_yaml(self, *, ascii_only: bool = False) -> str:
        """Write the whole grid, whatever is selected, as YAML that `load` accepts.

        Letters are written by their numbers with `ascii_only`, or where one of them would not show.
        """
        text = self._dump(allow_unicode=True)
        return self._dump(allow_unicode=False) if ascii_only or escaped(text) != text else text

    def _dump(self, *, allow_unicode: bool) -> str:
        text: str = yaml.safe_dump(
            self.to_dict(), sort_keys=False, allow_unicode=allow_unicode, width=88
        )
        return text

    def select(
        self, personas: Sequence[str] | None = None, tasks: Sequence[str] | None = None
    ) -> "Grid":
        """Choose personas and tasks by key, out of the whole grid; None keeps what is selected.

        The order is the file's and a repeated key counts once, so that the same choice is
        the same grid however it was typed.
        """
        return replace(
            self,
            persona_keys=self._chosen("persona", personas, self.personas, self.persona_keys),
            task_keys=self._chosen("task", tasks, self.tasks, self.task_keys),
        )

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The selected cells: every task of the first persona, then of the second, and so on."""
        personas = {persona.key: persona for persona in self.personas}
        tasks = {task.key: task for task in self.tasks}
        return tuple(Cell(personas[x], tasks[y]) for x in self.persona_keys for y in self.task_keys)

    def prompt(self, persona: Persona | None, task: Task | None) -> str:
        """Fill the template; None stands for the baseline. Braces within a text stay as they are.

        The four prompts of a cell are BB `prompt(None, None)`, XB `prompt(persona, None)`,
        BY `prompt(None, task)` and XY `prompt(persona, task)`.
        """
        return self.role_prompt(persona, task).text

    def role_prompt(self, persona: Persona | None, task: Task | None) -> RolePrompt:
        """Fill the template as `prompt` does, and say where the two texts are in it."""
        texts = {
            "persona": self.baseline_persona if persona is None else persona.text,
            "task": self.baseline_task if task is None else task.text,
        }
        filled, copied = "", 0
        spans: dict[str, Span] = {}
        for field in _TEMPLATE_FIELD.finditer(self.template):
            filled += self.template[copied : field.start()]
            spans[field[1]] = len(filled), len(filled) + len(texts[field[1]])
            filled += texts[field[1]]
            copied = field.end()
        return RolePrompt(filled + self.template[copied:], spans["persona"], spans["task"])

    def donor(self, persona: Persona) -> Persona | None:
        """Give the persona that follows in the whole grid (the first follows the last).

        It lends its vector to the `other_x` control, so it does not depend on what is
        selected. A grid of one persona has no donor.
        """
        keys = [known.key for known in self.personas]
        if persona.key not in keys:
            raise PersonaError(self._unknown("persona", [persona.key], keys))
        if len(keys) == 1:
            return None
        return self.personas[(keys.index(persona.key) + 1) % len(keys)]

    def _chosen(
        self,
        kind: str,
        wanted: Sequence[str] | None,
        entries: Iterable[Persona | Task],
        current: tuple[str, ...],
    ) -> tuple[str, ...]:
        if wanted is None:
            return current
        if isinstance(wanted, str):
            raise PersonaError(f"{kind}s are chosen by a list of keys: write [{wanted!r}]")
        keys = [entry.key for entry in entries]
        if not wanted:
            raise PersonaError(
                f"no {kind} is selected; choose at least one of {', '.join(keys)}, or None for all"
            )
        unknown = [key for key in wanted if key not in keys]
        if unknown:
            raise PersonaError(self._unknown(kind, unknown, keys))
        return tuple(key for key in keys if key in wanted)

    def _unknown(self, kind: str, unknown: list[str], keys: list[str]) -> str:
        named = ", ".join(map(repr, unknown))
        return (
            f"no {kind} {named} in the grid {self.name!r}; its {kind}s are "
            f"{_known(unknown[0], keys)}"
        )


def slug(text: str, fallback: str, limit: int = 24) -> str:
    """Make a short key out of a text: 'Warren Buffett' becomes 'warren-buffett'.

    Whole words are kept up to `limit` characters; `fallback` is for texts without a single
    letter or digit that survives in ASCII.
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    joined = "-".join(re.findall(r"[a-z0-9]+", ascii_text)) or fallback
    if len(joined) <= limit:
        return joined
    return joined[: limit + 1].rpartition("-")[0] or joined[:limit]


def is_key(text: str) -> bool:
    """Whether a text can be the key of a persona or a task, or the name of a grid."""
    return _KEY.fullmatch(text) is not None


def _known(unknown: str, known: Sequence[str]) -> str:
    """List what is known, with the nearest to a misspelt one."""
    close = get_close_matches(unknown, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{', '.join(known)}{hint}"


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


# Plain data -> checked values. `where` says which value a message is about.


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a {type(value).__name__}"


def _mapping(value: object, where: str, allowed: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        expected = f"a mapping with {', '.join(allowed)}" if allowed else "a mapping of key to text"
        raise PersonaError(f"{where} must be {expected}, not {_kind(value)}")
    for key in value:
        if not isinstance(key, str):
            raise PersonaError(
                f"{where} has the key {key!r}, which is {_kind(key)}; keys are texts, "
                f"so put it in quotes: {str(key)!r}"
            )
        if allowed is not None and key not in allowed:
            raise PersonaError(
                f"{where} has an unknown field {quoted(key)}; "
                f"the known ones are {_known(key, allowed)}"
            )
    return dict(value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PersonaError(f"{where} must be a text, not {_kind(value)}; put it in quotes")
    text = value.strip()
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\r\t":
            raise PersonaError(
                f"{where} contains the character U+{ord(char):04X}, which is no text; remove it"
            )
    # Marks of direction or of zero width alone show nothing either.
    if all(unicodedata.category(char) in ("Cf", "Zs", "Cc") for char in text):
        raise PersonaError(f"{where} is empty; write its text or remove it")
    return text


def _key(value: object, where: str) -> str:
    key = _text(value, where)
    if not is_key(key):
        raise PersonaError(f"{where} is {quoted(key)}, which cannot be a key; {_KEY_RULE}")
    return key


def _template(value: object) -> str:
    template = _text(value, "'template'")
    if sorted(_TEMPLATE_FIELD.findall(template)) != ["persona", "task"]:
        raise PersonaError(
            f"'template' is {quoted(template)}, but must contain {{persona}} and {{task}} once "
            f"each, as in {DEFAULT_TEMPLATE!r}"
        )
    return template


def _entries(value: object, field: str, extra: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    entries = _mapping(value, f"{field!r}")
    if not entries:
        raise PersonaError(f"{field!r} is empty; give at least one 'key: text'")
    for key, entry in entries.items():
        where = f"{field}.{key}"
        if not is_key(key):
            raise PersonaError(f"{field!r} has the key {quoted(key)}; {_KEY_RULE}")
        if isinstance(entry, str):
            yield key, _text(entry, f"'{where}'"), ()
            continue
        if not isinstance(entry, Mapping):
            raise PersonaError(
                f"'{where}' must be a text or a mapping with text, {extra}, not {_kind(entry)}"
            )
        fields = _mapping(entry, f"'{where}'", ("text", extra))
        if "text" not in fields:
            raise PersonaError(f"'{where}' has no 'text'; write {{text: ..., {extra}: [...]}}")
        words = fields.get(extra, [])
        if not isinstance(words, list | tuple):
            raise PersonaError(
                f"'{where}.{extra}' must be a list of texts, not {_kind(words)}; "
                f"write {extra}: [one, two]"
            )
        yield (
            key,
            _text(fields["text"], f"'{where}.text'"),
            tuple(_text(word, f"'{where}.{extra}[{i}]'") for i, word in enumerate(words)),
        )
