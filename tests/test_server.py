"""``vllm serve`` with quantized KV caches, as a user runs it: HTTP in, text out, clean end."""

from __future__ import annotations

import re
import signal
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvq_plugin.formats import get_format
from kvq_plugin.servers import GRACE_SECONDS, Server, ServerError, process_group, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KV_MEMORY = 256 << 20
ARGS = ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(KV_MEMORY)]
LAYERS, HEADS, HEAD_SIZE = 30, 3, 64  # of SmolLM2-135M
CLIENTS = 32
#: The answer leads by 2.7 nats with every KV cache; at a near tie, rounding would decide.
QUESTION = [{"role": "user", "content": "What is the boiling point of water?"}]
ANSWER = "100"
# One dtype ends by the signal of a terminal, the others by that of a service manager.
SIGNALS = {
    "fp8": signal.SIGINT,
    "int8_per_token_head": signal.SIGTERM,
    "int4_per_token_head": signal.SIGTERM,
}


@pytest.fixture(scope="module", params=SIGNALS)
def server(request, smollm2):
    with serve(smollm2, request.param, args=ARGS) as running:
        running.dtype, running.model = request.param, str(smollm2)
        yield running


def counting(start: int) -> str:
    """A prompt whose continuation is known: the next number is ``start + 8``."""
    return "".join(f"{n}, " for n in range(start, start + 8)).strip()


def continues(start: int, text: str) -> bool:
    """Whether *text* goes on where ``counting(start)`` ends, give or take a number or two."""
    number = re.search(r"\d+", text)
    return number is not None and abs(int(number[0]) - (start + 8)) <= 4


def complete(server: Server, prompt: str, **options):
    return server.client().completions.create(
        model=server.model, prompt=prompt, temperature=0.0, **({"max_tokens": 8} | options)
    )


def test_kv_tokens_follow_from_the_format(server):
    bytes_per_token = LAYERS * HEADS * get_format(server.dtype).bytes_per_token(HEAD_SIZE)
    # vLLM keeps one block of 128 tokens back, and a block is all or nothing.
    assert 0 <= KV_MEMORY // bytes_per_token - server.kv_tokens() <= 2 * 128


def test_completion(server):
    reply = complete(server, counting(21))
    assert "29" in reply.choices[0].text
    assert reply.usage.completion_tokens == 8


def test_completion_streams_the_same_text(server):
    chunks = [c for c in complete(server, counting(21), stream=True) if c.choices]
    assert len(chunks) > 1
    streamed = "".join(c.choices[0].text for c in chunks)
    assert streamed == complete(server, counting(21)).choices[0].text


def test_chat(server):
    reply = server.client().chat.completions.create(
        model=server.model, messages=QUESTION, temperature=0.0, max_tokens=24
    )
    assert ANSWER in reply.choices[0].message.content


def test_chat_streams(server):
    chunks = server.client().chat.completions.create(
        model=server.model, messages=QUESTION, temperature=0.0, max_tokens=24, stream=True
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert sum(map(bool, pieces)) > 1
    assert ANSWER in "".join(pieces)


def test_many_clients_at_once(server):
    """Every one of 32 concurrent clients gets the continuation of its own prompt.

    At 4 bits the model may skip a number, and which one differs with the batch; prompts are 25
    apart, so that the number it goes on with still tells whose prompt it continues.
    """
    starts = range(11, 11 + 25 * CLIENTS, 25)
    with ThreadPoolExecutor(CLIENTS) as pool:
        texts = list(pool.map(lambda s: complete(server, counting(s)).choices[0].text, starts))
    wrong = [(s, text) for s, text in zip(starts, texts, strict=True) if not continues(s, text)]
    assert not wrong


def test_ends_cleanly(server):
    """Last in the file: exit code 0, and engine and workers end by themselves."""
    group = server.process.pid
    assert len(process_group(group)) > 1
    server.process.send_signal(SIGNALS[server.dtype])
    assert server.process.wait(GRACE_SECONDS) == 0
    deadline = time.monotonic() + GRACE_SECONDS
    while process_group(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process_group(group) == []


def preemptions(server: Server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        found = re.search(r"^vllm:num_preemptions_total\{.*\} (\S+)$", reply.read().decode(), re.M)
    return float(found[1])


def test_a_pool_too_small_for_its_clients(smollm2):
    """Each of 32 clients needs four blocks before it is done, two of them of recent rows."""
    args = [*ARGS, "--max-model-len", "512", "--num-gpu-blocks-override", "40"]
    starts = range(11, 11 + 25 * CLIENTS, 25)
    with serve(smollm2, "int4", args=args) as server, ThreadPoolExecutor(CLIENTS) as pool:
        server.model = str(smollm2)
        options = {"extra_body": {"ignore_eos": True}, "max_tokens": 120}
        replies = list(pool.map(lambda s: complete(server, counting(s), **options), starts))
        assert [r.usage.completion_tokens for r in replies] == [120] * CLIENTS
        texts = [r.choices[0].text for r in replies]
        wrong = [(s, t) for s, t in zip(starts, texts, strict=True) if not continues(s, t)]
        assert not wrong
        assert preemptions(server) > 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GRACE_SECONDS) == 0


def test_refusal_shows_the_reason(smollm2, monkeypatch, tmp_path):
    """A server that does not start is reported with the end of its log, which stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ServerError, match="invalid choice"), serve(smollm2, "int7", args=ARGS):
        pass
    assert list(tmp_path.glob("kvq-int7-*.log"))
