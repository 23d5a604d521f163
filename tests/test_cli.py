"""The command line: what it accepts, what it prints, how it ends."""

from __future__ import annotations

import io
import os
import signal
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from kvq_plugin import cli, demo, options, report
from kvq_plugin.calibrate import engine
from kvq_plugin.calibrate.settings import Settings
from kvq_plugin.evaluate import BASELINE, Score
from kvq_plugin.servers import Server, ServerError, engine_env, log_tail, process_group

SETTINGS = demo.Settings("m", [BASELINE, "fp8"], 2, 4, 3000, 64, 1 << 30)


def render(table) -> str:
    output = io.StringIO()
    Console(file=output, width=140).print(table)
    return output.getvalue()


def test_the_package_is_the_command():
    run = [sys.executable, "-m", "kvq_plugin", "eval", "--windows", "0"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: kvq eval")


def test_baseline_is_always_measured_first():
    assert options.parse_dtypes("fp8, int8,fp8") == ["auto", "fp8", "int8"]
    assert options.parse_dtypes("fp8,auto") == ["auto", "fp8"]


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_unknown_dtype_lists_the_known(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--dtypes", "int7"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "int7" in message and "int8_per_token_head" in message


@pytest.mark.parametrize("option", ["--windows", "--streams", "--context", "--steps"])
def test_numbers_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", option, "0"])
    assert "positive" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "eval", "calibrate -o out m"])
@pytest.mark.parametrize("number", ["inf", "nan", "0", "-1"])
def test_memory_is_finite(command, number, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), f"--kv-memory-gib={number}"])
    assert f"expected a finite number above 0, got {number}" in capsys.readouterr().err


def test_cores_are_shared_out_among_ranks(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 1, 2, 3, 8})
    bound = [engine_env(ranks)["VLLM_CPU_OMP_THREADS_BIND"] for ranks in (1, 2, 3, 6)]
    assert bound[:3] == ["1,2,3,5,8", "1,2|3,5,8", "1|2,3|5,8"]
    assert bound[3] == "|".join(["1,2,3,5,8"] * 6)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_env(2)


def test_calibration_names_its_ranks(monkeypatch):
    """vLLM refuses an engine whose lists of cores are not as many as its ranks."""

    def process(module, name, ranks=1):
        raise InterruptedError(ranks)

    monkeypatch.setattr(engine, "engine_process", process)
    source = SimpleNamespace(folder="m", unquantized_dtype="auto", tensor_names=set)
    with pytest.raises(InterruptedError, match="^2$"):
        engine.observe(source, Settings(), engine.Load(tensor_parallel=2), [[1, 2]])


def test_waiting_outlasts_what_is_no_http(no_http, tmp_path):
    """Some other program's port, or a server's that is coming up: asked again until the end."""
    alive = SimpleNamespace(poll=lambda: None)
    (tmp_path / "log").write_text("starting")
    with pytest.raises(ServerError, match="did not answer within"):
        Server(no_http, alive, tmp_path / "log").wait_until_ready(0.5)


def test_doctor_on_what_is_no_address_and_no_http(no_http, capsys):
    for url, why in (("http://127.0.0.1:80a", "nonnumeric port: '80a'"), (no_http, "SSH-2.0-x")):
        assert cli.main(["doctor", "--url", url]) == 1
        message = capsys.readouterr().err
        assert f"no metrics from {url}: {why}; expected a vLLM server's address" in message


@pytest.fixture
def no_http():
    """Address of a server that speaks another protocol."""

    class Greeting(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1000)
            self.request.sendall(b"SSH-2.0-x\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Greeting) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_missing_text_is_one_line_not_a_traceback(smollm2, capsys):
    assert cli.main(["eval", str(smollm2), "--text", "no-such-file.txt"]) == 1
    assert capsys.readouterr().err.startswith("kvq: ")


def test_missing_model_is_one_line_not_a_traceback(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "nothing-here")]) == 1
    assert capsys.readouterr().err.startswith("kvq: ")


def test_evaluation_table_shows_the_change():
    scores = {
        BASELINE: {"text": Score((-2.0, -2.0))},
        "fp8": {"text": Score((-2.01, -2.03))},
    }
    text = render(report.evaluation_table("m", scores, 1))
    assert "7.389" in text
    assert "+2.02 ± 1.02" in text


def test_names_are_no_markup():
    scores = {BASELINE: {"notes[draft].txt": Score((-2.0, -2.0))}}
    text = render(report.evaluation_table("models/m[1b]", scores, 1))
    assert "notes[draft].txt" in text and "m[1b]" in text


def test_windows_fit_the_model(tmp_path):
    """vLLM generates a token after each, transformers feeds the last one and is done."""
    model = str(tmp_path)
    for limit, vllm, transformers in ((8192, 2048, 2048), (2048, 2047, 2048), (512, 511, 512)):
        (tmp_path / "config.json").write_text(f'{{"max_position_embeddings": {limit}}}')
        assert report.window_length(model, "vllm", 4) == vllm
        assert report.window_length(model, "transformers", 4) == transformers
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 128}')
    assert report.window_length(model, "vllm", 0) == 127
    with pytest.raises(ValueError, match="prompts of 128 tokens: .* got one with 128; leave it"):
        report.window_length(model, "vllm", 1)
    (tmp_path / "config.json").write_text("{}")
    assert report.window_length(model, "vllm", 0) == 2048


def test_the_demo_fits_the_model():
    def length(settings):
        arguments = settings.server_args()
        return int(arguments[arguments.index("--max-model-len") + 1])

    short = replace(SETTINGS, context=1000, positions=2048)
    assert (length(SETTINGS), SETTINGS.window) == (3072, 2048)
    assert (length(short), short.window) == (2048, 2047)
    assert length(replace(SETTINGS, positions=3070)) == 3070
    demo.check_positions(short)
    demo.check_positions(replace(SETTINGS, positions=3064))
    with pytest.raises(ValueError, match="3,064 positions, .* has 3,063: lower --context to 2999"):
        demo.check_positions(replace(SETTINGS, positions=3063))


def test_summary_table_compares_with_auto():
    results = {
        BASELINE: demo.Result(1000, Score((-2.0, -2.0)), 50.0, ("[::-1]", "b", "c")),
        "fp8": demo.Result(2000, Score((-2.0, -2.0)), 40.0, ("[::-1]", "B", "c")),
    }
    text = render(demo.summary_table(SETTINGS, results, 123.4))
    for cell in ("2.00x", "+0.00 ± 0.00", "40.0 ms", "1.25x", "123 s"):
        assert cell in text
    answers = render(demo.answers_table(results))
    assert "[::-1]" in answers  # code in an answer is no markup
    assert "word for word" in answers and "B" in answers


def test_the_demo_ends_with_its_table(monkeypatch):
    """Answers, some 60 lines of them, come before the table that matters."""
    result = demo.Result(1000, Score((-2.0, -2.0)), 50.0, ("red, yellow, blue", "b", "c"))
    monkeypatch.setattr(demo, "_measure", lambda *_: result)
    monkeypatch.setattr(demo, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(demo, "positions", lambda _: None)
    monkeypatch.setattr(demo, "make_windows", lambda *_: [[1]] * (SETTINGS.windows + demo.SAMPLES))
    output = io.StringIO()
    demo.run(SETTINGS, Console(file=output, width=80))
    text = output.getvalue()
    assert text.index("yellow") < text.index("KV caches of m") < text.index("1.00x")
    assert len(text[text.index("1.00x") :].splitlines()) < 10


def test_streams_that_do_not_fit_are_refused():
    demo.check_capacity(SETTINGS, 4 * 3064)
    with pytest.raises(ValueError, match="12,256 tokens of KV cache, and 1 GiB hold 12,255"):
        demo.check_capacity(SETTINGS, 4 * 3064 - 1)


def test_decode_step_leaves_prefill_out(monkeypatch):
    """Only steps after the last first token, and before the first end, count."""
    early = [(0.0, 1), (5.0, 2), (10.0, 3), (10.1, 4), (10.2, 5)]
    late = [(10.0, 1), (10.1, 2), (10.3, 4), (20.0, 5)]  # one chunk carries two tokens

    async def events(*_):
        return [early, late]

    monkeypatch.setattr(demo, "_stream_all", events)
    assert demo.decode_step(None, "m", [[1], [2]], 5) == pytest.approx(0.1)


def test_decode_step_without_overlap_is_refused(monkeypatch):
    async def events(*_):
        return [[(0.0, 1), (1.0, 2)], [(2.0, 1), (3.0, 2)]]

    monkeypatch.setattr(demo, "_stream_all", events)
    with pytest.raises(ValueError, match="--steps"):
        demo.decode_step(None, "m", [[1], [2]], 2)


def test_log_tail_brings_the_cause_up(tmp_path):
    """A worker's error, once, although the API server's traceback is longer than the tail."""
    log = tmp_path / "log"
    cause = "(Worker pid=7) ERROR [core.py:1] ValueError: layer 3 has no k_scale"
    log.write_text("\n".join(["start", cause, cause, *(f"frame {i}" for i in range(60))]))
    text = log_tail(log)
    assert text.count("ValueError: layer 3 has no k_scale") == 1
    assert "frame 59" in text and "frame 0\n" not in text and str(log) in text


# Both a server and an engine that ignore SIGTERM, with a child each.
STUBBORN = """\
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["STARTED"], "w") as file:
    file.write(str(os.getpgid(0)))
time.sleep(600)
"""
ENGINE = "class LLM:\n    def __init__(self, **_):\n" + textwrap.indent(STUBBORN, " " * 8)
USER = """\
import os, sys
from kvq_plugin import cli, servers
servers.vllm_command = lambda: os.environ["FAKE_VLLM"]
servers.GRACE_SECONDS = 1.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def ignored_signals():
    """As in a shell's background job (SIGINT), and under nohup (SIGHUP): children inherit it."""
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _hear_signals() -> None:
    for number in cli.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.usefixtures("ignored_signals")
@pytest.mark.parametrize(
    ("command", "number"),
    [
        *((c, n) for c in ("demo --model", "eval") for n in cli.SIGNALS),
        ("calibrate -o {tmp}/out", signal.SIGINT),
    ],
)
def test_signal_leaves_no_process(command, number, tmp_path, smollm2):
    """Ctrl-C, kill and a closed terminal, each sent twice: server or engine are gone.

    Also when pytest itself has been told to ignore them: ``nohup make test &``.
    """
    started, server, package = tmp_path / "started", tmp_path / "serve", tmp_path / "vllm"
    server.write_text(f"#!{sys.executable}\n{STUBBORN}")
    server.chmod(0o755)
    package.mkdir()
    (package / "__init__.py").write_text(ENGINE)
    env = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parents[1]}",
        "TMPDIR": str(tmp_path),
        "STARTED": str(started),
        "FAKE_VLLM": str(server),
    }
    command = command.format(tmp=tmp_path)
    arguments = [sys.executable, "-c", USER, *command.split(), str(smollm2)]
    user = subprocess.Popen(arguments, env=env, stderr=subprocess.DEVNULL, preexec_fn=_hear_signals)
    try:
        deadline = time.monotonic() + 120
        while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        group = int(started.read_text())
        assert len(process_group(group)) == 2
        user.send_signal(number)
        time.sleep(0.3)
        with suppress(ProcessLookupError):
            user.send_signal(number)  # as timeout(1) and impatient people do
        user.wait(60)
    finally:
        user.kill()
        user.wait()
    assert user.returncode == (cli.INTERRUPTED if number is signal.SIGINT else 128 + number)
    assert process_group(group) == []
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith((".", "kvq", "out"))}
    assert not left
