"""`persona doctor`, of a server and of this machine."""

from __future__ import annotations

import json
from typing import Any

import nnsight
import pytest
import torch
from commands import Outcome, Persona
from fake_ndif import DROP, KEY, FakeNdif, Reply
from ndif_world import assert_no_key
from tiny import TinyDir

pytestmark = pytest.mark.usefixtures("key")


def findings(outcome: Outcome) -> dict[str, tuple[str, str]]:
    return {found["what"]: (found["verdict"], found["text"]) for found in json.loads(outcome.out)}


def test_doctor_of_a_server(fake: FakeNdif, persona: Persona, tiny_dir: TinyDir) -> None:
    arguments = ("doctor", "-m", tiny_dir("llama"), "--backend", "ndif", "--ndif-host", fake.url)
    outcome = persona(*arguments, "--json")
    assert outcome.code == 0, outcome.out
    found = findings(outcome)
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert "someone@example.org" in found["API key"][1]
    assert "running" in found["model there"][1]
    assert_no_key(outcome)
    outcome = persona(*arguments)
    assert outcome.code == 0
    assert "someone@example.org" in outcome.out
    assert_no_key(outcome)
    assert fake.posts == 0


@pytest.mark.parametrize(
    ("prepare", "what", "verdict", "code"),
    [
        ({"packages": {"nnsight": "0.6.1"}}, "nnsight there", "problem", 1),
        ({"replies": {"/connected": [Reply(503)]}}, "server", "problem", 1),
        ({"replies": {"/env": [Reply(404)]}}, "versions there", "problem", 1),
        ({"replies": {"/env": [Reply(503, KEY.encode())]}}, "versions there", "problem", 1),
        ({"replies": {"/status": [Reply(500, KEY.encode())]}}, "model there", "problem", 1),
        ({"replies": {"/whoami": [Reply(401, {"detail": KEY})]}}, "API key", "note", 0),
        ({"replies": {"/whoami": [DROP]}}, "API key", "note", 0),
        ({"deployments": {}}, "model there", "note", 0),
        ({"python": "3.8.0"}, "python there", "ok", 0),
    ],
)
def test_doctor_finds(
    fake: FakeNdif,
    persona: Persona,
    tiny_dir: TinyDir,
    prepare: dict[str, Any],
    what: str,
    verdict: str,
    code: int,
) -> None:
    for name, value in prepare.items():
        setattr(fake, name, value)
    outcome = persona(
        *("doctor", "-m", tiny_dir("llama"), "--remote", "--ndif-host", fake.url, "--json")
    )
    assert outcome.code == code, outcome.out
    assert findings(outcome)[what][0] == verdict
    assert_no_key(outcome)


def test_doctor_of_a_server_that_is_down(persona: Persona, tiny_dir: TinyDir) -> None:
    with FakeNdif() as gone:
        url = gone.url
    outcome = persona("doctor", "-m", tiny_dir("llama"), "--remote", "--ndif-host", url, "--json")
    assert outcome.code == 1
    assert findings(outcome)["server"][0] == "problem"
    assert "does not answer" in findings(outcome)["server"][1]
    assert_no_key(outcome)


def test_doctor_without_a_key(
    fake: FakeNdif, persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    outcome = persona(
        *("doctor", "-m", tiny_dir("llama"), "--remote", "--ndif-host", fake.url, "--json")
    )
    assert outcome.code == 0, outcome.out
    assert findings(outcome)["API key"][0] == "note"


def test_doctor_of_this_machine(persona: Persona, tiny_dir: TinyDir) -> None:
    outcome = persona("doctor", "-m", tiny_dir("llama"), "--json")
    assert outcome.code == 0, outcome.out
    assert set(findings(outcome)) == {
        "python",
        "nnsight",
        "torch",
        "transformers",
        "model here",
        "dtype",
    }


def test_doctor_says_what_the_dtype_costs(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ("doctor", "-m", tiny_dir("llama"), "--json")
    assert findings(persona(*here))["dtype"] == (
        "ok",
        "float32 on cpu: rounding stays below 1e-5 nats",
    )
    monkeypatch.setattr(
        "persona_nnsight.models.loading.default_placement", lambda: ("cuda:0", torch.bfloat16)
    )
    verdict, text = findings(persona(*here))["dtype"]
    assert verdict == "note"
    assert text.startswith("bfloat16 on cuda:0: rounding shows in KLs")
