"""One server with one scale four times too small: what ``/metrics``, the dashboard and
``kvq doctor --url`` say about it, and vLLM's own bench against it."""

from __future__ import annotations

import http.client
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from scaled import add_scales, change
from tiny_models import make

from kvq_plugin import doctor_url
from kvq_plugin.bench import serve as bench
from kvq_plugin.mapping import MIXED
from kvq_plugin.servers import read_metrics, serve
from kvq_plugin.serving import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana" / "kvq.json"
BAD_LAYER = "model.layers.1.self_attn"
KV_MEMORY = 16 << 20


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """A tiny model with the built-in one's tokenizer, and int8 scales of its own largest values,
    but for one."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("metrics")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plain = make(folder, "gqa", vocab_size=len(tokenizer))
    torch.manual_seed(1)
    prompts = torch.randint(3, len(tokenizer), (4, 400)).tolist()
    good = add_scales(plain, folder / "good", prompts, "int", [("channel", "attn_head")])
    name = f"{BAD_LAYER}.k_scale"
    scale = load_file(good / "model.safetensors")[name]
    model = change(good, folder / "too-small", {name: scale / 4})
    tokenizer.save_pretrained(model)
    args = ["--enforce-eager", "--max-model-len", "512", "--dtype", "bfloat16"]
    args += ["--kv-cache-memory-bytes", str(KV_MEMORY)]
    with serve(model, "auto", args=args) as running:
        running.model = str(model)
        yield running


def doctor(server) -> tuple[str, bool]:
    """What ``kvq doctor --url`` prints, and whether it finds a problem."""
    output = io.StringIO()
    try:
        doctor_url.run(server.url, Console(file=output, width=200))
    except ValueError:
        return output.getvalue(), True
    return output.getvalue(), False


def shares(server) -> dict[tuple[str, str], float]:
    found: dict = {}
    for s in read_metrics(server.url):
        if s.name.startswith("kvq:sa"):
            where = s.labels["layer"].removesuffix(".attn"), s.labels["kind"]
            found.setdefault(where, {})[s.name] = s.value
    return {
        where: v["kvq:saturated_values_total"] / v["kvq:sampled_values_total"]
        for where, v in found.items()
        if v["kvq:sampled_values_total"]
    }


def test_a_scale_too_small_shows_within_one_request(server):
    text, broken = doctor(server)
    assert "send a request" in text and not broken
    server.client().completions.create(
        model=server.model, prompt=list(range(100, 150)), max_tokens=2, temperature=0.0
    )
    found = shares(server)
    assert len(found) == 4  # two layers, K and V
    bad = found.pop((BAD_LAYER, "key"))
    # Gaussian values whose largest are some four deviations: a quarter of that is exceeded by 1/3.
    assert 0.1 < bad < 0.5 and max(found.values()) < doctor_url.REMARK
    text, broken = doctor(server)
    assert broken and f"of the sampled keys of {BAD_LAYER}.attn saturate" in text
    assert "2 layers in int8" in text and "kvq calibrate" in text
    assert text.count("saturate:") == 1


def test_bytes(server):
    allocated = server.metric("kvq:cache_bytes")
    assert 0.9 * KV_MEMORY < allocated <= KV_MEMORY
    assert 0 <= server.metric("kvq:cache_bytes_in_use") < 0.1 * allocated


def test_the_dashboard_asks_for_what_is_there(server):
    text = DASHBOARD.read_text(encoding="utf-8")
    panels = json.loads(text)["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"\b(?:kvq|vllm):\w+", target["expr"])
    }
    there = {s.name for s in read_metrics(server.url)}
    # The model has no recent rows; tests/test_metrics.py has them.
    assert asked - there == {"kvq:recent_rows"} and len(asked) > 8


def test_vllms_bench_against_it(server):
    load = bench.Load(server.model, 4, 60, 16, 1, True, KV_MEMORY)
    result = bench._client(load, server, 1, Path(server.model) / "result.json")
    assert result["completed"] == 4 and result["total_output_tokens"] == 4 * 16
    assert all(result[name] > 0 for name in bench._RESULTS.values())


# --- two API servers -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two API servers before one engine, whose layers have recent rows and static scales."""
    folder = tmp_path_factory.mktemp("two-servers")
    model = make(folder, "gqa", vocab_size=512)
    layers = {"kvq": {"layers": {"0": "int4", "1": "fp8"}}}
    args = ["--enforce-eager", "--max-model-len", "512", "--skip-tokenizer-init"]
    args += ["--kv-cache-memory-bytes", str(KV_MEMORY), "--api-server-count", "2"]
    args += ["--additional-config", json.dumps(layers)]
    with serve(model, MIXED, args=args) as running:
        running.model = str(model)
        yield running


def scrape(server) -> tuple[int, list[str]]:
    """Which process of the server answers, and the lines of ``/metrics``."""
    host, port = server.url.removeprefix("http://").split(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as client:
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
        ours = client.sock.getsockname()
        [answered] = [
            pid
            for pid in server.group_members()
            if any(c.raddr == ours for c in psutil.Process(pid).net_connections("tcp"))
        ]
    return answered, text.splitlines()


def test_each_of_two_api_servers_says_the_same(pair):
    # A server that is busy with a request may answer a scrape after it.
    client, rows, prompt, answer, requests = pair.client(), [], list(range(100, 150)), 300, 0
    with ThreadPoolExecutor(1) as pool:
        while not any(rows) and requests < 20:
            requests += 1
            request = pool.submit(
                client.completions.create, model=pair.model, prompt=prompt, max_tokens=answer,
                temperature=0.0, extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            while not request.done():
                rows.append(pair.metric("kvq:recent_rows"))
            assert request.result().usage.completion_tokens == answer
    assert 32 <= max(rows) < 64  # twice as many would be 64 and more
    said: dict[int, set[str]] = {}
    for _ in range(40):
        process, lines = scrape(pair)
        said.setdefault(process, set()).add("\n".join(x for x in lines if x.startswith("kvq:")))
        if len(said) == 2 and len(said[process]) == 1:
            break
    assert len(said) == 2 and len(set.union(*said.values())) == 1
    found = {}
    for line in said.popitem()[1].pop().splitlines():
        name, value = line.rsplit(" ", 1)
        found.setdefault(name.split("{")[0], []).append(float(value))
    assert found["kvq:cache_layers"] == [1, 1]
    [allocated], [used] = found["kvq:cache_bytes"], found["kvq:cache_bytes_in_use"]
    assert 0.9 * KV_MEMORY < allocated <= KV_MEMORY and 0 <= used < 0.1 * allocated
    assert found["kvq:recent_rows"] == [0]
    config = json.loads((Path(pair.model) / "config.json").read_text(encoding="utf-8"))
    row = config["num_key_value_heads"] * config["head_dim"]
    stores = [50, *[1] * (answer - 1)] * requests  # tokens of each store of a layer
    looked_at = stores[0] + sum(stores[2 :: metrics.EVERY])
    assert found["kvq:sampled_values_total"] == [looked_at * row] * 2  # K and V of the fp8 layer
    assert sum(x.startswith("vllm:") for x in lines) > 100
