"""``kvq doctor --url`` on what answers oddly, slowly, or without the plugin's metrics; what it says
of these is in test_metrics.py."""

from __future__ import annotations

import io
import socketserver
import threading
import time
from contextlib import contextmanager

import pytest
from rich.console import Console

from kvq_plugin import cli, doctor_url, servers
from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import MIXED, NAMES
from kvq_plugin.serving import compat
from kvq_plugin.serving.compat import additions

CONFIG = 'vllm:cache_config_info{cache_dtype="%s",kv_cache_size_tokens="1000"} 1.0\n'


@contextmanager
def answering(*parts: bytes, pause: float = 0.0):
    """Address of a server that sends *parts* to whoever asks, so many seconds apart."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            try:
                for part in parts:
                    self.request.sendall(part)
                    time.sleep(pause)
            except OSError:
                pass  # nobody listens any more

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def report(text: str) -> tuple[str, str]:
    """What the command prints of a server with these metrics, and its error."""
    output, error = io.StringIO(), ""
    with answering(b"HTTP/1.0 200 OK\r\n\r\n" + text.encode()) as url:
        try:
            doctor_url.run(url, Console(file=output, width=200))
        except ValueError as caught:
            error = str(caught)
            assert url in error or "problem(s) found" in error
    return output.getvalue(), error


@pytest.mark.parametrize("text", ["", "process_start_time_seconds 3.0\n"])
def test_what_is_not_vllm_has_no_scales_either(text):
    said, error = report(text)
    assert "these are not vLLM's metrics" in said and error.startswith("1 problem(s)")
    assert "Scales" not in said


def test_names_that_no_vllm_has():
    pytest.importorskip("vllm")
    known = compat.known_dtypes()
    ours = {n for n in NAMES if n not in known or additions.is_own_dtype(n)}
    assert ours == doctor_url.OURS


@pytest.mark.parametrize("dtype", NAMES)
def test_a_server_without_the_plugins_metrics(dtype):
    """Nothing is said of what nobody knows: whose the cache is, and whether its scales fit."""
    said, error = report(CONFIG % dtype)
    assert not error
    if dtype in doctor_url.OURS:
        assert f"{dtype} cannot be vLLM's own here, and the server gives no kvq metrics" in said
        assert "several API servers" in said
    else:
        assert f"{dtype} is vLLM's own here, or the server gives no kvq metrics" in said
    if dtype != MIXED and SERVED[dtype].is_dynamic:
        assert "ok  none that could be too small" in said
    else:
        assert f"whether scales of {dtype} are too small is not known" in said
        assert "none that could be too small" not in said


def test_scales_that_vllm_has_alone():
    assert "ok  none that could be too small" in report(CONFIG % "auto")[0]
    assert "scales of fp8_inc are too small is not known" in report(CONFIG % "fp8_inc")[0]
    mixed = CONFIG % "kvq_mixed" + 'kvq:cache_layers{format="int4",engine="0"} 2\n'
    assert "ok  none that could be too small" in report(mixed)[0]
    silent = 'kvq:sampled_values_total{layer="l",kind="key"} 0\n'
    assert "on GPUs none are looked at" in report(CONFIG % "int8" + silent)[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("vllm:num_requests_running NaN", "num_requests_running: expected a finite number, 0 or"),
        ("kvq:cache_bytes +Inf", "kvq:cache_bytes: expected a finite number, 0 or more, got inf"),
        ("kvq:cache_layers{} 3", "kvq:cache_layers: expected labels format, got none called fo"),
        ('kvq:saturated_values_total{layer="0"} 5', "expected labels layer, kind, got none called"),
    ],
)
def test_odd_values_are_named_with_the_address(line, says):
    said, error = report(CONFIG % "int8" + line + "\n")
    assert error.startswith("odd metrics from http://127.0.0.1:") and says in error and not said


def test_an_odd_number_of_tokens():
    said, error = report((CONFIG % "auto").replace("1000", "²"))
    assert "² tokens fit" in said and not error


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\n"])
def test_a_server_that_drips(head, monkeypatch, capsys):
    """A body, or headers, of which some come now and then: there is one limit for all of it."""
    monkeypatch.setattr(servers, "METRICS_SECONDS", 1.0)
    with answering(head, *[b"x-a: b\r\n"] * 40, pause=0.2) as url:
        started = time.monotonic()
        assert cli.main(["doctor", "--url", url]) == 1
        assert time.monotonic() - started < 6
    assert f"no metrics from {url}: no whole answer within 1 s" in capsys.readouterr().err


def test_more_than_metrics(monkeypatch, capsys):
    monkeypatch.setattr(servers, "METRICS_BYTES", 1 << 20)
    with answering(b"HTTP/1.0 200 OK\r\n\r\n", *[b"#" * (1 << 18)] * 5) as url:
        assert cli.main(["doctor", "--url", url]) == 1
    assert f"from {url}: expected at most 1 MiB of metrics, got more" in capsys.readouterr().err


def test_an_answer_that_breaks_off(capsys):
    with answering(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nabc") as url:
        assert cli.main(["doctor", "--url", url]) == 1
    assert f"no metrics from {url}: IncompleteRead(3 bytes read, 997" in capsys.readouterr().err
