"""``kvq_plugin.servers`` around something that merely answers like a server: a mock of vLLM's."""

import sys
import tempfile

import pytest

from kvq_plugin import servers

ANSWERS = """\
import http.server, sys
print("a line of the log", flush=True)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


class TimeLimit(BaseException):
    """As pytest's time limit ends a test: no Exception."""


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """The folder in which servers that only answer keep their logs."""
    command = tmp_path / "vllm"
    command.write_text(f"#!{sys.executable}\n{ANSWERS}")
    command.chmod(0o755)
    monkeypatch.setattr(servers, "vllm_command", lambda: str(command))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("error", [AssertionError, TimeLimit])
def test_log_stays_when_the_block_fails(error, answering):
    with pytest.raises(error), servers.serve("m", "int4") as server:
        raise error
    (log,) = answering.glob("kvq-int4-*.log")
    assert log == server.log
    assert log.read_text().startswith("a line of the log")
    assert server.group_members() == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit])
def test_log_goes_when_the_block_ends_or_the_user_ends_it(error, answering):
    try:
        with servers.serve("m", "int4") as server:
            if error is not None:
                raise error
    except (KeyboardInterrupt, SystemExit) as caught:
        assert type(caught) is error
    assert not list(answering.glob("*.log"))
    assert server.group_members() == []
