"""Joining a cluster: whatever does not answer as one is named within seconds, in one line."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.workers.fleet.joining import NothingAnswersError, require_cluster
from loadmaster.workers.jobs.submit import submit

AT_MOST_S = 10.0


@contextlib.contextmanager
def listening(greeting: bytes | None) -> Iterator[str]:
    """A port where someone answers with these bytes, or takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    line, _ = server.accept()
                    held.append(line)
                    if greeting is not None:
                        line.sendall(greeting)
                        line.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for line in held:
            line.close()


def closed_port() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")


@pytest.mark.parametrize("address", [
    "", "here", "127.0.0.1", ":6379", "127.0.0.1:0", "127.0.0.1:99999", "http://127.0.0.1:8265",
    "host:abc", "host:-1", "ray://127.0.0.1:10001",
])
def test_what_is_no_address_is_said(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        require_cluster(address)


def test_a_port_where_nothing_listens_is_named(token: None) -> None:
    address = closed_port()
    with pytest.raises(NothingAnswersError, match=f"{address} .*refused.*check that it runs"):
        require_cluster(address)


@pytest.mark.parametrize("name", ["no-such-host.invalid:6379", f"{'x' * 70}.invalid:6379"])
def test_a_host_that_is_none_is_named(token: None, name: str) -> None:
    with pytest.raises(NothingAnswersError, match="no Ray cluster answers at"):
        require_cluster(name)


@pytest.mark.parametrize("greeting", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 mail\r\n"])
def test_something_else_that_listens_is_no_cluster(token: None, greeting: bytes | None) -> None:
    with listening(greeting) as address:
        began = time.monotonic()
        with pytest.raises(NothingAnswersError, match=f"{address} is no head of a Ray cluster"):
            require_cluster(address)
        assert time.monotonic() - began < AT_MOST_S
        with pytest.raises(LoadmasterError, match=f"no Ray dashboard answers at http://{address}"):
            submit(f"http://{address}", ["plan"])
        assert time.monotonic() - began < 2 * AT_MOST_S


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1:8265", "http://", "http://h", "x://h:1"])
def test_a_dashboard_has_an_address_of_its_own(address: str) -> None:
    with pytest.raises(UsageError, match="http://HOST:PORT"):
        submit(address, ["plan"])


def test_another_machine_needs_token_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="token authentication only"):
        require_cluster("10.0.0.7:6379")


VERBS = {
    "plan": ("plan", "trace", "--address"),
    "whatif": ("whatif", "trace", "grid.yaml", "--model", "model.json", "--address"),
    "apply": ("apply", "plan.json", "--address"),
    "run": ("run", "--model", "checkpoint", "--ranks", "2", "--address"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verbs read before they join."""
    from benchmarks.random_checkpoint import save_random_checkpoint
    from loadmaster.app.examples import KINDS, example
    from loadmaster.traces.storage.store import save_trace
    from loadmaster.traces.synth.generate import synth_trace
    from loadmaster.workers.group.group import contiguous
    from loadmaster.workers.protocol.settings import served_spec

    folder = tmp_path_factory.mktemp("joining")
    (folder / "checkpoint").mkdir()
    save_random_checkpoint("qwen3_moe", folder / "checkpoint")
    contiguous(served_spec(folder / "checkpoint", "bfloat16"), 2).save(folder / "plan.json")
    save_trace(synth_trace(layers=24, experts=32, top_k=4, tokens=3000), folder / "trace")
    for kind, (name, _) in KINDS.items():
        (folder / name).write_text(example(kind))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_joins_says_the_same(verb: str, place: Path, tmp_path: Path) -> None:
    """Without a token; with one, at a port where nothing listens. In processes of their own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    address = closed_port()
    for token, said in (({}, "no token to join"), ({"RAY_AUTH_TOKEN": "a" * 64}, "refused")):
        done = subprocess.run(
            [sys.executable, "-m", "loadmaster.cli", *VERBS[verb], address],
            capture_output=True, text=True, env=env | token, cwd=place, timeout=120, check=False,
        )
        lines = done.stderr.splitlines()
        assert done.returncode == (1 if token else 2), done.stderr
        assert said in lines[-1] and address in lines[-1] and lines[-1].startswith("loadmaster: ")
        assert "Traceback" not in done.stderr
    assert not (tmp_path / ".ray").exists(), "no token may be made up for someone else's cluster"
