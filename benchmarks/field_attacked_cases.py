"""What befalls a person with a terminal and a cluster: each case made for real, with its line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from field_attacked_inputs import make_inputs

from loadmaster.app.examples import KINDS, example

JOIN_S, NOTICE_S, WAIT_S = 10.0, 5.0, 120.0
TOKEN = "a" * 64

Told = dict[str, Any]


def all_cases(say: Callable[[str], None]) -> dict[str, Told]:
    """Every case by name: its line and whether it holds."""
    with tempfile.TemporaryDirectory(prefix="attacked-") as folder:
        place = Path(folder)
        make_inputs(place)
        write_examples(place)
        found: dict[str, Told] = {}
        for case in (ascii_table, tensors_that_do_not_fit, joining, killed_and_hung_up,
                     recording_in_trouble, errors_across_ray, examples_work):
            say(case.__name__.replace("_", " "))
            found |= case(place)
    return found


def environment(place: Path, **more: str) -> dict[str, str]:
    """No one's home, tokens or cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept |= {"HOME": str(place), "TMPDIR": str(place), "RAY_TMPDIR": tempfile.gettempdir()}
    return kept | {"PYTHONUTF8": "1"} | more


def typed(place: Path, *arguments: object, **env: str) -> tuple[int, str, str, float]:
    """A verb in a process of its own: exit code, stdout, stderr, seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "loadmaster.cli", *map(str, arguments)], cwd=place,
        capture_output=True, text=True, env=environment(place, **env), timeout=600, check=False,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def told(line: str, holds: bool, **more: Any) -> Told:
    """One case's answer."""
    return {"holds": holds, "line": line.strip(), **more}


def last(text: str) -> str:
    """The last line."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


# ---- without a cluster -------------------------------------------------------------------------


def ascii_table(place: Path) -> dict[str, Told]:
    """A table with bands where only ASCII can be written."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err, _ = typed(
        place, "plan", "trace", "--preset", "cpu", "--devices-per-node", 4, "--effort", "fast",
        "--step-tokens", 64, "--concurrency", 8, **ascii_only,
    )
    banded = next((line for line in out.splitlines() if "+-" in line), err)
    return {"a table in ASCII": told(banded, code == 0 and (out + err).isascii())}


def write_examples(place: Path) -> None:
    """A trace of the example model beside the small one's."""
    from loadmaster.traces.storage.store import save_trace
    from loadmaster.traces.synth.generate import synth_trace

    sizes = json.loads(example("model"))
    save_trace(synth_trace(
        layers=sizes["num_layers"], experts=sizes["num_experts"], top_k=sizes["top_k"],
        tokens=4000, request_tokens=50,
    ), place / "large")


def examples_work(place: Path) -> dict[str, Told]:
    """Each example written by the verb, and read by the verb that reads such files."""
    load = ("--requests", 8, "--rate", 100, "--prompt-tokens", 32, "--output-tokens", 4)
    steps = ("--step-tokens", 128, "--concurrency", 16, "--effort", "fast")
    folder = place / "examples"
    folder.mkdir()
    files = {kind: folder / name for kind, (name, _) in KINDS.items()}
    written = [typed(place, "example", kind, path)[0] for kind, path in files.items()]
    plan = folder / "plan.json"
    runs = {
        "model": ("plan", "large", "--model", files["model"], "--out", plan, *steps),
        "cluster": ("plan", "large", "--cluster", files["cluster"], *steps),
        "grid": ("whatif", "large", files["grid"], "--model", files["model"], *load),
        "faults": ("simulate", "large", plan, "--model", files["model"], "--faults",
                   files["faults"], *load),
    }
    found = {}
    for kind, arguments in runs.items():
        code, out, err, _ = typed(place, *arguments)
        first = (out or err).strip().splitlines()[:1]
        found[f"example {kind}"] = told(" ".join(first), code == 0 and not any(written))
    return found


# ---- joining -----------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_port() -> Iterator[str]:
    """Someone takes connections there and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def joining(place: Path) -> dict[str, Told]:
    """Every verb that joins a cluster: without a token, where nothing listens, where none answers.
    """
    verbs: dict[str, tuple[object, ...]] = {
        "plan": ("plan", "trace", "--address"),
        "whatif": ("whatif", "trace", "grid.yaml", "--model", "model.json", "--address"),
        "apply": ("apply", "plan.json", "--address"),
        "run": ("run", "--model", "checkpoint", "--ranks", 2, "--address"),
        "submit": ("submit", "--address"),
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    nobody = place / "nobody"        # whose home holds no token
    nobody.mkdir()
    found = {}
    with silent_port() as silent:
        for verb, words in verbs.items():
            for name, address, token in (
                ("without a token", closed, ""), ("to a closed port", closed, TOKEN),
                ("to a silent port", silent, TOKEN),
            ):
                dashboard = f"http://{address}" if verb == "submit" else address
                after = ("--", "plan", "trace") if verb == "submit" else ()
                env = {"HOME": str(nobody), "RAY_AUTH_MODE": "token"}
                env |= {"RAY_AUTH_TOKEN": token} if token else {}
                code, _, err, seconds = typed(place, *words, dashboard, *after, **env)
                line = last(err)
                said = "no token" if not token else address
                found[f"{verb} {name}"] = told(
                    line, code in (1, 2) and said in line and "Traceback" not in err
                    and seconds <= JOIN_S, seconds=round(seconds, 1),
                )
    return found


# ---- live groups -------------------------------------------------------------------------------


class OnTerminal:
    """`loadmaster run` as the leader of a terminal of its own."""

    def __init__(self, place: Path, name: str, *options: object) -> None:
        self._leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loadmaster.cli", "run", "--model", "checkpoint", "--ranks",
             "2", "--name", name, *map(str, options)],
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True, cwd=place,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=environment(place),
        )
        os.close(follower)
        self.text = ""
        self.wait_for("from another shell")

    def wait_for(self, words: str, at_most_s: float = WAIT_S) -> float:
        """Until it has said so; the seconds that took. Raises TimeoutError."""
        began = time.monotonic()
        os.set_blocking(self._leader, False)
        while words not in self.text:
            if time.monotonic() - began > at_most_s or self.process.poll() is not None:
                raise TimeoutError(f"{words!r} was never said: {self.text[-500:]!r}")
            with contextlib.suppress(OSError):
                self.text += os.read(self._leader, 4096).decode(errors="replace")
            time.sleep(0.05)
        return time.monotonic() - began

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._leader)


def killed_and_hung_up(place: Path) -> dict[str, Told]:
    """A killed group is named at once and cleared by the next; one ends with its terminal."""
    name = f"attacked-{os.getpid()}"
    folder = place / f"loadmaster-{os.getuid()}" / name
    killed = OnTerminal(place, name)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    code, _, err, seconds = typed(place, "apply", "plan.json", "--name", name)
    line = last(err)
    dead = told(line, code == 1 and f"group '{name}' ran at" in line and seconds <= NOTICE_S,
                seconds=round(seconds, 1), left_an_address=(folder / "address.json").exists())
    again = OnTerminal(place, name)
    cleared = told("a new group runs under the dead one's name", True)
    again.hang_up()
    ended = again.process.wait(60)
    left = folder.exists()
    return {
        "a dead group": dead, "cleared by the next": cleared,
        "a terminal that closes": told(
            f"exit code {ended}, its address {'stays' if left else 'is gone'}",
            ended == 0 and not left,
        ),
    }


def tensors_that_do_not_fit(place: Path) -> dict[str, Told]:
    """`run` of a checkpoint whose config is another model's."""
    import shutil

    other = place / "other-model"
    shutil.copytree(place / "checkpoint", other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"hidden_size": 128}))
    code, _, err, _ = typed(place, "run", "--model", other, "--ranks", 2, "--name", "misfit")
    line = last(err)
    said = all(words in line for words in ("model.safetensors: tensor ", "has shape ["))
    one = sum(x.startswith("loadmaster: ") for x in err.splitlines()) == 1
    return {"tensors that do not fit": told(
        line, code == 1 and said and one and "Traceback" not in err
    )}


SERVE = """
import sys
from loadmaster.workers.group.group import Group
group = Group.find(sys.argv[1])
print(len(group.generate([[1 + i, 7, 9, i] * 6 for i in range(8)], 4)))
"""


def recording_in_trouble(place: Path) -> dict[str, Told]:
    """The folder of a recording goes away under a serving group."""
    name, target = f"recording-{os.getpid()}", place / "recorded"
    group = OnTerminal(place, name, "--record-to", target)
    serve = [sys.executable, "-c", SERVE, name]
    env = environment(place)
    try:
        first = subprocess.run(serve, env=env, capture_output=True, text=True, check=False)
        target.rename(place / "away")
        second = subprocess.run(serve, env=env, capture_output=True, text=True, check=False)
        try:
            seconds = group.wait_for("recording: ", NOTICE_S)
        except TimeoutError:
            seconds = float("inf")
        line = next((x for x in group.text.splitlines() if x.startswith("recording: ")), "")
        third = subprocess.run(serve, env=env, capture_output=True, text=True, check=False)
        served = [run.stdout.strip() for run in (first, second, third)]
    finally:
        group.process.send_signal(signal.SIGTERM)
        group.process.wait(90)
    return {"a recording's folder goes away": told(
        line, served == ["8"] * 3 and str(target) in line and seconds <= NOTICE_S
    )}


# Each raised in an actor; what whoever holds the group would read is printed.
RAISE = """
import sys
import ray
from loadmaster.errors import InfeasibleError, InputError, LoadmasterError
from loadmaster.workers.fleet.ray_fleet import connect
from loadmaster.workers.group.connection import Connection

KINDS = [
    InputError("a.json: no such file"), InfeasibleError("3 slots short"),
    RuntimeError("size mismatch\\n in layer 3\\n in layer 4"), KeyError("gate_up"), MemoryError(),
    FileNotFoundError(2, "No such file or directory", "/gone"), AssertionError(), TimeoutError(),
]

class Actor:
    def fail(self, number):
        raise KINDS[number]
    def end(self):
        import os
        os._exit(1)

connect(num_cpus=1)
line = Connection("g", ray.remote(Actor).options(num_cpus=0).remote())
for number in range(len(KINDS) + 1):
    try:
        line.ask("fail", number) if number < len(KINDS) else line.ask("end")
    except LoadmasterError as error:
        print(repr(error.typed))
"""


def errors_across_ray(place: Path) -> dict[str, Told]:
    """Errors of several kinds, raised in another process."""
    done = subprocess.run([sys.executable, "-c", RAISE], env=environment(place), cwd=place,
                          capture_output=True, text=True, check=False)
    lines = re.findall(r"^['\"](.*)['\"]$", done.stdout, re.MULTILINE)
    whole = all("\\n" not in line and "Traceback" not in line for line in lines)
    return {"errors across Ray": told(" | ".join(lines), len(lines) == 9 and whole)}
