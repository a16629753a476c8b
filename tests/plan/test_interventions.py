"""What interventions answer, and which of them are read from data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from trees import plan_of

from persona_nnsight import PersonaError
from persona_nnsight.engine.acts import ACTS
from persona_nnsight.plan.data import from_data, to_data
from persona_nnsight.plan.interventions import KINDS, Unedited, Write
from persona_nnsight.plan.plan import Edit

WRITE = Write("cached", ("p_last", "g2"), (14, 9))
STEER = Write("steer", ("g1",), (8,), alpha=2.0, beta=0.5)
HOST = Unedited("host", ("p_last", "g2"))


def test_where_a_write_begins() -> None:
    assert (WRITE.lowest_layer, WRITE.first, WRITE.anchor) == (9, "p_last", "p_last")
    assert (STEER.lowest_layer, STEER.first, STEER.anchor) == (8, "g1", "g1")


def test_the_columns_of_a_write() -> None:
    assert WRITE.columns == {"condition": "cached", "position": "p_last+g2", "layers": "14+9"}
    assert STEER.columns == {
        **{"condition": "steer", "position": "g1", "layers": "8"},
        **{"alpha": 2.0, "beta": 0.5},
    }


def test_the_prompts_that_a_write_reads() -> None:
    assert STEER.reads == ("BB", "XB", "BY")
    assert Edit(STEER, host="BY").prompts == ("BY", "BB", "XB", "BY")
    assert "OB" in Write("other_x", ("p_last",), (8,)).reads


def test_which_writes_share_a_batch() -> None:
    key = Edit(WRITE).batch_key
    assert Edit(replace(WRITE, condition="oracle")).batch_key == key
    assert Edit(replace(WRITE, alpha=0.0), generate=3, cells=(1,)).batch_key == key
    others = [
        Edit(WRITE, host="BY"),
        Edit(replace(WRITE, layers=(9,))),
        Edit(replace(WRITE, positions=("p_last",))),
        Edit(HOST),
    ]
    assert len({key, *(edit.batch_key for edit in others)}) == 5


def test_an_unedited_run_touches_nothing() -> None:
    assert (HOST.lowest_layer, HOST.first, HOST.reads) == (None, "p_last", ())
    edit = Edit(HOST, host="BY")
    assert edit.is_unedited
    assert not Edit(WRITE).is_unedited
    assert (edit.name, edit.prompts) == ("host", ("BY",))
    assert edit.columns == {
        **{"condition": "host", "host": "BY", "position": "p_last+g2", "layers": "none"}
    }


def test_every_kind_is_read_and_acts() -> None:
    assert KINDS.keys() == ACTS.keys()
    assert {each.kind: type(each) for each in (HOST, WRITE)} == KINDS


def data_of(**changes: object) -> dict[str, Any]:
    """The data of a plan with one write, of which some is other."""
    data: dict[str, Any] = json.loads(json.dumps(to_data(plan_of([(1, 2)], edits=(Edit(WRITE),)))))
    data["edits"][0]["intervention"].update(changes)
    return data


def test_a_write_is_read_as_it_was() -> None:
    assert from_data(data_of()).edits == (Edit(WRITE),)


@pytest.mark.parametrize("kind", ["erase", "Write", "", None, 3, ["write"], {"write": 1}])
def test_an_unknown_kind_is_refused_in_a_sentence(kind: object) -> None:
    with pytest.raises(PersonaError, match=r"^The plan asks for an intervention of kind .*\.$"):
        from_data(data_of(kind=kind))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="heads"):
        from_data(data_of(heads=[1]))
    with pytest.raises(TypeError, match="layers"):
        from_data(data_of(kind="unedited"))
