"""Perplexity through a serving engine, against the same engine with an unquantized cache.

The engine prefills windows of 2,048 tokens with ``prompt_logprobs``. Attention reads K and V
back from the cache while prefilling, so the figure includes what quantizing them costs. vLLM
never serves such a request from its prefix cache (some positions would lack a logprob), so
windows may be repeated and shared between servers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.servers import engine_process, run_engine
from kvq_plugin.serving.scales.declared import read_json, unquantized_dtype

WINDOW = 2048
BUILTIN_TEXT = "builtin"
BASELINE = "auto"

Window = list[int]
Tick = Callable[[], None]


def builtin_text() -> str:
    """Technical prose that every Python carries: the language reference of ``pydoc_data``.

    All topics in the order of their names, an empty line between two: 470,000 characters,
    113,000 SmolLM2 tokens. The text changes with Python's minor version, so only figures of
    one interpreter compare.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(name: str) -> str:
    """The text called ``builtin``, else the UTF-8 file *name*."""
    return builtin_text() if name == BUILTIN_TEXT else Path(name).read_text(encoding="utf-8")


def load_tokenizer(model: str):
    """The Hugging Face tokenizer of *model* (a directory or a hub name)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def cache_dtype(model: str, dtype: str) -> str:
    """*dtype* as ``--kv-cache-dtype`` takes it, for which ``auto`` means unquantized here.

    vLLM's ``auto`` quantizes the cache of a checkpoint that declares a KV scheme.
    """
    if dtype != BASELINE:
        return dtype
    folder = checkpoint_folder(model, only=["*.json"])
    return unquantized_dtype(read_json(folder / "config.json"), folder)


def make_windows(tokenizer, text: str, count: int, length: int = WINDOW) -> list[Window]:
    """The first *count* windows of *length* tokens of *text*, one after the other.

    Where the tokenizer begins a text with a BOS token, so does every window: models trained
    with it use it as an attention sink. Raises ValueError when the text is too short.
    """
    bos = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = length - len(bos)
    if len(ids) < count * step:
        raise ValueError(
            f"the text has {len(ids):,} tokens, {count} windows of {length} need "
            f"{count * step:,}: ask for at most {len(ids) // step} or give a longer text"
        )
    return [bos + ids[i * step : (i + 1) * step] for i in range(count)]


def offline_logprobs(llm, window: Window) -> list[float]:
    """Natural-log probability of tokens 1.. of *window* given those before, from a vllm.LLM."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    [output] = llm.generate({"prompt_token_ids": window}, params, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return [row[token].logprob for token, row in zip(window[1:], rows, strict=True)]


def http_logprobs(client, model: str, window: Window) -> list[float]:
    """As :func:`offline_logprobs`, from a server through an ``openai.OpenAI`` *client*."""
    extra = {"prompt_logprobs": 0}
    reply = client.completions.create(
        model=model, prompt=window, max_tokens=1, temperature=0.0, extra_body=extra
    )
    rows = reply.choices[0].prompt_logprobs[1:]
    return [row[str(token)]["logprob"] for token, row in zip(window[1:], rows, strict=True)]


@dataclass(frozen=True)
class Score:
    """Log-probabilities of every scored token of a text, in order."""

    logprobs: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))

    def change(self, baseline: Score) -> tuple[float, float]:
        """Perplexity against *baseline* as (change, standard error), both in percent.

        The error is that of the mean paired difference per token; it tells a real loss from
        the noise of a short text. Raises ValueError when other tokens were scored.
        """
        pairs = zip(baseline.logprobs, self.logprobs, strict=True)
        differences = [before - after for before, after in pairs]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return 100 * math.expm1(mean), 100 * math.exp(mean) * error


def perplexity_offline(llm, windows: Sequence[Window], tick: Tick = lambda: None) -> Score:
    """Score *windows* with an offline ``vllm.LLM``; *tick* is called after each window."""
    return _score(lambda window: offline_logprobs(llm, window), windows, tick)


def perplexity_http(
    client, model: str, windows: Sequence[Window], tick: Tick = lambda: None
) -> Score:
    """Score *windows* with a server through an ``openai.OpenAI`` *client*."""
    return _score(lambda window: http_logprobs(client, model, window), windows, tick)


def _score(logprobs: Callable[[Window], list[float]], windows, tick: Tick) -> Score:
    scored: list[float] = []
    for window in windows:
        scored += logprobs(window)
        tick()
    return Score(tuple(scored))


def evaluate(
    model: str,
    kv_cache_dtype: str,
    texts: Mapping[str, Sequence[Window]],
    *,
    kv_memory_bytes: int = 1 << 30,
    tick: Tick = lambda: None,
) -> dict[str, Score]:
    """Score every text's windows with an engine of its own process, which is gone afterwards.

    *texts* maps a name to windows; *tick* is called after each window. Raises ServerError with
    the end of the engine's log, which is then kept, when it does not start or fails.
    """
    options = {
        "model": model,
        "kv_cache_dtype": cache_dtype(model, kv_cache_dtype),
        "kv_cache_memory_bytes": kv_memory_bytes,
        "max_model_len": max(len(w) for windows in texts.values() for w in windows) + 1,
        "enforce_eager": True,  # compiling takes longer than the run
    }
    with engine_process(__name__, f"with {kv_cache_dtype}") as engine:
        engine.send((options, [window for windows in texts.values() for window in windows]))
        return {t: _score(lambda _: engine.receive(), w, tick) for t, w in texts.items()}


def _work(pipe: Connection) -> None:
    """The engine's process: receives its options and the windows, sends each one's logprobs."""
    options, windows = pipe.recv()
    from vllm import LLM

    llm = LLM(**options)
    for window in windows:
        pipe.send(offline_logprobs(llm, window))


if __name__ == "__main__":
    run_engine(_work)
