"""Perplexity through a serving engine, against the same engine with an unquantized cache.

The engine prefills windows of 2,048 tokens with ``prompt_logprobs``. Attention reads K and V
back from the cache while prefilling, so the figure includes what quantizing them costs. vLLM
never serves such a request from its prefix cache (some positions would lack a logprob), so
windows may be repeated and shared between servers.

Beside it, how far the next-token distributions are from the unquantized cache's: computed from all
logits in the engine's own process (:mod:`kvq_plugin.logits`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from kvq_plugin.divergence import Divergence
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.servers import engine_process, run_engine
from kvq_plugin.serving import compat
from kvq_plugin.serving.scales.declared import read_config, unquantized_dtype

WINDOW = 2048
BASELINE = "auto"
#: The text that the unquantized engine wrote itself.
OWN = "own generations"
#: Windows of each text that the unquantized engine runs again in other chunks: the noise floor.
FLOOR_WINDOWS = 2
#: Nats between vLLM's log-probability of a token and that of the logits we were shown.
LOGITS_TOLERANCE = 1e-3

#: Questions that an engine answers at the same time.
TOGETHER = 64

_UNUSABLE = "there is no usable one in its folder"
_TOKENIZER_FILES = (
    "expected its files (tokenizer.json, tokenizer_config.json) beside config.json: copy them "
    "from the model that this one was made of"
)

Window = list[int]
Question = tuple[Window, int]  # a prompt, and the tokens that its answer may have
Tick = Callable[[], None]


def load_tokenizer(model: str):
    """The Hugging Face tokenizer of *model* (a directory or a hub name).

    Raises FileNotFoundError where there is no such model, and ValueError without a tokenizer, or
    with one that makes no tokens of a text.
    """
    from transformers import AutoTokenizer

    checkpoint_folder(model, only=["*.json"])  # of a path that is none, only this says so
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of any type, where a file is bad
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if reason.rstrip().endswith(":"):  # a list of packages and files follows
            reason = _UNUSABLE
        raise ValueError(f"no tokenizer for {model}: {reason}; {_TOKENIZER_FILES}") from error
    # Of some models transformers makes one without a vocabulary where there are no files.
    if not tokenizer("text", add_special_tokens=False).input_ids:
        raise ValueError(f"no tokenizer for {model}: {_UNUSABLE}; {_TOKENIZER_FILES}")
    return tokenizer


def cache_dtype(model: str, dtype: str) -> str:
    """*dtype* as ``--kv-cache-dtype`` takes it, for which ``auto`` means unquantized here.

    vLLM's ``auto`` quantizes the cache of a checkpoint that declares a KV scheme.
    """
    if dtype != BASELINE:
        return dtype
    folder = checkpoint_folder(model, only=["*.json"])
    return unquantized_dtype(read_config(folder / "config.json"), folder)


def beginning(tokenizer) -> Window:
    """The BOS token, where *tokenizer* begins a text with one. One that ends texts with EOS alone
    makes that of an empty text."""
    first = tokenizer("").input_ids[:1]
    return first if tokenizer("a").input_ids[:1] == first else []


def make_windows(
    tokenizer, text: str, count: int, length: int = WINDOW, more: int = 0
) -> list[Window]:
    """The first *count* windows of *length* tokens of *text* and *more* that nobody asked for, one
    after the other.

    Where the tokenizer begins a text with a BOS token, so does every window: models trained
    with it use it as an attention sink. Raises ValueError when the text is too short.
    """
    bos = beginning(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = length - len(bos)
    if len(ids) < (count + more) * step:
        asked = f"{count} windows" if count > 1 else "a window"
        need = "need" if count > 1 or more else "needs"
        besides = f" and {more} more to calibrate on" if more else ""
        fits = len(ids) // step - more
        remedy = f"ask for at most {fits} or give" if fits > 0 else "give"
        raise ValueError(
            f"the text has {len(ids):,} tokens, {asked} of {length}{besides} {need} "
            f"{(count + more) * step:,}: {remedy} a longer text"
        )
    return [bos + ids[i * step : (i + 1) * step] for i in range(count + more)]


def offline_logprobs(llm, window: Window) -> list[float]:
    """Natural-log probability of tokens 1.. of *window* given those before, from a vllm.LLM."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    [output] = llm.generate({"prompt_token_ids": window}, params, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return [row[token].logprob for token, row in zip(window[1:], rows, strict=True)]


def offline_greedy(llm, prompts: Sequence[Window], length: int) -> list[Window]:
    """*prompts*, each continued to *length* tokens at temperature 0 by a vllm.LLM."""
    from vllm import SamplingParams

    common = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(max_tokens=length - len(prompt), **common) for prompt in prompts]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, params, use_tqdm=False)
    return [p + list(o.outputs[0].token_ids) for p, o in zip(prompts, outputs, strict=True)]


def offline_answers(llm, questions: Sequence[Question]) -> list[str]:
    """What a vllm.LLM writes after each of *questions*, at temperature 0."""
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=tokens, temperature=0.0) for _, tokens in questions]
    given = [{"prompt_token_ids": prompt} for prompt, _ in questions]
    return [o.outputs[0].text for o in llm.generate(given, params, use_tqdm=False)]


def agreement(generation: Window, baseline: Window, prompt: int) -> int:
    """Tokens after the *prompt* before the first that differs."""
    pairs = list(zip(generation, baseline, strict=True))[prompt:]
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


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
    """Log-probabilities of every scored token of a text, in order.

    *divergence*, where it was measured, has as many entries, and is against the unquantized cache.
    """

    logprobs: tuple[float, ...]
    divergence: Divergence | None = field(default=None, kw_only=True)

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))

    def head(self, tokens: int) -> Score:
        """The score of the first *tokens* alone, without divergence."""
        return Score(self.logprobs[:tokens])

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


@dataclass(frozen=True)
class Evaluation:
    """What one engine showed.

    Attributes:
        scores: by text.
        kv_tokens: tokens its KV cache holds; None where vLLM does not say.
        generations: every prompt with its greedy continuation.
        answers: text that follows every question.
    """

    scores: dict[str, Score]
    kv_tokens: int | None
    generations: tuple[Window, ...] = ()
    answers: tuple[str, ...] = ()


def evaluate(
    model: str,
    kv_cache_dtype: str,
    texts: Mapping[str, Sequence[Window]],
    *,
    kv_memory_bytes: int = 1 << 30,
    keep: Path | None = None,
    reference: Path | None = None,
    chunk: int | None = None,
    prompts: Sequence[Window] = (),
    length: int = 0,
    questions: Sequence[Question] = (),
    tick: Tick = lambda: None,
) -> Evaluation:
    """Score every text's windows with an engine of its own process, which is gone afterwards.

    *texts* maps a name to windows; *tick* is called after each window and question. Scores have a
    divergence with *reference*, a folder that an earlier call was given as *keep* (a file per
    window), for the same texts or the first windows of each. *chunk*: prefill at most so many
    tokens at once, and run one request at a time. *prompts* are continued greedily to *length*
    tokens each, at the same time; unless OWN is among *texts*, what is so written is scored as the
    text of that name.
    *questions* are answered greedily, TOGETHER at a time: neighbours that begin alike share that
    part of the cache.

    Raises ServerError with the end of the engine's log, which is then kept, when it does not
    start or fails, and ValueError when the engine does not show its logits.
    """
    options = {
        "model": model,
        "kv_cache_dtype": cache_dtype(model, kv_cache_dtype),
        "kv_cache_memory_bytes": kv_memory_bytes,
        "max_model_len": longest_request(texts, length, questions),
        "enforce_eager": True,  # compiling takes longer than the run
    }
    if chunk is not None:
        options |= {"max_num_batched_tokens": chunk, "max_num_seqs": 1}
    watched = keep is not None or reference is not None
    if watched:
        options["worker_extension_cls"] = "kvq_plugin.logits.LogitsWorker"
    with engine_process(__name__, f"with {kv_cache_dtype}") as engine:
        engine.send((options, watched, prompts, length, questions))
        kv_tokens, generations = engine.receive()
        answers: list[str] = []
        while len(answers) < len(questions):
            answers += (written := engine.receive())
            for _ in written:
                tick()
        if prompts and OWN not in texts:
            texts = {**texts, OWN: generations}
        engine.send(_jobs(texts, reference, keep))
        scores = {}
        for text, windows in texts.items():
            seen = []
            for window in windows:
                seen.append(engine.receive())
                if watched:
                    check_seen(window, *seen[-1], reference is not None)
                tick()
            scores[text] = _joined(seen, reference is not None)
    return Evaluation(scores, kv_tokens, tuple(generations), tuple(answers))


def longest_request(
    texts: Mapping[str, Sequence[Window]], length: int, questions: Sequence[Question]
) -> int:
    """Tokens of the longest request, with what is generated. Windows, and generations of *length*
    tokens, are scored with one token more."""
    scored = [len(window) for windows in texts.values() for window in windows] + [length]
    return max([max(scored) + 1, *(len(prompt) + tokens for prompt, tokens in questions)])


def _jobs(texts: Mapping[str, Sequence[Window]], *folders: Path | None) -> list[tuple]:
    """(window, its file in each of *folders*) of all windows."""
    return [
        (window, *(str(at / f"{t}-{i}.safetensors") if at else None for at in folders))
        for t, windows in enumerate(texts.values())
        for i, window in enumerate(windows)
    ]


def check_seen(window: Window, logprobs: list[float], columns: dict, compared: bool) -> None:
    """ValueError unless the logits in *columns* are those that vLLM's *logprobs* came from."""
    names = ("logprobs", *(("kl", "tv", "same") if compared else ()))
    counts = {len(columns.get(name, ())) for name in names}
    if counts != {len(window) - 1}:
        got = f"{sorted(counts)} rows"
    else:
        pairs = zip(columns["logprobs"], logprobs, strict=True)
        worst = max(abs(ours - theirs) for ours, theirs in pairs)
        if worst <= LOGITS_TOLERANCE:
            return
        got = f"log-probabilities that are up to {worst:.3g} nats from vLLM's"
    raise ValueError(
        f"divergences need the engine's logits: expected {len(window) - 1} rows that agree with "
        f"vLLM's log-probabilities, got {got}. This vLLM calls compute_logits in another way than "
        f"vLLM {compat.SUPPORTED}: use --no-divergence, or one of these"
    )


def _joined(seen: Sequence[tuple[list[float], dict]], compared: bool) -> Score:
    logprobs = tuple(value for window, _ in seen for value in window)
    if not compared:
        return Score(logprobs)
    columns = {n: tuple(v for _, c in seen for v in c[n]) for n in ("kl", "tv", "same")}
    return Score(logprobs, divergence=Divergence(**columns))


def floor_chunk(windows: Sequence[Window]) -> int:
    """Tokens to prefill at once for the noise floor: a quarter of a window and a little."""
    return max(map(len, windows)) // 4 + 1


def _work(pipe: Connection) -> None:
    """The engine's process: receives its options, prompts and questions; sends the tokens that its
    KV cache holds, the generations, and answers, some at a time. Then it receives windows, and
    sends each one's logprobs and what the worker saw of its logits."""
    options, watched, prompts, length, questions = pipe.recv()
    from vllm import LLM

    llm = LLM(**options)
    generations = offline_greedy(llm, prompts, length) if prompts else []
    pipe.send((compat.kv_cache_tokens(llm), generations))
    for at in range(0, len(questions), TOGETHER):
        pipe.send(offline_answers(llm, questions[at : at + TOGETHER]))
    if watched:
        llm.collective_rpc("kvq_watch")
    for window, *files in pipe.recv():
        if watched:
            llm.collective_rpc("kvq_begin", args=(window, *files))
        logprobs = offline_logprobs(llm, window)
        seen = llm.collective_rpc("kvq_end") if watched else []
        pipe.send((logprobs, next(filter(None, seen), {})))


if __name__ == "__main__":
    run_engine(_work)
