"""Start a real ``vllm serve``, wait until it answers, and stop it whatever happens.

Demo, evaluation and tests start engines through this module, so that none is left behind:
every server leads a process group of its own, and the whole group is gone when the ``with``
block is left, by whichever way.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

LOG_TAIL_LINES = 25
ERROR_LINE = re.compile(r"\b\w*(Error|Exception): .*")
GRACE_SECONDS = 30.0  # an idle vLLM ends in 3 s; a loaded machine needs longer
#: What ``/metrics`` may take in all. vLLM's have some 50 KB for an engine.
METRICS_SECONDS, METRICS_BYTES = 30.0, 16 << 20


class ServerError(RuntimeError):
    """A server did not start, or ended by itself. The message carries the end of its log."""


@dataclass
class Server:
    """A running ``vllm serve``.

    Attributes:
        url: base address, without ``/v1``.
        process: the API server; it leads the process group of its engine and workers.
        log: file with everything the group prints.
        exit_code: of the API server once stopped; negative for a signal, None while it runs.
    """

    url: str
    process: subprocess.Popen
    log: Path
    exit_code: int | None = field(default=None, init=False)

    def client(self):
        """An ``openai.OpenAI`` for this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def metric_labels(self, name: str) -> dict[str, str]:
        """Labels of the first sample of the metric *name* on ``/metrics``; {} where absent."""
        return next((dict(s.labels) for s in read_metrics(self.url) if s.name == name), {})

    def metric(self, name: str) -> float:
        """Sum of the samples of the metric *name*, over engines and labels; 0 where absent."""
        return sum(s.value for s in read_metrics(self.url) if s.name == name)

    def kv_tokens(self) -> int:
        """Tokens the KV cache holds: vLLM's own figure, the one it logs at start-up."""
        return int(self.metric_labels("vllm:cache_config_info")["kv_cache_size_tokens"])

    def group_members(self) -> list[int]:
        """Process ids alive in the server's group: API server, engine and workers."""
        return process_group(self.process.pid)

    def stop(self, first: signal.Signals = signal.SIGTERM) -> int:
        """Ask the server to end with *first*, then end what is left of its group.

        Returns the API server's exit code. Safe to call twice.
        """
        if self.exit_code is None:
            try:
                if self.process.poll() is None:
                    self.process.send_signal(first)
                    with suppress(subprocess.TimeoutExpired):
                        self.process.wait(GRACE_SECONDS)
            finally:
                ended = self.process.poll() is not None
                end_group(self.process.pid, patience=10.0 if ended else 0.0)
                self.exit_code = self.process.wait()
        return self.exit_code

    def wait_until_ready(self, timeout: float, tick: Callable[[], None] = lambda: None) -> None:
        """Return once ``/health`` answers; ServerError if the server ends or *timeout* s pass."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            tick()
            if self.process.poll() is not None:
                raise ServerError(f"vllm serve ended with {self.process.returncode}; {self.tail()}")
            with suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise ServerError(f"vllm serve did not answer within {timeout:.0f} s; {self.tail()}")

    def tail(self) -> str:
        """The last lines of the log, introduced by its path."""
        return log_tail(self.log)


def read_metrics(url: str) -> list[Any]:
    """prometheus_client's samples (name, labels, value) of ``/metrics`` of the server at *url*.

    Raises OSError when nothing answers there, or not in METRICS_SECONDS, http.client.HTTPException
    when *url* is no address or what answers speaks no HTTP, and ValueError for what are no metrics.
    """
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(_fetch(f"{url.rstrip('/')}/metrics").decode())
    return [sample for family in families for sample in family.samples]


def _fetch(address: str) -> bytes:
    """What is at *address*. In a thread, since a socket's timeout begins anew with every byte, and
    urllib reads the headers before anybody could look at the time."""
    done: SimpleQueue[bytes | Exception] = SimpleQueue()
    deadline = time.monotonic() + METRICS_SECONDS

    def fetch() -> None:
        try:
            with urllib.request.urlopen(address, timeout=METRICS_SECONDS) as reply:
                done.put(_whole(reply, deadline))
        except Exception as error:
            done.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        found = done.get(timeout=METRICS_SECONDS)
    except Empty:
        raise TimeoutError(f"no whole answer within {METRICS_SECONDS:g} s") from None
    if isinstance(found, Exception):
        raise found
    return found


def _whole(reply: Any, deadline: float) -> bytes:
    """The body of a response; TimeoutError after *deadline*, which ends the thread, too."""
    body = b""
    while part := reply.read1(1 << 16):
        body += part
        if len(body) > METRICS_BYTES:
            raise ValueError(f"expected at most {METRICS_BYTES >> 20} MiB of metrics, got more")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no whole answer within {METRICS_SECONDS:g} s")
    if reply.length:  # which read1 does not mind
        raise http.client.IncompleteRead(body, reply.length)
    return body


@contextmanager
def serve(
    model: str | os.PathLike,
    kv_cache_dtype: str,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Server]:
    """Run ``vllm serve MODEL --kv-cache-dtype NAME`` on a free port of the loopback interface.

    Args:
        args: further arguments of ``vllm serve``.
        env: set on top of this process's environment and :func:`engine_env`.
        timeout: seconds until the server must answer.
        tick: called a few times a second while waiting, for a progress display.

    Raises ServerError with the end of the log when the server does not come up, or when a
    request inside the block fails with an openai error. The log is kept after an error, and
    removed otherwise.
    """
    from openai import OpenAIError

    port = free_port()
    handle, name = tempfile.mkstemp(prefix=f"kvq-{kv_cache_dtype}-", suffix=".log")
    command = [vllm_command(), "serve", os.fspath(model), "--kv-cache-dtype", kv_cache_dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), *args]
    with os.fdopen(handle, "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **engine_env(), **(env or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, Path(name))
    failed = False
    try:
        server.wait_until_ready(timeout, tick)
        yield server
    except OpenAIError as error:
        failed = True
        raise ServerError(f"the server failed: {error}; {server.tail()}") from error
    except BaseException as error:  # a test's time limit is no Exception
        failed = not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        raise
    finally:
        server.stop()
        if not failed:
            server.log.unlink()


@dataclass
class EngineProcess:
    """A process that runs an offline engine, at the other end of a pipe."""

    pipe: Connection
    process: subprocess.Popen
    ended: int  # pidfd
    log: Path
    name: str

    def send(self, message: Any) -> None:
        """Hand over *message*; ServerError when the process is gone."""
        try:
            self.pipe.send(message)
        except (EOFError, ConnectionError):
            raise self._gone() from None

    def receive(self) -> Any:
        """The next message; ServerError with the end of the log when the process ends first."""
        try:
            # The end, too: children of a process that crashed may still hold the pipe open.
            if self.pipe not in wait([self.pipe, self.ended]):
                raise EOFError
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None

    def _gone(self) -> ServerError:
        return ServerError(f"the engine {self.name} failed; {log_tail(self.log)}")


@contextmanager
def engine_process(
    module: str, name: str, ranks: int = 1, as_served: bool = False
) -> Iterator[EngineProcess]:
    """Run ``python -m module``, which calls :func:`run_engine`; it is gone after the block.

    A second engine in one process would find the memory and threads of the first still held.
    *name* is for the log's name and messages, *ranks* the engine's workers. *as_served*: with
    processes for engine and workers, and whatever vLLM compiles. Without, the engine lives in that
    one process, and a lone worker too, and is there in 13 s and not in 29: each of the others would
    import vLLM anew, and how log-probabilities are ranked is compiled in an eager engine, too.
    The log is kept after a ServerError, and removed otherwise.
    """
    # Nobody asks it for metrics, and killed as it ends it would leave their folder.
    env = engine_env(ranks) | {"KVQ_METRICS_DIR": ""}
    if not as_served:
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"} | env
    ours, theirs = Pipe()
    handle, path = tempfile.mkstemp(prefix="kvq-", suffix=".log")
    with os.fdopen(handle, "wb") as output, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            start_new_session=True,
        )
    engine = EngineProcess(ours, process, os.pidfd_open(process.pid), Path(path), name)
    failed = False
    try:
        yield engine
    except ServerError:
        failed = True
        raise
    finally:
        end_group(process.pid)
        process.wait()
        os.close(engine.ended)
        ours.close()
        if not failed:
            engine.log.unlink()


def run_engine(work: Callable[[Connection], None]) -> None:
    """The other side of :func:`engine_process`: ``work(pipe)``, then the whole group's end."""
    pipe = Connection(int(sys.argv[1]))
    try:
        work(pipe)
        pipe.recv()  # hold the engine until the parent ends the group, or dies
    except Exception:
        traceback.print_exc()
    finally:
        # The engine's own processes are in this group, and would outlive this one.
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)


def vllm_command() -> str:
    """The ``vllm`` command beside this interpreter, else the one on the PATH."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if not found:
        raise ServerError(
            f"no vllm command beside {sys.executable} nor on the PATH: install vLLM there "
            "('make install' in a checkout does)"
        )
    return found


def engine_env(ranks: int = 1) -> dict[str, str]:
    """Environment that an engine of *ranks* workers wants on this machine, where the user has not
    set it.

    vLLM's own binding keeps one core for the scheduler, which idles while the workers
    compute: on two cores that halves the speed.
    """
    cores = "|".join(",".join(map(str, own)) for own in _shared_out(ranks))
    wanted = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1"}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _shared_out(ranks: int) -> list[list[int]]:
    """This process's cores by rank, neighbours together; where they are too few, all to each."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        return [cores] * ranks
    edges = [rank * len(cores) // ranks for rank in range(ranks + 1)]
    return [cores[begin:end] for begin, end in pairwise(edges)]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_group(group: int) -> list[int]:
    """Process ids alive (zombies not counted) in the process group *group*."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The second field is the command in parentheses and may hold spaces.
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                members.append(int(stat.parent.name))
    return members


def end_group(group: int, patience: float = 0.0) -> None:
    """Give the process group *group* up to *patience* seconds to empty, then kill the rest."""
    deadline = time.monotonic() + patience
    try:
        while process_group(group) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:  # also when a second Ctrl-C cuts the waiting short
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def log_tail(log: Path) -> str:
    """The last lines of the file *log* and any error further up, introduced by its path.

    vLLM's engine and workers tell the cause first; what the API server adds may fill a screen.
    """
    lines = log.read_text(errors="replace").splitlines()
    causes = [found[0] for line in lines[:-LOG_TAIL_LINES] if (found := ERROR_LINE.search(line))]
    parts = [f"the log is {log}"]
    if causes:
        parts += ["errors in it:", *dict.fromkeys(causes)]
    return "\n".join([*parts, "its end:", *lines[-LOG_TAIL_LINES:]])
