"""``kvq doctor --url``: what a running server stores its KV cache with, and how that goes.

Everything is read from the server's ``/metrics``; kvq_plugin.serving.metrics says what of it is the
plugin's. The server may be on another machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from rich.console import Console

from kvq_plugin.doctor import ADVICE, BAD, GOOD, Finding, print_findings
from kvq_plugin.formats import LOWBIT, SERVED
from kvq_plugin.mapping import MIXED
from kvq_plugin.servers import read_metrics

#: Share of saturating values of one layer's K or V that is worth a remark, and that is a fault.
#: SmolLM2 with scales of the largest values of another text: up to 0.09 %; with a quarter of
#: these, from 1.4 % (docs/metrics.md).
REMARK, FAULT = 0.001, 0.01
#: Layers' keys or values that have a line each; the others share one.
_NAMED = 5
_NO_SCALES = "--kv-cache-dtype int8_per_token_head needs no scales"
#: Names that no vLLM has of its own: static formats of ours with no scale to fall back to, those
#: below 8 bits, and mappings. (A test compares them with vLLM's.)
OURS = {
    MIXED,
    *(n for n, f in SERVED.items() if n in LOWBIT or (not f.is_dynamic and not f.default_scale)),
}
_UNQUANTIZED = ("auto", "bfloat16", "float16")
_CONFIG = "vllm:cache_config_info"
#: What is read of the plugin's metrics -> the labels that are looked at.
_LABELS = {
    "kvq:cache_layers": ("format",),
    "kvq:sampled_values_total": ("layer", "kind"),
    "kvq:saturated_values_total": ("layer", "kind"),
}
_REQUESTS = ("num_requests_running", "num_requests_waiting", "num_preemptions_total")
_NUMBERS = {
    *_LABELS,
    *("kvq:cache_bytes", "kvq:cache_bytes_in_use", "kvq:recent_rows"),
    *(f"vllm:{name}" for name in _REQUESTS),
}


def run(url: str, console: Console | None = None) -> None:
    """Print the report on the server at *url*.

    Raises ValueError when something has to be repaired, or nothing like vLLM answers.
    """
    try:
        samples = read_metrics(url)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(
            f"no metrics from {url}: {_reason(error)}; expected a vLLM server's address, such "
            "as http://127.0.0.1:8000"
        ) from error
    check_samples(url, samples)
    console = console or Console()
    broken = print_findings(console, "Server", server(samples))
    if _of(samples, _CONFIG):  # of anything else there is no more to say
        broken += print_findings(console, "Scales", scales(samples))
    if broken:
        raise ValueError(f"{broken} problem(s) found; see above")


def _reason(error: Exception) -> str:
    """What went wrong, without what urllib and Python put around it."""
    if not isinstance(error, HTTPError):  # whose reason lacks the status
        error = getattr(error, "reason", error)
    return str(getattr(error, "strerror", None) or error).strip()


def check_samples(url: str, samples: Sequence[Any]) -> None:
    """ValueError for a value or a label, of those that are read, that no vLLM's has."""
    for sample in samples:
        if sample.name not in _NUMBERS:
            continue
        missing = [label for label in _LABELS.get(sample.name, ()) if label not in sample.labels]
        if missing:
            what = f"labels {', '.join(_LABELS[sample.name])}, got none called {missing[0]}"
        elif not (math.isfinite(sample.value) and sample.value >= 0):
            what = f"a finite number, 0 or more, got {sample.value}"
        else:
            continue
        raise ValueError(
            f"odd metrics from {url}: {sample.name}: expected {what}; give the address of vllm "
            "serve itself"
        )


def _of(samples: Sequence[Any], name: str) -> list[Any]:
    return [s for s in samples if s.name == name]


def _sum(samples: Sequence[Any], name: str) -> float:
    return sum(s.value for s in _of(samples, name))


def server(samples: Sequence[Any]) -> Iterator[Finding]:
    """The cache's dtype and formats, what it holds, and whether it is too small."""
    config = next((s.labels for s in _of(samples, _CONFIG)), None)
    if config is None:
        yield Finding(BAD, "these are not vLLM's metrics", "give the address of vllm serve")
        return
    dtype, tokens = config.get("cache_dtype", "?"), config.get("kv_cache_size_tokens", "?")
    tokens = f"{int(tokens):,}" if tokens.isdecimal() else tokens
    yield Finding(
        GOOD,
        f"--kv-cache-dtype {dtype}, blocks of {config.get('block_size', '?')} tokens, "
        f"{tokens} tokens fit",
    )
    layers = {s.labels["format"]: int(s.value) for s in _of(samples, "kvq:cache_layers")}
    if layers:
        stored = ", ".join(f"{count} layers in {name}" for name, count in layers.items())
        yield Finding(GOOD, f"the plugin stores {stored}")
    elif dtype in OURS:
        yield Finding(
            ADVICE,
            f"{dtype} cannot be vLLM's own here, and the server gives no kvq metrics",
            "perhaps KVQ_METRICS_DIR is empty, no folder for them could be made (the log says so), "
            "its kvq_plugin is older than they are with several API servers, its workers are on "
            "other machines, or no layer has a quantized cache",
        )
    elif dtype in SERVED:
        yield Finding(
            ADVICE,
            f"the plugin reports no layers: {dtype} is vLLM's own here, or the server gives no kvq "
            "metrics",
            "`kvq doctor` on the server's machine says whether vLLM finds the plugin",
        )
    else:
        yield Finding(GOOD, "the plugin stores nothing: the KV cache is vLLM's own")
    if total := _sum(samples, "kvq:cache_bytes"):
        used = _sum(samples, "kvq:cache_bytes_in_use")
        yield Finding(GOOD, f"{used / 2**20:,.0f} of {total / 2**20:,.0f} MiB in use")
    if _of(samples, "kvq:recent_rows"):
        rows = int(_sum(samples, "kvq:recent_rows"))
        yield Finding(GOOD, f"{rows:,} recent rows per layer kept at 8 bits")
    running, waiting, thrown = (int(_sum(samples, f"vllm:{name}")) for name in _REQUESTS)
    says = f"{running} requests running, {waiting} waiting, {thrown} preempted since the start"
    if thrown:
        yield Finding(
            ADVICE,
            says,
            "preempted ones are computed again: give the cache more memory "
            "(--kv-cache-memory-bytes), or take a smaller KV cache, such as int4",
        )
    else:
        yield Finding(GOOD, says)


def scales(samples: Sequence[Any]) -> Iterator[Finding]:
    """Whether static scales fit what is stored with them."""
    counted: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for at, name in enumerate(("kvq:sampled_values_total", "kvq:saturated_values_total")):
        for s in _of(samples, name):
            counted[s.labels["layer"], s.labels["kind"]][at] += s.value
    if not counted:
        yield _uncounted(samples)
        return
    shares = {where: bad / seen for where, (seen, bad) in counted.items() if seen}
    if not shares:
        yield Finding(
            ADVICE,
            "no values were looked at yet",
            "send a request, and ask again; on GPUs none are looked at",
        )
        return
    seen = sum(seen for seen, _ in counted.values())
    worst = sorted(shares, key=lambda where: -shares[where])
    faulty = [where for where in worst if shares[where] > REMARK]
    if not faulty:
        layer, kind = worst[0]
        yield Finding(
            GOOD,
            f"of {seen:,.0f} sampled values at most {shares[worst[0]]:.3%} saturate "
            f"({kind}s of {layer})",
        )
    for layer, kind in faulty[:_NAMED]:
        share = shares[layer, kind]
        yield Finding(
            BAD if share > FAULT else ADVICE,
            f"{share:.2%} of the sampled {kind}s of {layer} saturate: the scale is too small",
        )
    yield from _further([shares[where] for where in faulty[_NAMED:]])
    if faulty:
        yield Finding(
            ADVICE,
            "scales that are too small cost accuracy",
            "kvq calibrate MODEL -o OUT --data FILE, with text like what the server is asked; or "
            + _NO_SCALES,
        )


def _uncounted(samples: Sequence[Any]) -> Finding:
    """Of a server that counts no values: it has no static scales, or nobody knows."""
    stored = [s.labels["format"] for s in _of(samples, "kvq:cache_layers")]
    names = stored or [s.labels.get("cache_dtype", "?") for s in _of(samples, _CONFIG)]
    for name in names:
        known = name in _UNQUANTIZED or (name in SERVED and SERVED[name].is_dynamic)
        if not known:
            return Finding(
                ADVICE,
                f"whether scales of {name} are too small is not known: the server counts no values",
                f"vLLM's own KV caches are never counted; {_NO_SCALES}",
            )
    return Finding(GOOD, "none that could be too small: the KV cache has no static ones")


def _further(shares: Sequence[float]) -> Iterator[Finding]:
    """Those that have no line of their own, largest first: the faults, and what is less."""
    faults = [share for share in shares if share > FAULT]
    if faults:
        yield Finding(
            BAD,
            f"{len(faults)} more layers' keys or values saturate, {faults[-1]:.2%} to "
            f"{faults[0]:.2%}: their scales are too small",
            count=len(faults),
        )
    if less := len(shares) - len(faults):
        yield Finding(ADVICE, f"{less} more layers' keys or values saturate, by less")
