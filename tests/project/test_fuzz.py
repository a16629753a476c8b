"""Any text and any file: a value that keeps its promises, or PersonaError."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from fuzz import checks
from fuzz.damage import ODD_WORDS, spoilt_bytes, spoilt_csv, spoilt_json_file, spoilt_safetensors
from fuzz.samples import GRID, PENDING, SCRIPT, run_files
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy

from persona_nnsight import Grid
from persona_nnsight.errors import PersonaError
from persona_nnsight.experiments.steer import parse_factors
from persona_nnsight.method.conditions import SUBSTITUTE_CONDITIONS

samples = cache(run_files)


def expressions(*words: str) -> SearchStrategy[str]:
    """Texts of an expression's own words, odd ones, and anything."""
    pieces = st.sampled_from((*words, *ODD_WORDS)) | st.text(max_size=3)
    return st.lists(pieces, max_size=8).map("".join) | st.text(max_size=30)


LAYERS = expressions(*"0123456789", "all", "-", ":", "%", ".", ",", ";", " ", "25%", "4-12:2")
FACTORS = expressions(*"0123456789", ".", ":", ",", "-", "e", "0:2:0.5", "0.1", "_", "1e308")


@given(LAYERS, st.integers(1, 60))
def test_layers(text: str, n_layers: int) -> None:
    checks.check_layers(text, n_layers)
    checks.check_layer_sets(text, n_layers)


PARSERS: dict[str, tuple[Callable[[str], None], SearchStrategy[str]]] = {
    "positions": (
        checks.check_positions,
        expressions("p_last", "p_user_last", "g1", "g9", "g10", "g0", ",", " "),
    ),
    "conditions": (checks.check_conditions, expressions(*SUBSTITUTE_CONDITIONS, ",", " ", "host")),
    "targets": (checks.check_targets, expressions("table1", "table4", "figure1", ",", " ")),
    "factors": (checks.check_factors, FACTORS),
    "budget": (checks.check_budget, expressions("1", "0", "8", ".", "MB", "gb", "G", " ", "B")),
    "device": (checks.check_device, expressions("cuda", "cuda:", "1", "²", "cpu", "balanced")),
    "model": (checks.check_model_spec, expressions("a", "/", ".", "..", "~", "--", ".gguf", "-")),
}


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_expressions(name: str, data: DataObject) -> None:
    check, texts = PARSERS[name]
    check(data.draw(texts))


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (checks.check_budget, "9" * 400 + "GB"),
        (checks.check_budget, "0.0000001MB"),
        (checks.check_device, "cuda:²"),
        (checks.check_device, "cuda:"),
        (checks.check_model_spec, "~a\0b"),
        (checks.check_model_spec, "/" + "9" * 400),
        (checks.check_model_spec, "e" * 96 + "/t"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:20]),
)
def test_expressions_that_were_not_refused(check: Callable[[str], None], text: str) -> None:
    check(text)


@pytest.mark.parametrize("factors", [10**400, [10**400], ["x"], [None]], ids=repr)
def test_factors_that_are_no_numbers(factors: Any) -> None:
    with pytest.raises(PersonaError, match="write numbers as"):
        parse_factors(factors, "--alpha")


WORDS = st.text(alphabet="ab -İıςΣſßﬁK\u0307_é.中가ｱก\u3099™", min_size=1, max_size=6) | st.text(
    min_size=1, max_size=6
)


@given(
    st.lists(WORDS, max_size=6).map("".join),
    st.lists(WORDS, max_size=4, unique=True),
)
def test_markers(text: str, markers: list[str]) -> None:
    checks.check_markers(text, markers)


YAML = GRID.to_yaml().encode()


@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes_as_a_grid_or_a_script(raw: bytes) -> None:
    checks.check_grid(raw)
    checks.check_script(raw)


@given(spoilt_bytes(YAML))
def test_a_spoilt_grid(raw: bytes) -> None:
    checks.check_grid(raw)


TEXTS = st.text(min_size=1, max_size=12) | st.sampled_from(ODD_WORDS)
KEYS = st.text(alphabet="aZ0_.-", min_size=1, max_size=3) | st.sampled_from(
    ("null", "yes", "1", "1.5", "1e3", "0x1", "2001-01-01", "_", "a.b-c", "é")
)


@given(
    st.fixed_dictionaries(
        {
            "name": KEYS,
            "personas": st.dictionaries(
                KEYS,
                TEXTS
                | st.fixed_dictionaries({"text": TEXTS, "markers": st.lists(TEXTS, max_size=2)}),
                max_size=3,
            ),
            "tasks": st.dictionaries(KEYS, TEXTS, max_size=3),
        },
        optional={
            "baseline": st.fixed_dictionaries({}, optional={"persona": TEXTS, "task": TEXTS}),
            "template": st.permutations(["{persona}", "{task}", "{x}", "%s"]).map(" ".join),
        },
    )
)
def test_a_grid_of_any_texts_survives_its_file(data: dict[str, object]) -> None:
    with checks.refused():
        checks.assert_grid(Grid.from_dict(data))


@given(spoilt_bytes(SCRIPT))
def test_a_spoilt_script(raw: bytes) -> None:
    checks.check_script(raw)


def test_a_refusal_of_a_key_with_a_line_break_is_one_line() -> None:
    checks.check_script(SCRIPT.replace(b'"yoda": "Yo"', b'"yo\\nda": "Yo"'))


@pytest.mark.parametrize("entry", [b"'a': 0x%s + 1j", b"0x%s: 'a'", b"'a': x + 0x%s"], ids=str)
def test_a_script_with_a_huge_number(entry: bytes) -> None:
    personas = entry % (b"F" * 4000)
    checks.check_script(b"PERSONAS = {%s, 'b': 'c'}\nTASKS = {'a': 'b'}" % personas)


@pytest.mark.parametrize("command", ["capture", "steer", "markers"])
@given(data=st.data())
def test_a_spoilt_run(command: str, data: DataObject) -> None:
    files = {name: raw for name, raw in samples()[command].items() if "safetensors" not in name}
    name = data.draw(st.sampled_from(sorted(files)))
    match name.rpartition(".")[2]:
        case "json":
            spoilt = spoilt_json_file(files[name])
        case "csv":
            spoilt = spoilt_bytes(files[name]) | spoilt_csv(files[name])
        case _:
            spoilt = spoilt_bytes(files[name])
    checks.check_run({**files, name: data.draw(spoilt)})


@given(data=st.data())
def test_spoilt_vectors(data: DataObject) -> None:
    checks.check_vectors(data.draw(spoilt_safetensors(samples()["vectors"]["v.safetensors"])))


@given(spoilt_json_file(PENDING))
def test_a_spoilt_record_of_jobs(raw: bytes) -> None:
    checks.check_ledger(raw)
