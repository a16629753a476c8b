"""YAML of texts, lists and mappings, and nothing else that YAML has.

No numbers, dates or truth values (an unquoted ``yes`` is refused, not guessed), no anchors (which
can blow up a small file), no tags, no key given twice.
"""

from pathlib import Path
from typing import Any

import yaml

from persona_nnsight.errors import PersonaError, quoted

_MAX_BYTES = 1024 * 1024
_MAX_DEPTH = 16  # a grid needs five levels


def read_small_file(path: Path) -> bytes:
    """Read a text file that a person wrote, refusing what cannot be read or is over 1 MiB."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise PersonaError(
            f"no file {str(path)!r}; check the path (it is taken from {Path.cwd()})"
        ) from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise PersonaError(
            f"{str(path)!r} cannot be read ({reason}); give the path of a readable text file"
        ) from None
    if len(raw) > _MAX_BYTES:
        raise PersonaError(
            f"{str(path)!r} is larger than 1 MiB, the most that is read; "
            "is it the right file, or can it be split into several grids?"
        )
    return raw


class _StrictYamlError(yaml.MarkedYAMLError):
    """Legal YAML that a grid does not use."""

    def __init__(self, problem: str, mark: yaml.Mark | None) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _StrictLoader(yaml.SafeLoader):
    """Compose nodes without anchors and aliases, which can blow up a small file, and not deep."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise _StrictYamlError(
                "anchors (&) and aliases (*) are not allowed in a grid; write the text out, "
                "in quotes if it starts with & or *",
                event.start_mark,
            )
        if (tag := getattr(event, "tag", None)) is not None:
            short = quoted(tag.replace(_TAG, "!!"))
            raise _StrictYamlError(
                f"tags such as {short} are not allowed in a grid; write plain texts, lists and "
                "mappings",
                event.start_mark,
            )
        if self.depth == _MAX_DEPTH:
            raise _StrictYamlError("the nesting is too deep for a grid", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"
_READ_AS = {
    f"{_TAG}bool": "true or false",
    f"{_TAG}int": "a number",
    f"{_TAG}float": "a number",
    f"{_TAG}timestamp": "a date",
    f"{_TAG}null": "nothing",
    f"{_TAG}merge": "a merge of mappings",
}


def parse_yaml(raw: bytes) -> Any:
    """Read the text of a grid file as plain data: texts, lists and mappings.

    Raises:
        PersonaError: not UTF-8, not YAML, or YAML that a grid does not use; names the line.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise PersonaError(f"line {line} is not UTF-8; save the file as UTF-8 text") from None
    try:
        node = yaml.compose(text, Loader=_StrictLoader)
        if node is None:
            raise PersonaError("the file is empty; a grid needs 'name', 'personas' and 'tasks'")
        return _plain(node)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = 1 if mark is None else mark.line + 1
        hint = "" if isinstance(problem, _StrictYamlError) else _SYNTAX_HINT
        raise PersonaError(f"line {line}: {problem.problem}{hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as problem:  # "\U99999999" is no YAMLError
        first = str(problem).partition("\n")[0]
        raise PersonaError(f"not a YAML text ({first}); save the file as plain text") from None


_SYNTAX_HINT = "; a text with ': ', ' #' or a special first character needs quotes around it"


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
                raise _StrictYamlError(f"the key {_not_text(key_node)}", key_node.start_mark)
            if key_node.value in data:
                raise _StrictYamlError(
                    f"the key {key_node.value!r} is there twice; rename or remove one",
                    key_node.start_mark,
                )
            data[key_node.value] = _plain(value_node)
        return data
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
        return node.value
    raise _StrictYamlError(f"the value {_not_text(node)}", node.start_mark)


def _not_text(node: yaml.Node) -> str:
    """End the sentence 'the key ...' or 'the value ...' for a node that is not a text."""
    if not isinstance(node, yaml.ScalarNode):
        return "is not a text; write plain texts, lists and mappings"
    if not node.value:
        return "is missing here; write it, or remove the line"
    read_as = _READ_AS.get(node.tag, "something else")
    return f'{node.value!r} is read by YAML as {read_as}; put it in quotes: "{node.value}"'
