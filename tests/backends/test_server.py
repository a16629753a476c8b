"""What the client makes of a server's answers: good, bad, missing and malicious ones."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
import zstandard
from fake_ndif import (
    DROP,
    KEY,
    PACKAGES,
    Clock,
    FakeJob,
    FakeNdif,
    Reply,
    packed,
)

from persona_nnsight import PersonaError
from persona_nnsight.backends.ndif.server import JobLostError, NoAnswerError, Server
from persona_nnsight.backends.ndif.versions import compare_versions, require_same_nnsight

pytestmark = pytest.mark.usefixtures("key")


@pytest.fixture
def fake() -> Iterator[FakeNdif]:
    """A server that does not compute."""
    with FakeNdif() as server:
        yield server


def submit(server: Server) -> str:
    return server.submit("a-model", {"attn_implementation": "sdpa"}, b"\r\n--the\x00blob\r\n")


# ---------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8001", "http://localhost:8001/", "http://[::1]:8001", "http://127.9.9.9"],
)
def test_plain_http_to_this_machine(url: str) -> None:
    assert Server(url).host == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("http://ndif.example.org", "http://192.168.0.7:8001", "http://127.0.0.1.example.org"),
        *("http://localhost.example.org", "HTTP://example.org"),
    ],
)
def test_plain_http_to_another_machine(url: str) -> None:
    with pytest.raises(PersonaError, match=r"plain http to another machine.*--insecure"):
        Server(url)
    assert Server(url, insecure=True).host == url


def test_https_is_fine_everywhere() -> None:
    assert Server("https://ndif.example.org/").host == "https://ndif.example.org"


@pytest.mark.parametrize(
    "url",
    [
        *("nonsense", "ndif.example.org", "127.0.0.1:8001", "http://", "https:///path", "http:///"),
        *("ftp://127.0.0.1/", "file:///etc/passwd", "http://[::1", "http://[half/", "://"),
        *("http://127.0.0.1:port", "http://127.0.0.1:99999999", "https://exa mple.org"),
    ],
)
def test_nonsense_addresses(url: str) -> None:
    with pytest.raises(PersonaError, match="is not a URL") as refused:
        Server(url, insecure=True)
    assert "\n" not in str(refused.value)


def test_the_configured_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://configured.example.org/")
    assert Server().host == "https://configured.example.org"
    assert Server("http://127.0.0.1:1").host == "http://127.0.0.1:1"


def test_no_proxy_for_this_machine(fake: FakeNdif, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Server(fake.url).connected()
    fake.jobs.append(FakeJob("a", {}, b"", [], result=good_result()))
    assert Server(fake.url).fetch(f"{fake.url}/result/a")[1] > 0


# -------------------------------------------------------------------------------- what it is


def test_what_a_server_says_of_itself(fake: FakeNdif) -> None:
    fake.deployments = {"a": ["RUNNING", "DEPLOYING"], "b": ["RUNNING"]}
    server = Server(fake.url)
    assert server.connected()
    assert server.environment()["packages"] == PACKAGES
    there = {key: list(replicas.values()) for key, replicas in server.deployments().items()}
    assert there == fake.deployments
    assert len(server.deployments()["a"]) == 2
    assert server.identity() == "someone@example.org"
    assert {seen.headers["ndif-api-key"] for seen in fake.seen} == {KEY}


def test_a_server_that_has_lost_its_compute(fake: FakeNdif) -> None:
    fake.replies = {"/connected": [Reply(503, "no")]}
    assert not Server(fake.url).connected()


def test_replicas_without_a_model_key(fake: FakeNdif) -> None:
    told = {"deployments": {"the-name": {"application_state": "RUNNING"}}}
    fake.replies = {"/status": [Reply(200, told)]}
    assert Server(fake.url).deployments() == {"the-name": {"the-name": "RUNNING"}}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b"<html>"),
        Reply(200, []),
        Reply(503, b""),
        Reply(200, {"deployments": [1]}),
        DROP,
    ],
)
def test_unreadable_states(fake: FakeNdif, reply: Reply) -> None:
    fake.replies = {"/status": [reply]}
    with pytest.raises(NoAnswerError):
        Server(fake.url).deployments()


@pytest.mark.parametrize("body", [b"<html>", [], {"email": None}, {"detail": "no key"}])
def test_a_server_that_names_no_owner(fake: FakeNdif, body: Any) -> None:
    fake.replies = {"/whoami": [Reply(200, body)]}
    assert Server(fake.url).identity() is None


@pytest.mark.parametrize(
    "reply",
    [
        *(Reply(404, {"detail": "Not Found"}), Reply(200, b"<html>"), Reply(200, [])),
        *(Reply(200, {"packages": None}), Reply(500, {"packages": {}}), Reply(403, b"")),
    ],
)
def test_no_ndif_server(fake: FakeNdif, reply: Reply) -> None:
    fake.replies = {"/env": [reply]}
    with pytest.raises(PersonaError, match=f"/env: HTTP {reply.status}.*no NDIF server"):
        Server(fake.url).environment()


def test_the_environment_comes_later(fake: FakeNdif, clock: Clock) -> None:
    fake.replies = {"/env": [Reply(502), Reply(503), Reply(504), DROP]}
    server, said = Server(fake.url), list[str]()
    assert server.patiently(server.environment, said.append)["packages"] == PACKAGES
    assert len(said) == len(clock.sleeps) == fake.calls("/env") - 1 == 4


# ----------------------------------------------------------------------------------- versions


def test_versions_side_by_side() -> None:
    pairs = compare_versions({"python_version": sys.version, "packages": PACKAGES})
    assert [pair.name for pair in pairs] == ["nnsight", "transformers", "torch", "python"]
    assert not any(pair.consequence or pair.fatal for pair in pairs)
    assert all(pair.here.split("+")[0] == str(pair.there).split("+")[0] for pair in pairs)


def test_versions_that_differ() -> None:
    theirs = {"nnsight": "0.6.2", "transformers": "4.57.1", "torch": "1.0.0"}
    pairs = compare_versions({"python_version": "3.8.1 (main)", "packages": theirs})
    assert {pair.name: pair.there for pair in pairs} == {**theirs, "python": "3.8.1"}
    assert [pair.name for pair in pairs if pair.fatal] == ["nnsight"]
    assert [pair.name for pair in pairs if pair.consequence] == ["nnsight", "transformers"]


def test_another_patch_of_nnsight_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_nnsight.backends.ndif.versions.version", lambda _: "0.8.1")
    require_same_nnsight({"packages": {"nnsight": "0.8.0"}}, "a-host")
    for theirs, advice in {
        "0.7.3": r"a release of persona-nnsight for nnsight 0\.7",
        "0.9.0": r"a release of persona-nnsight for nnsight 0\.9",
        "1.8.0": r"a release of persona-nnsight for nnsight 1\.8",
        "nonsense": "use another server",
    }.items():
        with pytest.raises(PersonaError, match=f"a-host runs nnsight {theirs} .* 0.8.1.*{advice}"):
            require_same_nnsight({"packages": {"nnsight": theirs}}, "a-host")
    with pytest.raises(PersonaError, match="no nnsight that it names"):
        require_same_nnsight({"packages": {}}, "a-host")


# --------------------------------------------------------------------------------------- jobs


def test_a_job_as_it_arrives(fake: FakeNdif) -> None:
    assert submit(Server(fake.url)) == "job-1"
    job = fake.jobs[0]
    assert job.blob == b"\r\n--the\x00blob\r\n"
    assert job.envelope == {
        "model_key": "a-model",
        "session_id": "",
        "compress": True,
        "env": {"attn_implementation": "sdpa"},
    }
    headers = fake.seen[-1].headers
    assert headers["ndif-api-key"] == KEY
    assert headers["nnsight-version"] == PACKAGES["nnsight"]
    assert headers["python-version"] == sys.version
    assert float(headers["ndif-timestamp"]) > 1.7e9
    assert KEY.encode() not in job.blob
    assert KEY not in json.dumps(job.envelope)


def test_without_a_key_none_is_sent(fake: FakeNdif, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    server = Server(fake.url)
    assert not server.has_key
    submit(server)
    assert "ndif-api-key" not in fake.seen[-1].headers
    fake.replies = {"/request": [Reply(401, {"detail": "Missing API key"})]}
    with pytest.raises(
        PersonaError, match=r"refuses work without an API key \(Missing API key\); set one in"
    ):
        submit(server)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(401, {"detail": f"Invalid API key {KEY!r}"}),
        Reply(403, {"detail": {"msg": "no", "key": KEY}}),
        Reply(403, KEY.encode()),
        Reply(400, {"detail": f"the key {KEY} is not known"}),
    ],
)
def test_a_refused_key_is_not_repeated(fake: FakeNdif, reply: Reply) -> None:
    fake.replies = {"/request": [reply]}
    with pytest.raises(PersonaError, match=r"refuses this API key .*check NDIF_API_KEY") as refused:
        submit(Server(fake.url))
    assert KEY not in str(refused.value)
    assert "***" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, {"detail": "Client version 0.8.1 is below\n the minimum 0.9.0"}),
        Reply(404, {"detail": "Not Found"}),
        Reply(413, b"too large"),
        Reply(422, {"detail": [{"loc": ["body", "data"], "msg": f"field required {KEY}"}]}),
        Reply(307, b""),
        Reply(200, b"<html>a page</html>"),
        Reply(200, {"no": "id"}),
        Reply(200, []),
    ],
)
def test_a_refused_job(fake: FakeNdif, reply: Reply) -> None:
    fake.replies = {"/request": [reply]}
    with pytest.raises(PersonaError, match=rf"refuses the job \(HTTP {reply.status}: ") as refused:
        submit(Server(fake.url))
    assert "persona doctor" in str(refused.value)
    assert KEY not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reply", [Reply(500, b"oops"), Reply(503), Reply(429, b"slowly"), DROP])
def test_a_job_is_sent_again(fake: FakeNdif, clock: Clock, reply: Reply) -> None:
    fake.replies = {"/request": [reply] * 3}
    server, said = Server(fake.url), list[str]()
    assert server.patiently(lambda: submit(server), said.append) == "job-1"
    assert fake.posts == 4
    assert len(said) == 3
    assert clock.sleeps == [0.5, 1.0, 2.0]


def test_a_long_explanation_is_cut(fake: FakeNdif) -> None:
    fake.replies = {"/request": [Reply(400, {"detail": "word " * 5000})]}
    with pytest.raises(PersonaError, match=r"\.\.\.\)") as refused:
        submit(Server(fake.url))
    assert len(str(refused.value)) < 600


def test_the_last_word_on_a_job(fake: FakeNdif) -> None:
    fake.scripts = [(("QUEUED", f"place 3, {KEY}"), None, ("COMPLETED", "done"))]
    server = Server(fake.url)
    job = submit(server)
    answer = server.ask(job)
    assert answer is not None
    assert (answer.status, answer.description) == ("QUEUED", "place 3, ***")
    assert (answer.url, answer.runtime) == (None, None)
    assert server.ask(job) is None
    answer = server.ask(job)
    assert answer is not None
    assert (answer.status, answer.runtime) == ("COMPLETED", 0.25)
    assert answer.url == f"{fake.url}/result/{job}"
    assert server.ask("another") is None


@pytest.mark.parametrize(
    "reply",
    [
        *(Reply(200, b"<html>"), Reply(200, []), Reply(200, {}), Reply(500, b"oops"), DROP),
        *(Reply(200, {"status": "RUNNING", "meta": {"runtime": "x"}}), Reply(401, {"detail": KEY})),
    ],
)
def test_an_unreadable_word(fake: FakeNdif, reply: Reply) -> None:
    fake.replies = {"/response": [reply]}
    with pytest.raises(NoAnswerError) as none:
        Server(fake.url).ask("job-1")
    assert KEY not in str(none.value)
    assert str(none.value)


# ----------------------------------------------------------------------------------- patience


def test_patience_ends(clock: Clock) -> None:
    with FakeNdif() as fake:
        url = fake.url
    server, said = Server(url, patience=60.0), list[str]()
    with pytest.raises(PersonaError, match=f"{url} does not answer .*try again later") as gave_up:
        server.patiently(server.connected, said.append)
    assert "\n" not in str(gave_up.value)
    assert 60 <= sum(clock.sleeps) < 61
    assert clock.sleeps[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0]
    assert max(clock.sleeps) == 15.0
    assert len(said) == len(clock.sleeps)
    assert all("trying again" in words for words in said)


def test_patience_is_for_silence_alone(clock: Clock) -> None:
    def wrong() -> None:
        raise PersonaError("as it is")

    with pytest.raises(PersonaError, match=r"^as it is$"):
        Server("http://127.0.0.1:1").patiently(wrong, lambda _: None)
    assert not clock.sleeps


@pytest.mark.parametrize("bad", [f"{KEY}\n", f"{KEY} ", f"{KEY}é", f"{KEY}\u2028x"])
def test_a_key_that_no_header_can_hold(
    fake: FakeNdif, clock: Clock, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """Such as one read from a file with its newline: sent trimmed or refused, never shown."""
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", bad)
    said = list[str]()
    try:
        server = Server(fake.url)
        server.patiently(server.connected, said.append)
    except PersonaError as error:
        said.append(str(error))
    assert not any(KEY in words for words in said)


# ------------------------------------------------------------------------------------ results


def good_result() -> bytes:
    return packed({"answer": {"events": "{}", "tensors": {"a": torch.ones(2)}, "facts": {}}})


def give(fake: FakeNdif, content: bytes) -> str:
    fake.jobs = [FakeJob("a", {}, b"", [], result=content)]
    return f"{fake.url}/result/a"


def test_a_result(fake: FakeNdif) -> None:
    content = good_result()
    result, size = Server(fake.url).fetch(give(fake, content))
    assert size == len(content)
    assert result["tensors"]["a"].tolist() == [1.0, 1.0]


def test_a_result_is_fetched_without_the_key(fake: FakeNdif) -> None:
    Server(fake.url).fetch(give(fake, good_result()))
    assert fake.seen
    for seen in fake.seen:
        assert KEY not in seen.path
        assert KEY not in " ".join(seen.headers.values())


class Malice:
    """Runs a command in the process that unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["alone", "beside what we ask for"])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_malicious_result_runs_nothing(
    fake: FakeNdif, tmp_path: Path, where: str, old_format: bool
) -> None:
    marker = tmp_path / "marker"
    malice: Any = {"answer": Malice(f"echo > '{marker}'")}
    if where != "alone":
        answer = {"events": "{}", "tensors": malice, "facts": {}}
        malice = {"answer": answer}
    buffer = io.BytesIO()
    torch.save(malice, buffer, _use_new_zipfile_serialization=not old_format)
    url = give(fake, zstandard.ZstdCompressor().compress(buffer.getvalue()))
    with pytest.raises(PersonaError, match="cannot be read as tensors") as refused:
        Server(fake.url).fetch(url)
    assert "\n" not in str(refused.value)
    assert not marker.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert marker.exists(), "the payload is harmless, so nothing was tested"


def truncated() -> bytes:
    content = good_result()
    return content[: len(content) // 2]


def not_compressed() -> bytes:
    return zstandard.ZstdDecompressor().decompress(good_result())


@pytest.mark.parametrize(
    "make",
    [
        *(truncated, not_compressed, bytes, lambda: b"<html>"),
        *(lambda: packed({}), lambda: packed({"answer": None}), lambda: packed({"answer": {}})),
        *(lambda: packed({"other": 1}), lambda: zstandard.ZstdCompressor().compress(b"text")),
    ],
)
def test_a_result_that_is_none(fake: FakeNdif, make: Callable[[], bytes]) -> None:
    with pytest.raises(PersonaError, match="cannot be read as tensors and numbers") as refused:
        Server(fake.url).fetch(give(fake, make()))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_result_that_has_expired(fake: FakeNdif, status: int) -> None:
    fake.replies = {"/result": [Reply(status, b"<Error>expired</Error>")]}
    with pytest.raises(JobLostError, match=f"HTTP {status}"):
        Server(fake.url).fetch(f"{fake.url}/result/a")


@pytest.mark.parametrize("reply", [Reply(500), Reply(503), DROP])
def test_a_result_that_comes_later(fake: FakeNdif, clock: Clock, reply: Reply) -> None:
    url = give(fake, good_result())
    fake.replies = {"/result": [reply] * 2}
    server = Server(fake.url)
    assert server.patiently(lambda: server.fetch(url), lambda _: None)[1] > 0
    assert len(clock.sleeps) == 2


def test_a_result_without_an_address(fake: FakeNdif) -> None:
    with pytest.raises(JobLostError, match="names no place"):
        Server(fake.url).fetch(None)


@pytest.mark.parametrize(
    "url", ["http://store.example.org/x", "http://10.1.2.3/x", "HTTP://127.0.0.1.example.org/x"]
)
def test_a_result_is_not_fetched_over_plain_http(fake: FakeNdif, url: str) -> None:
    with pytest.raises(PersonaError, match=r"The result's address .* plain http"):
        Server(fake.url).fetch(url)


@pytest.mark.parametrize(
    "url", ["nonsense", "file:///etc/passwd", "http://[::1", "http://127.0.0.1:port/x"]
)
def test_a_result_at_a_nonsense_address(fake: FakeNdif, url: str) -> None:
    with pytest.raises(PersonaError, match=r"The result's address .* is not a URL"):
        Server(fake.url).fetch(url)


@pytest.mark.parametrize(
    "url",
    ["https://me:secret@example.org", "https://me@example.org", "https://example.org/?key=secret"],
)
def test_an_address_holds_no_secret(url: str) -> None:
    """It goes into files and messages."""
    with pytest.raises(PersonaError, match="an address alone") as refused:
        Server(url)
    assert "secret" not in str(refused.value)


def test_a_server_that_is_only_asked_gets_no_key(fake: FakeNdif) -> None:
    assert Server(fake.url, with_key=False).connected()
    assert not any("ndif-api-key" in seen.headers for seen in fake.seen)


def test_a_model_at_hand_is_cold(fake: FakeNdif) -> None:
    told = {"deployments": {"the-name": {"deployment_level": "COLD", "application_state": None}}}
    fake.replies = {"/status": [Reply(200, told)]}
    assert Server(fake.url).deployments() == {"the-name": {"the-name": "COLD"}}
