"""A real NDIF server on this machine's CPU, on loopback, without an account.

``make ndif-server`` starts it and says how to use it; ``make ndif-server-down`` stops it. All is
installed into an environment of its own (``.venv-ndif``): NDIF's package needs other versions than
this one. Its parts, in the order of their start: Redis (the queue; the system's own package), Ray
(the models), NDIF's controller (an actor in Ray), an S3 store in memory (the results), and NDIF's
API with its dispatcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENV, STATE = ROOT / ".venv-ndif", ROOT / ".ndif"

#: Asks for Python 3.12 and runs on 3.11; its own requirements are met by requirements.txt.
NDIF = "ndif==0.1.2"

#: Every process of a server has this in its environment, by which it is found again.
_MARK = "PERSONA_NDIF_SERVER"
_GIB = 1 << 30


def install(venv: Path = VENV) -> None:
    """Make the server's environment, unless it is there and up to date."""
    wanted = (HERE / "requirements.txt").read_text(encoding="utf-8") + NDIF
    stamp = venv / "installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print("Installing the NDIF server (once; about 1.5 GB) ...", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q"]
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    # torch alone and first, so that what depends on it takes the build that is there.
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", NDIF], check=True)
    stamp.write_text(wanted, encoding="utf-8")


@dataclass(frozen=True)
class Ports:
    """Where the parts of a server listen."""

    api: int
    redis: int
    store: int
    ray: int
    ray_client: int
    ray_dashboard: int


class NdifServer:
    """One server.

    Args:
        state: directory for logs and for what `down` needs to know.
        venv: the environment it is installed in.
    """

    def __init__(self, state: Path = STATE, venv: Path = VENV) -> None:
        self.state, self.venv = state, venv
        known = state / "state.json"
        data = json.loads(known.read_text(encoding="utf-8")) if known.exists() else None
        # Processes are found again by it, also where a start was cut off before it was written.
        self.mark = str(state.resolve())
        self.temporary: str | None = data["temporary"] if data else None
        self.ports = Ports(**data["ports"]) if data else _free_ports()

    @property
    def url(self) -> str:
        """What to give as --ndif-host."""
        return f"http://127.0.0.1:{self.ports.api}"

    # -- the whole -------------------------------------------------------------------------------

    def up(self) -> None:
        """Start everything and wait until the API has its compute."""
        if shutil.which("redis-server") is None:
            raise SystemExit("redis-server is missing; install your system's package of it.")
        install(self.venv)
        self.state.mkdir(parents=True, exist_ok=True)
        # Ray's sockets lie in it, and the path of a socket must be short.
        self.temporary = tempfile.mkdtemp(prefix="ndif-")
        self._save()
        self.start_redis()
        self._start_ray()
        self.start_store()
        self.start_api()
        self.wait()

    def down(self) -> None:
        """Stop every process that belongs to this server."""
        for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            found = self._processes()
            for process in found:
                _signal(process, sign)
            psutil.wait_procs(found, timeout=patience)
        left = self._processes()
        assert not left, f"still there: {left}"
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        (self.state / "state.json").unlink(missing_ok=True)

    def wait(self, patience: float = 120.0) -> None:
        """Wait until the API answers, and the controller through it."""
        _wait(f"{self.url}/env", patience, self.state)

    def use_sandbox(self, wanted: bool) -> None:
        """Run the jobs that come in NDIF's sandbox, or no longer."""
        file = self.state / "sandbox"
        if wanted:
            file.touch()
        else:
            file.unlink(missing_ok=True)

    # -- its parts -------------------------------------------------------------------------------

    def start_redis(self) -> None:
        """Start the queue, empty."""
        port = str(self.ports.redis)
        self._start("redis", "redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "")

    def start_store(self) -> None:
        """Start the store of results, empty."""
        self._start("store", self._bin("moto_server"), "-H", "127.0.0.1", "-p", self.ports.store)
        url = f"http://127.0.0.1:{self.ports.store}"
        _wait(url, 60.0, self.state)
        # Where results go; the API makes it when it starts, and the store may start again later.
        make = urllib.request.Request(f"{url}/ndif-results", method="PUT")
        urllib.request.urlopen(make, timeout=30).close()

    def start_api(self) -> None:
        """Start the API and its dispatcher."""
        bind = f"127.0.0.1:{self.ports.api}"
        config = "python:ndif.services.api.gunicorn_conf"
        command = (self._bin("gunicorn"), "--config", config, "--bind", bind)
        self._start("api", *command, "ndif.services.api.app:app")

    def start_guarded_api(self) -> str:
        """Start a second API that asks for keys, without a database that knows any; its URL."""
        port = free_port()
        command = (self._bin("uvicorn"), "ndif.services.api.app:app", "--host", "127.0.0.1")
        database = "postgresql://127.0.0.1:1/none"
        self._start("guarded", *command, "--port", port, NDIF_POSTGRES_URL=database)
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/ping", 60.0, self.state)
        return url

    def stop(self, name: str) -> None:
        """Kill one part, with all that it started."""
        found = self._processes(name)
        for process in found:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(found, timeout=10)

    def add_replica(self, model_key: str) -> None:
        """Have one more of a model, and wait for nothing."""
        code = (
            "import sys; from ndif.cli.lib.scale import scale; "
            "print(scale(model_key=sys.argv[1], on_message=print))"
        )
        command = [self._bin("python"), "-c", code, model_key]
        subprocess.run(command, check=True, env=self._environment("scale"), timeout=120)

    def _start_ray(self) -> None:
        resources = {
            "head": 10,
            # The scheduler places models on GPUs; this many bytes stand for one.
            "cuda_memory_bytes": 20 * _GIB,
            "cpu_memory_bytes": 20 * _GIB,
        }
        command = [self._bin("ray"), "start", "--head", "--num-cpus=4", "--num-gpus=1"]
        command += ["--node-ip-address=127.0.0.1", f"--dashboard-port={self.ports.ray_dashboard}"]
        command += [f"--port={self.ports.ray}", f"--ray-client-server-port={self.ports.ray_client}"]
        command += [f"--resources={json.dumps(resources)}", f"--temp-dir={self.temporary}"]
        controller = "ndif.services.ray.deployments.controller.controller"
        address = {"RAY_ADDRESS": f"127.0.0.1:{self.ports.ray}"}
        for name, words, more in (
            ("ray", command, {}),
            ("controller", [self._bin("python"), "-m", controller], address),
        ):
            with open(self.state / f"{name}.log", "ab") as log:
                environment = self._environment("ray", **more)
                done = subprocess.run(words, stdout=log, stderr=log, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{name} did not start; see {self.state / name}.log")

    def _start(self, name: str, *command: str | int, **environment: str) -> None:
        with open(self.state / f"{name}.log", "ab") as log:
            subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment(name, **environment),
                cwd=self.state,
                start_new_session=True,
            )

    def _environment(self, name: str, **more: str) -> dict[str, str]:
        """The environment of one part, in which its processes are marked."""
        here = os.environ
        kept = {key: here[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in here}
        return {
            **kept,
            _MARK: f"{self.mark}:{name}",
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": here.get("HF_HUB_OFFLINE", "1"),
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_actor.CpuModelActor",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_CPU_SANDBOX_FILE": str(self.state / "sandbox"),
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.ports.redis}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{self.ports.store}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{self.ports.ray_client}",
            "NDIF_API_PORT": str(self.ports.api),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else Ray's client proxy loses its children now and then.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            **more,
        }

    def _bin(self, name: str) -> str:
        return str(self.venv / "bin" / name)

    def _save(self) -> None:
        data = {"temporary": self.temporary, "ports": asdict(self.ports)}
        (self.state / "state.json").write_text(json.dumps(data), encoding="utf-8")

    def _processes(self, name: str | None = None) -> list[psutil.Process]:
        """All processes of this server, or of one part of it."""
        mark = f"{self.mark}:{name or ''}"
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK, "").startswith(mark):
                    found.append(process)
            except psutil.Error:
                continue  # another user's, or gone
        return found


def _wait(url: str, patience: float, logs: Path) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"{url} did not answer in {patience:.0f} s; see {logs}/*.log")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _free_ports() -> Ports:
    with socket.socket() as probe:
        usual = 8001 if probe.connect_ex(("127.0.0.1", 8001)) else free_port()
    return Ports(usual, *(free_port() for _ in range(5)))


def _signal(process: psutil.Process, sign: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(sign)


def main() -> None:
    """Start or stop the server of this checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--sandbox", action="store_true", help="run jobs in NDIF's sandbox")
    arguments = parser.parse_args()
    server = NdifServer()
    server.down()  # what an earlier start has left, if anything
    if arguments.what == "up":
        try:
            server.up()
        except BaseException:
            server.down()
            raise
        server.use_sandbox(arguments.sandbox)
        print(
            f"NDIF answers at {server.url} (logs in {os.path.relpath(server.state)}). Try:\n"
            f"  persona doctor --backend ndif --ndif-host {server.url}\n"
            f"  persona substitute --backend ndif --ndif-host {server.url} --layers 55%"
        )


if __name__ == "__main__":
    main()
