"""One server with one scale four times too small: what ``/metrics``, the dashboard and
``kvq doctor --url`` say about it, and vLLM's own bench against it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from scaled import add_scales, change
from tiny_models import make

from kvq_plugin import doctor_url
from kvq_plugin.bench import serve as bench
from kvq_plugin.servers import read_metrics, serve

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
