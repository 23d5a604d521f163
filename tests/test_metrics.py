"""What the plugin adds to ``/metrics``, without a server: counts, files, what is read of them."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from kvq_plugin import doctor_url
from kvq_plugin.doctor import ADVICE, BAD, GOOD, print_findings
from kvq_plugin.formats import get_format
from kvq_plugin.layout import GROUP
from kvq_plugin.reference import StaticScale, dequantize, quantize
from kvq_plugin.serving import metrics

HEADS, HEAD_SIZE = 2, 64


@pytest.mark.parametrize(
    ("name", "zero_point"),
    [("int8", None), ("int8", 7.0), ("fp8_e4m3", None), ("fp8_e5m2", None)],
)
def test_beyond_counts_what_the_code_cannot_hold(name, zero_point):
    """Values whose code is the largest and whose error is more than rounding's."""
    stream = get_format(name).key
    limit = stream.code.qmax + 0.5
    x = torch.randn(50, HEADS, HEAD_SIZE).bfloat16() * stream.code.qmax / 2
    static = StaticScale.expand(torch.tensor(0.5), HEADS, HEAD_SIZE, zero_point)
    y = x.float() / 0.5 + (zero_point or 0.0)
    too_large = y.abs() > limit
    assert metrics.beyond(x, static, limit) == int(too_large.sum())
    decoded = dequantize(*quantize(x, stream, static), stream, static)
    held = decoded / 0.5 + (zero_point or 0.0)
    assert bool((held[too_large].abs() >= stream.code.qmax).all())
    assert 0 < int(too_large.sum()) < x.numel() / 2


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A registry with vLLM's gauges and our collector, and one layer's meter that reports to it."""
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    registry = CollectorRegistry()
    labels = ["engine", "model_name"]
    usage = Gauge("vllm:kv_cache_usage_perc", "share", labels, registry=registry).labels("0", "m")
    running = Gauge("vllm:num_requests_running", "n", labels, registry=registry).labels("0", "m")
    metrics.add_to(registry)
    metrics.add_to(registry)  # vLLM asks for it more than once
    files = metrics.Files(str(tmp_path), 20)
    memory = files.gauge(metrics.BYTES, engine="0"), {}

    def meter(name, offset=0):
        format = get_format(name)
        impl = SimpleNamespace(format=format, kernel_format=format)
        labels = {"engine": "0", "layer": f"layers.{offset}", "format": name}
        figures = None
        if not format.is_dynamic:
            figures = [
                tuple(
                    files.counter(n, **labels, kind=kind)
                    for n in (metrics.SAMPLED, metrics.SATURATED)
                )
                for kind in ("key", "value")
            ]
        recent = files.gauge(metrics.RECENT, engine="0", stage="0") if format.recent else None
        return metrics.Meter(impl, offset, figures, memory, recent)

    def read():
        text = generate_latest(registry).decode()
        families = text_string_to_metric_families(text)
        return {(s.name, s.labels.get("kind", "")): s.value for f in families for s in f.samples}

    return SimpleNamespace(meter=meter, read=read, usage=usage, running=running)


def test_a_meter_samples_the_first_store_and_every_so_manyth(served):
    meter = served.meter("int8", offset=3)
    ones = StaticScale.expand(torch.tensor(1.0), HEADS, HEAD_SIZE)
    key = torch.zeros(200, HEADS, HEAD_SIZE)
    key[::8] = 1000.0
    value = torch.full_like(key, 127.4)
    cache = (torch.zeros(4, HEADS, 32, 2 * HEAD_SIZE, dtype=torch.uint8),)
    seen = []
    for _ in range(2 * metrics.EVERY):
        meter.store(key, value, cache, 130, (ones, ones))
        seen.append(served.read()["kvq:sampled_values_total", "key"])
    row = HEADS * HEAD_SIZE
    per_store = 65 * row  # every second row of 130: 128 would be as many values as are looked at
    grew = [i for i, (a, b) in enumerate(zip([0.0, *seen], seen, strict=False)) if b > a]
    assert grew == [0, 4, 4 + metrics.EVERY] and seen[-1] == 3 * per_store
    found = served.read()
    assert found["kvq:saturated_values_total", "key"] == 3 * row * len(range(0, 130, 8))
    assert found["kvq:saturated_values_total", "value"] == 0
    assert found["kvq:cache_bytes", ""] == cache[0].nbytes


def test_bytes_are_those_of_the_cache_that_stays(served):
    """vLLM measures graphs on a GPU over small ones before."""
    meters = [served.meter("int8_per_token_head", offset) for offset in range(2)]
    rows = torch.zeros(3, HEADS, HEAD_SIZE)
    for size in (1 << 10, 1 << 16):
        layers = torch.zeros(size, dtype=torch.uint8).split(size // 2)
        for meter, pages in zip(meters, layers, strict=True):
            meter.store(rows, rows, (pages,), 3, (None, None))
        assert served.read()["kvq:cache_bytes", ""] == size


def test_bytes_in_use_and_recent_rows_follow_vllm(served):
    meter = served.meter("int4")
    pages = torch.zeros(1 << 20, dtype=torch.uint8)
    both = pages[: 1 << 19], pages[1 << 19 :]  # one allocation, counted once
    rows = torch.zeros(3, HEADS, HEAD_SIZE)
    meter.store(rows, rows, both, 3, (None, None))
    meter.rows(torch.tensor([5, 63, 64, 1000], dtype=torch.int32))
    served.usage.set(0.25)
    served.running.set(4)
    found = served.read()
    assert found["kvq:cache_bytes", ""] == 1 << 20
    assert found["kvq:cache_bytes_in_use", ""] == 1 << 18
    held = [n - get_format("int4").sealed_before(n - 1) for n in (5, 63, 64, 1000)]
    assert found["kvq:recent_rows", ""] == sum(held) and max(held) < 2 * GROUP
    served.running.set(0)
    assert served.read()["kvq:recent_rows", ""] == 0
    assert not any("sampled" in name for name, _ in found)


@pytest.fixture
def attach(tmp_path, monkeypatch):
    """attach(*formats, stage=0) in a process of its own with a layer of each; then read()."""
    monkeypatch.setattr(metrics.compat, "Attention", torch.nn.Linear, raising=False)
    monkeypatch.setattr(metrics.base, "KVQImpl", SimpleNamespace)
    monkeypatch.setattr(metrics.compat, "is_cpu", lambda: True)
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    ranks = {"model_parallel_is_initialized": True, "get_tensor_model_parallel_rank": 0}
    for name, answer in ranks.items():
        monkeypatch.setattr(metrics.compat, name, lambda a=answer: a, raising=False)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0))

    def attach(*formats, stage=0):
        layers = []
        for number, format in enumerate(map(get_format, formats)):
            layers.append(torch.nn.Linear(1, 1))
            layers[-1].impl = SimpleNamespace(format=format, kernel_format=format)
            layers[-1].layer_name = f"stage {stage}, layer {number}"
        group = SimpleNamespace(rank_in_group=stage)
        monkeypatch.setattr(metrics.compat, "get_pp_group", lambda: group, raising=False)
        monkeypatch.setattr(metrics.os, "getpid", lambda: 1000 + stage)  # names its files
        metrics.attach(torch.nn.Sequential(*layers), config)
        return [layer.impl.meter for layer in layers]

    def read():
        families = metrics.Collector(CollectorRegistry(), str(tmp_path)).collect()
        return {(s.name, *s.labels.items()): s.value for f in families for s in f.samples}

    return SimpleNamespace(attach=attach, read=read)


@pytest.mark.parametrize("on_cpu", (True, False))
def test_recent_rows_are_not_told_where_they_are_not_counted(attach, monkeypatch, on_cpu):
    monkeypatch.setattr(metrics.compat, "is_cpu", lambda: on_cpu)
    attach.attach("int4")
    assert ((metrics.RECENT, ("engine", "0")) in attach.read()) == on_cpu


@pytest.mark.parametrize("first", ["int4", "int8_per_token_head"])
def test_recent_rows_are_counted_by_the_first_stage_that_has_some(attach, first):
    """All stages have the rows of the same requests, each in its own layers."""
    lengths = torch.tensor([5, 63, 64, 1000], dtype=torch.int32)
    engine = ("engine", "0")
    for stage, formats in ((1, ("int4", "int4")), (0, (first, first))):  # whichever is there first
        for meter in attach.attach(*formats, stage=stage):
            meter.rows(lengths)
    held = [n - get_format("int4").sealed_before(n - 1) for n in lengths.tolist()]
    found = attach.read()
    rows = {key: value for key, value in found.items() if key[0] == metrics.RECENT}
    assert rows == {(metrics.RECENT, engine): sum(held)}
    layers = {dict(key[1:])["format"]: v for key, v in found.items() if key[0] == metrics.LAYERS}
    assert layers == ({"int4": 4} if first == "int4" else {first: 2, "int4": 2})


def test_without_room_there_are_no_metrics(tmp_path, monkeypatch):
    """A page of a mapped file that cannot be had would kill the engine."""
    pytest.importorskip("vllm")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.Files(str(tmp_path), 4)
    monkeypatch.setattr(metrics, "_folder", None)
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.tempfile, "mkdtemp", full)
        metrics.make_folder()
    assert metrics.FOLDER not in metrics.os.environ


def test_a_program_has_a_folder_and_its_workers_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_folder", None)
    monkeypatch.setattr(metrics, "_lock", None)
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics.atexit, "register", lambda *args: None)
    monkeypatch.setenv(metrics.FOLDER, "")  # an engine of ours, whose end is a signal
    metrics.make_folder()
    assert metrics._folder is None and metrics.os.environ[metrics.FOLDER] == ""
    monkeypatch.setenv(metrics.FOLDER, "of the process above")
    with monkeypatch.context() as patch:
        patch.setattr(metrics.multiprocessing, "parent_process", lambda: "an API server")
        metrics.make_folder()
        assert metrics.os.environ[metrics.FOLDER] == "of the process above"
    metrics.make_folder()
    [made] = tmp_path.iterdir()
    assert metrics.os.environ[metrics.FOLDER] == str(made)
    metrics.os.close(metrics._lock)


def test_what_a_program_serves_itself_has_the_figures(tmp_path, monkeypatch):
    """`vllm run-batch --enable-metrics` serves prometheus_client's own registry, and asks vLLM for
    none; an API server that then asks adds them no second time."""
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    monkeypatch.setattr(metrics, "_folder", None)
    monkeypatch.setattr(metrics, "_lock", None)
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics.atexit, "register", lambda *args: None)
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    metrics.make_folder()
    files = metrics.Files(metrics._folder, 1)
    metrics.add(files.gauge(metrics.LAYERS, engine="0", format="int4"), 2)
    for _ in range(2):
        assert generate_latest(registry).decode().count("\nkvq:cache_layers{") == 1
        metrics.add_to(registry)
    metrics.os.close(metrics._lock)


def test_the_folder_of_a_server_that_was_killed_goes_with_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics.atexit, "register", lambda *args: None)
    monkeypatch.setattr(metrics, "_lock", None)
    monkeypatch.setenv(metrics.FOLDER, "of the process above")
    (tmp_path / "kvq-metrics-link").symlink_to(Path(__file__).parent)  # is not followed

    def start() -> Path:
        monkeypatch.setattr(metrics, "_folder", None)
        metrics.make_folder()
        return Path(metrics._folder)

    told, tell = os.pipe()
    server = os.fork()
    if server == 0:
        try:
            os.write(tell, bytes(start()))
            signal.pause()
        finally:
            os._exit(1)
    killed = Path(os.fsdecode(os.read(told, 1000)))
    os.close(tell), os.close(told)
    try:
        running = start()
        assert killed.is_dir() and running.is_dir()
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    assert killed.is_dir()
    kept = metrics._lock
    start()
    assert not killed.exists() and running.is_dir()
    assert (tmp_path / "kvq-metrics-link").is_symlink() and Path(__file__).exists()
    os.close(kept), os.close(metrics._lock)


def sample(name, value, **labels):
    return SimpleNamespace(name=name, value=value, labels=labels)


def counted(layer, kind, seen, saturated):
    labels = {"layer": layer, "kind": kind, "format": "int8", "engine": "0"}
    return [sample("kvq:sampled_values_total", seen, **labels),
            sample("kvq:saturated_values_total", saturated, **labels)]  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "states", "says"),
    [
        ([], {GOOD}, "no static ones"),
        (counted("l", "key", 0, 0), {ADVICE}, "send a request"),
        (counted("l", "key", 1e6, 10), {GOOD}, "at most 0.001% saturate (keys of l)"),
        (counted("l", "key", 1e6, 5e3), {ADVICE}, "0.50% of the sampled keys of l"),
        (counted("a", "key", 1e6, 0) + counted("b", "value", 1e6, 3e5), {BAD, ADVICE},
         "30.00% of the sampled values of b saturate"),
        (sum((counted(f"l{i}", "key", 1e6, 9e5) for i in range(8)), []), {BAD, ADVICE},
         "3 more layers"),
    ],
)  # fmt: skip
def test_doctor_on_scales(samples, states, says):
    found = list(doctor_url.scales(samples))
    assert {f.state for f in found} == states
    assert says in "\n".join(f.what + f.advice for f in found)
    if BAD in states:
        assert "kvq calibrate" in found[-1].advice and "int8_per_token_head" in found[-1].advice


def test_doctor_counts_all_faults():
    """Of nine layers five have a line each; of the others three are faults and one is less."""
    shares = [9e5 - 1e5 * i for i in range(8)] + [5e3]
    samples = sum((counted(f"l{i}", "key", 1e6, x) for i, x in enumerate(shares)), [])
    found = list(doctor_url.scales(samples))
    assert sum(f.count for f in found if f.state == BAD) == 8
    assert [f.what for f in found if "more layers" in f.what] == [
        "3 more layers' keys or values saturate, 20.00% to 40.00%: their scales are too small",
        "1 more layers' keys or values saturate, by less",
    ]
    assert print_findings(Console(file=io.StringIO()), "Scales", found) == 8


def test_doctor_on_a_server():
    config = {"cache_dtype": "int4", "block_size": "128", "kv_cache_size_tokens": "12345"}
    info = sample("vllm:cache_config_info", 1.0, **config)
    stock = list(doctor_url.server([info]))
    assert "vLLM's own here" in stock[1].what and stock[1].state == ADVICE
    ours = [info, sample("kvq:cache_layers", 30, format="int4", engine="0"),
            sample("kvq:cache_bytes", 2**28, engine="0"), sample("kvq:recent_rows", 77, engine="0"),
            sample("kvq:cache_bytes_in_use", 2**26, engine="0"),
            sample("vllm:num_preemptions_total", 3, engine="0")]  # fmt: skip
    found = list(doctor_url.server(ours))
    text = "\n".join(f.what for f in found)
    for part in ("--kv-cache-dtype int4", "12,345 tokens", "30 layers in int4", "64 of 256 MiB",
                 "77 recent rows", "3 preempted"):  # fmt: skip
        assert part in text
    assert [f.state for f in found].count(ADVICE) == 1
    assert {f.state for f in doctor_url.server([])} == {BAD}


def test_doctor_on_no_server():
    with pytest.raises(ValueError, match="no metrics from http://127.0.0.1:9: Connection refused;"):
        doctor_url.run("http://127.0.0.1:9", Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="no metrics from nonsense"):
        doctor_url.run("nonsense", Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="from localhost:8000: unknown url type: localhost;"):
        doctor_url.run("localhost:8000", Console(file=io.StringIO()))
