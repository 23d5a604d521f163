"""``kvq bench generate``: transformers' ``generate`` with our caches and with its own, in turn.

One prompt is prefilled once, unquantized, at the longest context; every cache is then given as much
of it as a context has, for each sequence of a batch, and ``generate`` goes on from there in bursts,
one cache after the other. Time is that between two tokens of one burst; memory is what the cache
holds, at most, after any burst.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StoppingCriteria
from transformers.cache_utils import Cache

from kvq_plugin.hf_cache import NAME, KVQCache, KVQLayer
from kvq_plugin.hf_cache.memory import ARGUMENT, held_bytes

BURST = 9  # tokens, of which the first is not timed
BASELINE = "transformers bf16"


@dataclass(frozen=True)
class Candidate:
    """A cache to compare: what makes one for a model's configuration, the attention it goes with,
    and the package it needs, if any."""

    name: str
    make: Callable[[object], Cache]
    attention: str = "sdpa"
    needs: str | None = None


@dataclass(frozen=True)
class Row:
    """One candidate at one context length and batch size.

    Attributes:
        mebibytes: most that the cache held; memory_ratio: against :data:`BASELINE`.
        milliseconds: median time between two tokens; ratio: against :data:`BASELINE`.
    """

    context: int
    batch: int
    candidate: str
    mebibytes: float
    memory_ratio: float
    milliseconds: float
    ratio: float


def candidates(dtypes: Sequence[str]) -> list[Candidate]:
    """transformers' own caches, the unquantized one first, then ours."""

    def theirs(backend: str, **options) -> Callable:
        return lambda config: QuantizedCache(backend, config, **options)

    own = [Candidate(BASELINE, lambda config: DynamicCache(config=config))]
    for bits in (4, 2):  # it has no 8
        make = theirs("quanto", nbits=bits)
        own.append(Candidate(f"quanto int{bits}", make, needs="optimum"))
    for bits in (8, 4, 2):
        make = theirs("hqq", nbits=bits, axis_key=1, axis_value=1)
        own.append(Candidate(f"hqq int{bits}", make, needs="hqq"))
    return own + [
        Candidate(dtype, lambda config, dtype=dtype: KVQCache(config, dtype), NAME)
        for dtype in dtypes
    ]


def installed(candidate: Candidate) -> bool:
    """Whether the package that *candidate* needs is there."""
    return candidate.needs is None or find_spec(candidate.needs) is not None


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Running:
    """A candidate on its way: its cache, and the tokens so far."""

    def __init__(self, model, candidate: Candidate, past, ids: torch.Tensor) -> None:
        self.model, self.candidate, self.ids = model, candidate, ids
        self.cache = candidate.make(model.config)
        self.seconds: list[float] = []
        for i, (key, value) in enumerate(past):
            self.cache.update(key, value, i)
            if isinstance(self.cache.layers[i], KVQLayer):
                self.cache.layers[i].commit()  # what attention would have done
                self.cache.layers[i].settle()
        self.bytes = held_bytes(self.cache)

    def burst(self) -> None:
        self.model.set_attn_implementation(self.candidate.attention)
        clock = _Clock()
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=BURST,
            do_sample=False,
            stopping_criteria=[clock],
            **{ARGUMENT: self.cache},
        )
        self.seconds += [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
        self.bytes = max(self.bytes, held_bytes(self.cache))


def run(
    model_path: str,
    prompt: Sequence[int],
    contexts: Sequence[int],
    batches: Sequence[int],
    chosen: Sequence[Candidate],
    bursts: int,
    stage: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Row], dict[str, str]]:
    """Rows, and candidate -> why it has none. *tick* after each burst of each candidate.

    *prompt* has one token more than the longest context; the first of *chosen* is the baseline.
    Raises ValueError for a model with layers of other than full attention.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stage("prefilling")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).to(device).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt], device=device)
    whole = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :-1], **{ARGUMENT: whole}, logits_to_keep=1)
    if any(layer.keys.shape[2] != len(prompt) - 1 for layer in whole.layers):
        raise ValueError(
            "kvq bench generate: expected a model whose layers all have full attention"
        )
    absent = {c.name: f"needs {c.needs}" for c in chosen if not installed(c)}
    rows: list[Row] = []
    for context in contexts:
        for batch in batches:
            present = [c for c in chosen if c.name not in absent]
            past = [
                (layer.keys[:, :, :context].repeat(batch, 1, 1, 1),
                 layer.values[:, :, :context].repeat(batch, 1, 1, 1))
                for layer in whole.layers
            ]  # fmt: skip
            start = ids[:, : context + 1].repeat(batch, 1)
            stage(f"{context} tokens x {batch}")
            rows += _measure(model, past, start, present, bursts, absent, tick)
    return rows, absent


def _measure(model, past, start, chosen, bursts, absent, tick) -> list[Row]:
    running: list[_Running] = []
    with torch.inference_mode():
        for candidate in chosen:
            try:
                one = _Running(model, candidate, past, start)
                one.burst()  # warm-up, which also shows whether it works at all
            except Exception as error:  # transformers' own caches fail in ways of their own
                if candidate.attention == NAME or candidate is chosen[0]:
                    raise
                absent[candidate.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            one.seconds.clear()
            running.append(one)
        past.clear()
        for _ in range(bursts):
            for one in running:
                one.burst()
                tick()
    first = running[0]
    baseline = statistics.median(first.seconds)
    return [
        Row(
            context=start.shape[1] - 1,
            batch=len(start),
            candidate=one.candidate.name,
            mebibytes=one.bytes / 2**20,
            memory_ratio=one.bytes / first.bytes,
            milliseconds=1e3 * statistics.median(one.seconds),
            ratio=statistics.median(one.seconds) / baseline,
        )
        for one in running
    ]
