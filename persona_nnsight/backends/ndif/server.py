"""An NDIF server over HTTP: what it runs, sending a job, asking after it, fetching its result.

The answers are checked here. What can be tried again is tried again with growing pauses; what
cannot is one sentence. The API key goes to the server in a header and nowhere else.
"""

from __future__ import annotations

import io
import ipaddress
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import torch
import zstandard

from persona_nnsight.errors import PersonaError

T = TypeVar("T")

#: Seconds between attempts while a server does not answer: doubled each time, up to the second.
_PAUSES = (0.5, 15.0)
_TIMEOUT = httpx.Timeout(10.0, read=60.0, write=120.0)


class NoAnswerError(Exception):
    """Nothing, or nothing useful, came back; the same request may succeed later."""


class JobLostError(Exception):
    """The server no longer knows the job, or no longer has its result."""


@dataclass(frozen=True)
class Answer:
    """What the server says of a job.

    Attributes:
        status: RECEIVED, QUEUED, PROVISIONING, DEPLOYING, DISPATCHED, RUNNING, COMPLETED or ERROR.
        description: the server's own words, such as a place in the queue, or a traceback.
        url: where the result is, once it is COMPLETED.
        runtime: seconds that the job ran, as the server measured them.
    """

    status: str
    description: str
    url: str | None
    runtime: float | None


class Server:
    """One NDIF server.

    Args:
        host: its URL; None takes nnsight's configuration (``NDIF_HOST``, or its own default).
        insecure: allow plain http to other machines, where anybody on the way can read the key and
            the results.
        patience: seconds for which a server that stops answering is asked again.
        with_key: False never sends the API key.

    Raises:
        PersonaError: a URL that is none, or one that is not safe.
    """

    def __init__(
        self,
        host: str | None = None,
        *,
        insecure: bool = False,
        patience: float = 300.0,
        with_key: bool = True,
    ) -> None:
        from nnsight import CONFIG

        self.host = (host or CONFIG.API.HOST).rstrip("/")
        self.insecure = insecure
        self.patience = patience
        #: Never shown, even where it is not sent.
        self._secret = (CONFIG.API.APIKEY or "").strip()
        self._key = self._secret if with_key else ""
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise PersonaError(
                "The API key has characters that no key has (it is not shown here); set "
                "NDIF_API_KEY anew."
            )
        self._check_url(self.host, "The NDIF host", bare_only=True)
        try:
            # A proxy has no business between this machine and itself.
            self._http = httpx.Client(timeout=_TIMEOUT, trust_env=not is_loopback(self.host))
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise PersonaError(
                "The proxy that the environment names (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) cannot "
                "be used; write it like http://proxy.example.org:3128, or unset it."
            ) from error

    @property
    def has_key(self) -> bool:
        """Whether an API key is configured (``NDIF_API_KEY``, or nnsight's configuration)."""
        return bool(self._key)

    def _check_url(self, url: str, what: str, *, bare_only: bool = False) -> None:
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname)
            whole = whole and (parts.port is None or parts.port > 0) and bool(httpx.URL(url).host)
            whole = whole and not any(letter.isspace() for letter in url)
            bare = not (parts.username or parts.password or parts.query or parts.fragment)
        except (ValueError, httpx.InvalidURL):
            whole = bare = False
        # Without what may be a secret: a name and password before the @, a signature after the ?.
        shown = re.split("[?#]", re.sub("^(https?://)?.*@", r"\1", url, flags=re.DOTALL))[0]
        if not whole:
            raise PersonaError(
                f"{what} {shown!r} is not a URL; write it like https://ndif.example.org or "
                "http://127.0.0.1:8001."
            )
        if bare_only and not bare:
            raise PersonaError(
                f"{what} must be an address alone, without a name, password or ?query, which would "
                "end up in files; the API key comes from NDIF_API_KEY."
            )
        if parts.scheme == "http" and not is_loopback(url) and not self.insecure:
            raise PersonaError(
                f"{what} {shown} is plain http to another machine, where everybody on the way can "
                "read the API key and change the results; use https, or --insecure if the network "
                "is your own."
            )

    # -- what the server is ----------------------------------------------------------------------

    def connected(self) -> bool:
        """Whether the server answers and has its compute behind it.

        Raises:
            NoAnswerError: it does not answer at all.
        """
        return self._get("/connected").status_code == 200

    def environment(self) -> dict[str, Any]:
        """Its ``python_version`` and installed ``packages``.

        Raises:
            PersonaError: not an NDIF server.
            NoAnswerError: it does not answer now.
        """
        answer = self._get("/env")
        if answer.status_code in (502, 503, 504):
            raise NoAnswerError(self._detail(answer))
        try:
            data: dict[str, Any] = self._json(answer)
            if answer.status_code != 200 or not isinstance(data["packages"], dict):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise PersonaError(
                f"{self.host} does not say which versions it runs (/env: HTTP "
                f"{answer.status_code}), so it is no NDIF server of this generation; check the "
                "address."
            ) from error
        return data

    def deployments(self) -> dict[str, dict[str, str]]:
        """The replicas by model key, each by its id with its state (RUNNING, DEPLOYING, ...).

        A model that the server has at hand and does not run is COLD.

        Raises:
            NoAnswerError: it does not answer now.
        """
        answer = self._get("/status")
        try:
            found = self._json(answer)["deployments"]
            replicas: dict[str, dict[str, str]] = {}
            for name, replica in found.items():
                key, identity = replica.get("model_key") or name, replica.get("replica_id") or name
                cold = replica.get("deployment_level") == "COLD"
                state = "COLD" if cold else str(replica.get("application_state"))
                replicas.setdefault(key, {})[str(identity)] = state
            return replicas
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NoAnswerError(self._detail(answer)) from error

    def identity(self) -> str | None:
        """Whom the server takes the API key to belong to; None where it does not say."""
        try:
            email = self._json(self._get("/whoami")).get("email")
        except (ValueError, AttributeError):
            return None
        return None if email is None else str(email)

    # -- jobs ------------------------------------------------------------------------------------

    def submit(self, model_key: str, env: dict[str, Any], blob: bytes) -> str:
        """Send a job and return its id.

        Args:
            model_key: nnsight's name for the model.
            env: what nnsight asks the server to set on it (the attention implementation).
            blob: the serialised block.

        Raises:
            PersonaError: the server refuses the job or the key.
            NoAnswerError: it could not be sent.
        """
        envelope = {"model_key": model_key, "session_id": "", "compress": True, "env": env}
        headers = {
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
        }
        answer = self._request(
            "POST",
            "/request",
            data={"data": json.dumps(envelope)},
            files={"blob": ("request", blob, "application/octet-stream")},
            headers=headers,
        )
        if answer.status_code in (401, 403) or (
            answer.status_code == 400 and "key" in self._detail(answer).lower()
        ):
            advice = (
                "check NDIF_API_KEY" if self.has_key else "set one in the environment: NDIF_API_KEY"
            )
            what = "this API key" if self.has_key else "work without an API key"
            raise PersonaError(f"{self.host} refuses {what} ({self._detail(answer)}); {advice}.")
        if answer.status_code >= 500 or answer.status_code == 429:
            raise NoAnswerError(self._detail(answer))
        try:
            if answer.status_code != 200:
                raise ValueError
            return str(self._json(answer)["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise PersonaError(
                f"{self.host} refuses the job (HTTP {answer.status_code}: {self._detail(answer)}); "
                "`persona doctor --backend ndif --model ...` compares this machine and the server."
            ) from error

    def ask(self, job: str) -> Answer | None:
        """The last word on a job; None while the server knows nothing of it.

        Raises:
            NoAnswerError: no answer, or one that cannot be read.
        """
        answer = self._get(f"/response/{quote(job, safe='')}")  # a directory may have named it
        if answer.status_code == 404:
            return None
        try:
            if answer.status_code != 200:
                raise ValueError
            data = self._json(answer)
            meta = data.get("meta") or {}
            runtime = meta.get("runtime")
            return Answer(
                status=str(data["status"]),
                description=str(data.get("description") or ""),
                url=data.get("data"),
                runtime=None if runtime is None else float(runtime),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NoAnswerError(self._detail(answer)) from error

    def fetch(self, url: str | None) -> tuple[dict[str, Any], int]:
        """The result at a URL that the server named, and its size in bytes.

        It is read as tensors, numbers and text, never as objects, so a server cannot make this
        process run anything.

        Raises:
            PersonaError: what came back is not the result of a job of ours.
            JobLostError: it is no longer there.
            NoAnswerError: it could not be fetched.
        """
        if not isinstance(url, str):
            raise JobLostError("the server names no place for its result")
        self._check_url(url, "The result's address")
        try:
            answer = self._http.get(url)  # without the key, which is not for the store
        except httpx.HTTPError as error:
            raise NoAnswerError(f"the result's store: {error or type(error).__name__}") from error
        if 400 <= answer.status_code < 500:
            raise JobLostError(f"its result cannot be fetched any more (HTTP {answer.status_code})")
        if answer.status_code != 200:
            raise NoAnswerError(f"the result's store: HTTP {answer.status_code}")
        try:
            content = zstandard.ZstdDecompressor().decompress(answer.content)
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            result: dict[str, Any] = saved["answer"]
            if not {"events", "tensors", "facts"} <= result.keys():
                raise ValueError("other contents")
        except Exception as error:  # whatever was sent in its place
            raise PersonaError(
                f"The result that {self.host} sent cannot be read as tensors and numbers "
                f"({type(error).__name__}); nothing of it was used."
            ) from error
        return result, len(answer.content)

    # -- patience --------------------------------------------------------------------------------

    def patiently(
        self, call: Callable[[], T], waiting: Callable[[str], None], patience: float | None = None
    ) -> T:
        """`call` again, with growing pauses, while the server does not answer.

        Args:
            call: one of the methods above.
            waiting: told why there is a pause, before each.
            patience: in seconds, in place of the server's own.

        Raises:
            PersonaError: nothing came for so long.
        """
        pause, started = _PAUSES[0], time.monotonic()
        limit = self.patience if patience is None else min(patience, self.patience)
        while True:
            try:
                return call()
            except NoAnswerError as error:
                left = started + limit - time.monotonic()
                if left <= 0:
                    raise PersonaError(
                        f"{self.host} does not answer ({error}); check the address and "
                        "the network, or try again later."
                    ) from error
                waiting(f"no answer, trying again ({error})")
                time.sleep(min(pause, max(left, 0.05)))
                pause = min(2 * pause, _PAUSES[1])

    def _get(self, path: str) -> httpx.Response:
        return self._request("GET", path)

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = arguments.pop("headers", {})
        if self._key:
            headers["ndif-api-key"] = self._key
        try:
            return self._http.request(method, f"{self.host}{path}", headers=headers, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswerError(self._scrubbed(str(error) or type(error).__name__)) from error

    def _detail(self, answer: httpx.Response) -> str:
        """The server's own explanation, on one line and without the key that it may repeat."""
        try:
            data = self._json(answer)
            text = str(data["detail"] if isinstance(data, dict) and "detail" in data else data)
        except ValueError:
            text = self._scrubbed(answer.text)
        return one_line(text) or f"HTTP {answer.status_code}"

    def _json(self, answer: httpx.Response) -> Any:
        """The answer as data, without the key that it may repeat.

        Raises:
            ValueError: it is no JSON.
        """
        return self._scrubbed(answer.json())

    def _scrubbed(self, data: Any) -> Any:
        if isinstance(data, str):
            data = data.encode(errors="replace").decode()  # JSON can hold halves of letters
            return data.replace(self._secret, "***") if self._secret else data
        if isinstance(data, dict):
            return {self._scrubbed(name): self._scrubbed(value) for name, value in data.items()}
        return [self._scrubbed(value) for value in data] if isinstance(data, list) else data


def one_line(text: str) -> str:
    """A text on one line, and no longer than a sentence bears."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine itself."""
    name = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
