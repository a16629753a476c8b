"""The day that goes into prompts: of every experiment, fixed and recorded."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cells import MARKED
from commands import Persona, assert_one_sentence, contents, facts
from tiny import DATED, Tiny, TinyDir
from zones import EARLY, LATE, zone

import persona_nnsight
from persona_nnsight import PersonaError, capture, reproduce, steer
from persona_nnsight.experiments.registry import NAMES
from persona_nnsight.prompts.rendering import Rendering

DAY = "2024-07-26"
ONE = MARKED.select(["yoda"], ["haiku"])

#: As short as each command can be.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "capture": {"layers": (2,), "positions": "p_last"},
    "substitute": {"layers": (2,), "positions": "p_last", "conditions": "bb", "window": 2},
    "inject": {"layers": (2,), "window": 2},
    "markers": {"layers": (2,), "tokens": 2},
    "steer": {"layers": (2,), "alpha": "1", "window": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_takes_a_day_and_records_it(tiny: Tiny, tmp_path: Path, name: str) -> None:
    model = tiny("llama", chat_template=DATED)
    run = getattr(persona_nnsight, name)
    result = run(model, ONE, **ARGUMENTS[name], date=DAY)
    for prompt in result.plan.prompts:
        text = model.tokenizer.decode(list(prompt.ids))
        assert "Today Date: 26 July 2024<|im_end|>" in text
    again = run(model, ONE, **ARGUMENTS[name], date=datetime.date(2024, 7, 26))
    assert again.plan == result.plan
    result.save(tmp_path / "run")
    assert facts(tmp_path / "run")["rendering"] == {"date": DAY}
    # A template that writes none takes none, and nothing is said of it.
    undated = tiny("llama")
    with pytest.raises(PersonaError, match="writes no date"):
        run(undated, ONE, **ARGUMENTS[name], date=DAY)
    other = run(undated, ONE, **ARGUMENTS[name])
    other.save(tmp_path / "other")
    assert "rendering" not in facts(tmp_path / "other")


def test_numbers_are_those_of_the_day(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", chat_template=DATED)
    found = []
    for name, day in ((EARLY, None), (LATE, None), (EARLY, DAY), (LATE, DAY)):
        with zone(monkeypatch, name):
            result = steer(model, ONE, **ARGUMENTS["steer"], date=day)
            found.append((result.plan.rendering.date, result.frame()["kl"].tolist()))
    early, late, one, other = found
    assert early[0] != late[0]
    assert early[1] != late[1]
    assert one == other
    # Asked for by name, it is the same prompt as on that day.
    assert steer(model, ONE, **ARGUMENTS["steer"], date=early[0]).frame()["kl"].tolist() == early[1]


def test_vectors_bring_their_day(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", chat_template=DATED)
    with zone(monkeypatch, EARLY):
        vectors = capture(model, ONE, **ARGUMENTS["capture"]).vectors()
        then = steer(model, ONE, **ARGUMENTS["steer"], vectors=vectors)
    assert vectors.date == then.plan.rendering.date
    with zone(monkeypatch, LATE):
        later = steer(model, ONE, **ARGUMENTS["steer"], vectors=vectors)
        same = steer(model, ONE, **ARGUMENTS["steer"], vectors=vectors, date=vectors.date)
    assert then.plan == later.plan == same.plan
    assert then.frame().equals(later.frame())
    with pytest.raises(PersonaError, match=f"dated {vectors.date}, and .* dated {DAY}"):
        steer(model, ONE, **ARGUMENTS["steer"], vectors=vectors, date=DAY)
    # The same weights under a template that writes no date.
    undated = replace(model, tokenizer=tiny("llama").tokenizer)
    with pytest.raises(PersonaError, match=f"dated {vectors.date}, and .* without a date"):
        steer(undated, ONE, **ARGUMENTS["steer"], vectors=vectors)
    plain = capture(undated, ONE, **ARGUMENTS["capture"]).vectors()
    assert plain.date is None
    with pytest.raises(PersonaError, match=r"without a date, and .* are dated"):
        steer(model, ONE, **ARGUMENTS["steer"], vectors=plain)


def test_a_reproduction_has_one_day(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the day ends while it is planned."""
    days = iter(range(1, 9))

    class Hurried(datetime.date):
        @classmethod
        def today(cls) -> Hurried:
            return cls(2024, 2, next(days))

    monkeypatch.setattr("persona_nnsight.prompts.chat_template.date", Hurried)
    model = tiny("llama", chat_template=DATED)
    made = reproduce(model, short=ONE, long=ONE, only="table1,table2")
    assert {result.plan.rendering for result in made.results.values()} == {Rendering("2024-02-01")}
    made.save(tmp_path / "run")
    for name in ("", "table1", "table2"):
        assert facts(tmp_path / "run" / name)["rendering"] == {"date": "2024-02-01"}
    asked = reproduce(model, short=ONE, only="table1", date=DAY)
    assert asked.results["table1"].plan.rendering == Rendering(DAY)


# Commands


def options(model: Path) -> tuple[object, ...]:
    return ("-m", model, "-g", "grid.yaml", "-l", "2", "--personas", "yoda", "--tasks", "haiku")


def test_a_plan_says_the_day(persona: Persona, tiny_dir: TinyDir) -> None:
    base = ("substitute", *options(tiny_dir("llama", chat_template=DATED)), "--dry-run")
    assert "date            2024-07-26, in every prompt" in persona(*base, "--date", DAY).out
    assert json.loads(persona(*base, "--json", "--date", DAY).out)["rendering"] == {"date": DAY}
    today = json.loads(persona(*base, "--json").out)["rendering"]["date"]
    assert datetime.date.fromisoformat(today)
    plain = ("substitute", *options(tiny_dir("llama")), "--dry-run")
    assert "date" not in persona(*plain).out
    assert "rendering" not in json.loads(persona(*plain, "--json").out)
    assert_one_sentence(persona(*plain, "--date", DAY), "--date 2024-07-26 has no effect")
    assert_one_sentence(persona(*base, "--date", "26.7."), "--date is '26.7.'", "YYYY-MM-DD")


@pytest.mark.parametrize("name", [*NAMES, "reproduce"])
def test_every_command_takes_a_day(persona: Persona, tiny_dir: TinyDir, name: str) -> None:
    model = tiny_dir("llama", chat_template=DATED)
    Path("grid.yaml").write_text(ONE.to_yaml(), encoding="utf-8")
    chosen = (
        ("-m", model, "-g", "short=grid.yaml", "--only", "table1")
        if name == "reproduce"
        else options(model)
    )
    said = json.loads(persona(name, *chosen, "--date", DAY, "--dry-run", "--json").out)
    (plan,) = said["passes"] if name == "reproduce" else [said]
    assert plan["rendering"] == {"date": DAY}


def test_vectors_of_a_command(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("steer", *options(tiny_dir("llama", chat_template=DATED)), "--alpha", "0,1")
    with zone(monkeypatch, EARLY):
        assert persona(*base, "--save-vectors", "v.safetensors", "-o", "a").code == 0
        assert persona(*base, "--vectors", "v.safetensors", "-o", "b").code == 0
    with zone(monkeypatch, LATE):
        assert persona(*base, "--vectors", "v.safetensors", "-o", "c").code == 0
    assert contents(Path("b")) == contents(Path("c"))
    day = facts(Path("a"))["rendering"]["date"]
    assert facts(Path("c"))["rendering"] == {"date": day}
    assert f"date in prompts   {day}" in persona("vectors", "v.safetensors").out
    assert persona("report", "c").code == 0
    page = Path("c/report.html").read_text(encoding="utf-8")
    assert re.search(rf"date in prompts</\w+>\s*<\w+>{day}<", page)
    refused = persona(*base, "--vectors", "v.safetensors", "--date", DAY, "-o", "d")
    assert_one_sentence(refused, f"measured on prompts dated {day}", f"are dated {DAY}")
    assert not Path("d").exists()


def test_what_is_saved_beside_a_run_has_its_day(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = iter(range(1, 9))

    class Hurried(datetime.date):
        @classmethod
        def today(cls) -> Hurried:
            return cls(2024, 2, next(days))

    monkeypatch.setattr("persona_nnsight.prompts.chat_template.date", Hurried)
    base = ("steer", *options(tiny_dir("llama", chat_template=DATED)), "--alpha", "1")
    assert persona(*base, "--save-vectors", "v.safetensors", "-o", "a").code == 0
    assert persona_nnsight.Vectors.load("v.safetensors").date == "2024-02-01"
