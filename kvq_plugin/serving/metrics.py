"""What the plugin adds to vLLM's ``/metrics``: formats, bytes, recent rows, values that saturate.

Stores happen in the workers, ``/metrics`` is served by another process, and vLLM's own way from one
to the other (``SchedulerStats``) has no room for more. So a worker keeps its figures in files of
prometheus_client's multiprocess format, in a folder that the process the user started makes and
whose name its children inherit; the collector adds the files up whenever somebody asks.

A static scale cannot follow the values, so those that do not fit are counted, in a sample: every
:data:`EVERY`-th store of a layer, rows of it with up to :data:`VALUES` values, and the first store
of all. docs/metrics.md has what that costs.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kvq_plugin.formats import GROUP
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving import base, compat

#: Environment variable with the folder of this server's files; empty: no metrics.
FOLDER = "KVQ_METRICS_DIR"
PREFIX = "kvq-metrics-"
EVERY = 32
#: Fewer than torch spreads over threads: waking those takes longer than counting.
VALUES = 16384
KEY_BYTES = 1024  # room for a figure's name, labels and help in a file; 400 with long layer names

SAMPLED = "kvq:sampled_values"
SATURATED = "kvq:saturated_values"
LAYERS = "kvq:cache_layers"
BYTES = "kvq:cache_bytes"
BYTES_IN_USE = "kvq:cache_bytes_in_use"
RECENT = "kvq:recent_rows"
STAGE = "stage"  # label in the files, of RECENT alone: the pipeline stage that counted
HELP = {
    SAMPLED: "Values looked at while they were stored with a static scale, a sample of all.",
    SATURATED: "Of the sampled values, those beyond the largest that the scale can represent.",
    LAYERS: "Layers whose KV cache the plugin stores in this format.",
    BYTES: "Bytes of the memory that the plugin's KV caches lie in.",
    BYTES_IN_USE: "Of kvq:cache_bytes, those of blocks that requests hold.",
    RECENT: "Rows per layer that running requests keep at 8 bits beside their sealed ones.",
}
#: vLLM's own, that two of ours are completed with.
_USAGE, _RUNNING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running"


_folder: str | None = None  # that this process made
_lock: int | None = None  # open on it for as long as this process, or one forked off, runs


def make_folder() -> None:
    """Make the folder and name it in the environment, unless this process, or the one that it is a
    worker of, has done so. A server that a process with an engine starts has a folder of its own.
    Folders of servers that were killed go.
    """
    global _folder, _lock
    above = os.environ.get(FOLDER)
    if _folder or above == "" or (above and multiprocessing.parent_process() is not None):
        return
    try:
        _remove_abandoned()
        _folder, _lock = _locked_folder()
    except OSError as error:
        _go_without(error)
        return
    os.environ[FOLDER] = _folder
    atexit.register(_remove, _folder, os.getpid())
    # What this process may serve without vLLM's routes, as `vllm run-batch --enable-metrics` does.
    # Not imported here: prometheus_client looks then whether there are several API servers.
    if (client := sys.modules.get("prometheus_client")) is not None:
        add_to(client.REGISTRY)


def _locked_folder() -> tuple[str, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks, where none is found abandoned
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(folder):  # not taken for abandoned before it was locked
            return folder, lock
        os.close(lock)


def _remove_abandoned() -> None:
    """Remove this user's folders that nobody has locked: kill -9 leaves no time to do it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # somebody else's, or gone
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # in use
        finally:
            os.close(lock)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked off
        shutil.rmtree(folder, ignore_errors=True)


def _go_without(error: OSError) -> None:
    compat.get_logger(__name__).warning("No kvq metrics on /metrics: %s", error)


# --- in the worker ---------------------------------------------------------------------


class Files:
    """This process's figures: counters add up over processes, gauges too.

    Raises OSError where there is no room for *count* figures of each kind: a page of a mapped file
    that cannot be had later would kill the process.
    """

    def __init__(self, folder: str, count: int) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        self._files = {}
        for kind in ("counter", "gauge_sum"):
            path = os.path.join(folder, f"{kind}_{os.getpid()}.db")
            with open(path, "ab") as file:
                size = file.tell() + count * KEY_BYTES
                os.posix_fallocate(file.fileno(), 0, size)
            self._files[kind] = MmapedDict(path)

    def counter(self, name: str, **labels: str) -> tuple[Any, str]:
        """What :func:`add` takes for the counter *name* with *labels*, 0 from now on."""
        return self._figure("counter", name, f"{name}_total", labels)

    def gauge(self, name: str, **labels: str) -> tuple[Any, str]:
        """As :meth:`counter`, for what :func:`add` and :func:`put` change."""
        return self._figure("gauge_sum", name, name, labels)

    def _figure(self, kind: str, family: str, name: str, labels: dict[str, str]) -> tuple[Any, str]:
        # As prometheus_client.mmap_dict.mmap_key writes it.
        key = json.dumps([family, name, dict(sorted(labels.items())), HELP[family]], sort_keys=True)
        self._files[kind].read_value(key)
        return self._files[kind], key


def add(figure: tuple[Any, str], amount: float) -> None:
    file, key = figure
    file.write_value(key, file.read_value(key)[0] + amount, 0.0)


def put(figure: tuple[Any, str], amount: float) -> None:
    file, key = figure
    file.write_value(key, float(amount), 0.0)


class Meter:
    """What one layer reports while it stores.

    Args:
        offset: of the stores that are sampled; layers differ in it, so that no step samples all.
        figures: (sampled, saturated) for K and V, in that order; None for dynamic scales.
        memory: the gauge of cache bytes, and what is in it: address -> bytes, of all layers.
        recent: the gauge of recent rows, where this layer is the one that reports them.
    """

    def __init__(self, impl, offset: int, figures, memory, recent=None) -> None:
        self._limits = [
            s.code.qmax + 0.5 for s in (impl.kernel_format.key, impl.kernel_format.value)
        ]
        self._format = impl.format
        self._until = offset % EVERY
        self._figures, self._memory, self._recent = figures, memory, recent
        self._counted, self._addresses = None, set()  # the caches in the gauge, and their memory

    def store(self, key, value, caches, count: int, statics) -> None:
        """Before ``key``, ``value [T, H, D]`` are stored, of which *count* rows are not padding."""
        counted = caches[0].data_ptr(), caches[0].shape[0]
        if counted != self._counted:
            self._counted = counted
            self._count_memory(caches)
        elif self._until:
            self._until -= 1
            return
        else:
            self._until = EVERY - 1
        if self._figures is None or not count or key.device.type != "cpu":
            return  # on a GPU the count would have to be waited for
        step = -(-count * key[0].numel() // VALUES)
        streams = zip((key, value), statics, self._limits, self._figures, strict=True)
        for x, static, limit, (sampled, saturated) in streams:
            rows = x[:count:step]
            add(sampled, rows.numel())
            add(saturated, beyond(rows, static, limit))

    def rows(self, seq_lens: torch.Tensor) -> None:
        """Before a step over sequences of ``seq_lens [requests]`` int32 tokens."""
        if self._recent is None:
            return
        sealed = (seq_lens - self._format.window).clamp(min=0) // GROUP * GROUP
        put(self._recent, int((seq_lens - sealed).sum()))

    def _count_memory(self, caches) -> None:
        """With the first store into *caches*. On GPUs there are others before: vLLM captures a few
        graphs over small ones, to see how much memory graphs take."""
        gauge, known = self._memory
        sizes = {s.data_ptr(): s.nbytes() for s in (c.untyped_storage() for c in caches)}
        for address in self._addresses | sizes.keys():
            size = sizes.get(address, 0)
            add(gauge, size - known.get(address, 0))
            known[address] = size
        self._addresses = set(sizes)


def beyond(x: torch.Tensor, static: StaticScale, limit: float) -> int:
    """How many of ``x [T, H, D]`` are further than *limit* codes from 0, or from the zero point."""
    y = x * static.inverse
    if static.zero_point is not None:
        y += static.zero_point
    return int(torch.count_nonzero(y.abs_() > limit))


def attach(model: torch.nn.Module, vllm_config: Any) -> None:
    """Give the attention layers of a model that vLLM has built their meters."""
    folder = os.environ.get(FOLDER)
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, compat.Attention) and isinstance(layer.impl, base.KVQImpl)
    ]
    if not layers or not folder:
        return
    try:
        files = Files(folder, 8 + 4 * len(layers))
    except OSError as error:
        _go_without(error)
        return
    engine = str(vllm_config.parallel_config.data_parallel_index)
    memory = files.gauge(BYTES, engine=engine), {}
    recent, counts_rows = None, compat.is_cpu() and _is_first_rank()  # GPUs would have to wait
    for number, layer in enumerate(layers):
        impl = layer.impl
        format = impl.kernel_format
        if _is_first_rank():  # the others have the same layers
            add(files.gauge(LAYERS, engine=engine, format=impl.format.name), 1)
        figures = None
        if not impl.format.is_dynamic:
            labels = {"engine": engine, "layer": layer.layer_name, "format": impl.format.name}
            figures = [
                tuple(files.counter(name, **labels, kind=kind) for name in (SAMPLED, SATURATED))
                for kind in ("key", "value")
            ]
        if recent is None and format.recent is not None and counts_rows:
            recent = files.gauge(RECENT, engine=engine, **{STAGE: str(_stage())})
            impl.meter = Meter(impl, number, figures, memory, recent)
        else:
            impl.meter = Meter(impl, number, figures, memory)


def _stage() -> int:
    return compat.get_pp_group().rank_in_group if compat.model_parallel_is_initialized() else 0


def _is_first_rank() -> bool:
    return not compat.model_parallel_is_initialized() or (
        compat.get_tensor_model_parallel_rank() == 0
    )


# --- in the API server -----------------------------------------------------------------


class Collector:
    """The figures of all workers, for prometheus_client's *registry* that vLLM serves."""

    def __init__(self, registry: Any, folder: str) -> None:
        self._registry, self._folder = registry, folder

    def describe(self) -> list[Any]:
        return []  # or registering would collect

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily
        from prometheus_client.multiprocess import MultiProcessCollector

        if not os.path.isdir(self._folder):
            return
        usage, running = self._vllm(_USAGE, _RUNNING)
        for family in MultiProcessCollector(None, self._folder).collect():
            if family.name == RECENT:
                family.samples = _rows(family.samples, running)
            yield family
            if family.name == BYTES:
                used = GaugeMetricFamily(BYTES_IN_USE, HELP[BYTES_IN_USE], labels=["engine"])
                for sample in family.samples:
                    share = usage.get(sample.labels["engine"], 0.0)
                    used.add_metric([sample.labels["engine"]], round(share * sample.value))
                yield used

    def _vllm(self, *names: str) -> list[dict[str, float]]:
        """engine -> value of each of vLLM's own gauges *names*."""
        from prometheus_client.multiprocess import MultiProcessCollector

        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # several API servers
            families = MultiProcessCollector(None).collect()
        else:
            families = self._registry.restricted_registry(names).collect()
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for sample in (s for family in families for s in family.samples if s.name in found):
            found[sample.name][sample.labels.get("engine", "0")] = sample.value
        return list(found.values())


def _rows(samples: list[Any], running: dict[str, float]) -> list[Any]:
    """Of each engine the first stage that has such layers: every stage has the same rows, and does
    not know what layers the others have. The last step's rows went with its requests."""
    first: dict[str, Any] = {}
    for s in sorted(samples, key=lambda s: int(s.labels[STAGE])):
        first.setdefault(s.labels["engine"], s)
    return [
        s._replace(labels={"engine": engine}, value=s.value if running.get(engine, 1) else 0.0)
        for engine, s in first.items()
    ]


def add_to(registry: Any) -> None:
    """Have *registry*, which vLLM is about to serve, tell the figures of this server's workers."""
    if (folder := os.environ.get(FOLDER)) and registry not in _served:
        _served.add(registry)
        registry.register(Collector(registry, folder))


_served: weakref.WeakSet = weakref.WeakSet()
