"""``kvq demo``: what a quantized KV cache buys, shown on real servers.

One ``vllm serve`` per KV cache, one at a time so that none disturbs another's timing. Each gets
the same memory for its cache, the same questions, the same texts and the same long prompts.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from kvq_plugin.evaluate import (
    BASELINE,
    WINDOW,
    Score,
    Tick,
    Window,
    cache_dtype,
    load_tokenizer,
    make_windows,
    perplexity_http,
)
from kvq_plugin.formats import SERVED
from kvq_plugin.report import change_text, counted, progress
from kvq_plugin.servers import Server, serve
from kvq_plugin.tables import print_table
from kvq_plugin.tasks.asked import positions
from kvq_plugin.texts import builtin_text

QUESTIONS = (
    # Nothing that bf16 itself leaves to a coin toss: "the capital of France" begins with "The" or
    # "L" at a margin of 0.1 nats.
    "Name the three primary colors.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
)
ANSWER_TOKENS = 80
SAMPLES = 4  # windows to calibrate on, where a KV cache needs it
BLOCK = 128  # vLLM's block size on CPUs


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        dtypes: values of ``--kv-cache-dtype``; ``auto`` comes first.
        windows: windows of WINDOW tokens, or what the model has positions for, scored for the
            perplexity.
        streams, context, steps: concurrent decodes timed, tokens of each one's prompt, and
            tokens each decodes.
        kv_memory_bytes: memory of every server's KV cache.
        positions: tokens that the model has positions for; None: as many as are asked.
    """

    model: str
    dtypes: Sequence[str]
    windows: int
    streams: int
    context: int
    steps: int
    kv_memory_bytes: int
    positions: int | None = None

    @property
    def window(self) -> int:
        """Tokens of a scored window; one more is generated after it."""
        return WINDOW if self.positions is None else min(WINDOW, self.positions - 1)

    def server_args(self) -> list[str]:
        """Arguments of ``vllm serve`` that all servers share."""
        # Eager: compiling three times takes longer than everything else together.
        # Whole blocks: vLLM's count of tokens that fit rounds every sequence up to them.
        length = -(-max(self.window + 1, self.context + self.steps) // BLOCK) * BLOCK
        if self.positions is not None:
            length = min(length, self.positions)
        return [
            "--enforce-eager",
            *("--max-model-len", str(length)),
            *("--kv-cache-memory-bytes", str(self.kv_memory_bytes)),
        ]


@dataclass(frozen=True)
class Result:
    """What one server showed. ``step_ms`` is the median decode step in milliseconds."""

    kv_tokens: int
    score: Score
    step_ms: float
    answers: tuple[str, ...]


def run(settings: Settings, console: Console | None = None) -> dict[str, Result]:
    """Run the demo, print its tables, and return the result of each dtype."""
    console = console or Console()
    started = time.monotonic()
    tokenizer = load_tokenizer(settings.model)
    settings = replace(settings, positions=positions(settings.model))
    check_positions(settings)
    text = builtin_text()
    windows = make_windows(tokenizer, text, settings.windows, settings.window, SAMPLES)
    windows, samples = windows[:-SAMPLES], windows[-SAMPLES:]
    prompts = make_windows(tokenizer, text, settings.streams, settings.context)
    results = {}
    with tempfile.TemporaryDirectory(prefix="kvq-demo-") as folder, progress(console) as bars:
        for dtype in settings.dtypes:
            calibrates = needs_calibration(settings.model, dtype)
            total = 1 + len(QUESTIONS) + len(windows) + len(prompts)
            total += calibrates * (1 + len(samples))
            bar = _Bar(bars, bars.add_task(dtype, total=total, stage=""))
            served = settings
            if calibrates:
                out = Path(folder) / f"{Path(settings.model).name}-{dtype}"
                served = replace(settings, model=_calibrated(settings, dtype, out, samples, bar))
            results[dtype] = _measure(served, dtype, windows, prompts, bar)
    print_table(console, answers_table(results))
    print_table(console, summary_table(settings, results, time.monotonic() - started))
    return results


def needs_scales(dtype: str) -> bool:
    """Whether *dtype* cannot be served without scales from the checkpoint."""
    format = SERVED.get(dtype)
    return format is not None and not format.is_dynamic and format.default_scale is None


def needs_calibration(model: str, dtype: str) -> bool:
    """Whether *dtype* needs scales and the checkpoint *model* declares none."""
    if not needs_scales(dtype):
        return False
    from kvq_plugin.calibrate.checkpoint import Source

    return Source.find(model).kv_scheme is None


def _calibrated(
    settings: Settings, dtype: str, out: Path, samples: Sequence[Window], bar: _Bar
) -> str:
    """Write the model with scales per channel to *out*, which is returned."""
    from kvq_plugin.calibrate import run as calibration
    from kvq_plugin.calibrate.checkpoint import Source
    from kvq_plugin.calibrate.output import Target
    from kvq_plugin.calibrate.settings import Settings as Calibration

    bar.stage("calibrating")
    source, target = Source.find(settings.model), Target(out)
    target.check(source)
    calibration.calibrate(source, target, Calibration(dtype), samples, tick=bar.advance)
    return str(out)


@dataclass(frozen=True)
class _Bar:
    bars: Progress
    task: TaskID

    def stage(self, text: str) -> None:
        self.bars.update(self.task, stage=text)

    def advance(self) -> None:
        self.bars.advance(self.task)


def _measure(
    settings: Settings,
    dtype: str,
    windows: Sequence[Window],
    prompts: Sequence[Window],
    bar: _Bar,
) -> Result:
    bar.stage("starting vllm serve")
    flag = cache_dtype(settings.model, dtype)
    with serve(settings.model, flag, args=settings.server_args()) as server:
        bar.advance()
        kv_tokens = server.kv_tokens()
        check_capacity(settings, kv_tokens)
        client = server.client()
        bar.stage("chat")
        answers = tuple(ask(client, settings.model, q, bar.advance) for q in QUESTIONS)
        bar.stage("perplexity")
        score = perplexity_http(client, settings.model, windows, bar.advance)
        bar.stage("decoding at a long context")
        step_ms = 1000 * decode_step(server, settings.model, prompts, settings.steps, bar.advance)
        bar.stage("stopping")
    bar.stage("")
    return Result(kv_tokens, score, step_ms, answers)


def check_positions(settings: Settings) -> None:
    """ValueError when the timed decodes have more tokens than the model has positions."""
    needed, limit = settings.context + settings.steps, settings.positions
    if limit is not None and needed > limit:
        raise ValueError(
            f"streams of {settings.context} + {settings.steps} tokens need {needed:,} positions, "
            f"and the model has {limit:,}: lower --context to {limit - settings.steps} or less"
        )


def check_capacity(settings: Settings, kv_tokens: int) -> None:
    """ValueError when the timed decodes do not fit in a cache of *kv_tokens* all at once."""
    needed = settings.streams * (settings.context + settings.steps)
    if kv_tokens < needed:
        streams, gib = counted(settings.streams, "stream"), settings.kv_memory_bytes / 2**30
        raise ValueError(
            f"{streams} of {settings.context} + {settings.steps} tokens need {needed:,} tokens of "
            f"KV cache, and {gib:g} GiB hold {kv_tokens:,}: raise --kv-memory-gib, or lower "
            "--streams or --context"
        )


def ask(client, model: str, question: str, tick: Tick = lambda: None) -> str:
    """The chat answer to *question* at temperature 0."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        max_tokens=ANSWER_TOKENS,
    )
    tick()
    return reply.choices[0].message.content.strip()


def decode_step(
    server: Server, model: str, prompts: Sequence[Window], steps: int, tick: Tick = lambda: None
) -> float:
    """Median seconds between two tokens of a stream while every prompt is decoding.

    All *prompts* stream *steps* tokens at once. Only the time between the moment the last of
    them got its first token and the moment the first of them ended counts, so no prefill is in
    it. Raises ValueError when that leaves nothing to measure.
    """
    events = asyncio.run(_stream_all(server, model, prompts, steps, tick))
    begin = max(stream[0][0] for stream in events)
    end = min(stream[-1][0] for stream in events)
    gaps = [
        (late - early) / (more - fewer)
        for stream in events
        for (early, fewer), (late, more) in zip(stream, stream[1:], strict=False)
        if begin <= early and late <= end
    ]
    if not gaps:
        raise ValueError(f"no decode step without a prefill among {steps}: raise --steps")
    return statistics.median(gaps)


async def _stream_all(
    server: Server, model: str, prompts: Sequence[Window], steps: int, tick: Tick
) -> list[list[tuple[float, int]]]:
    """For each prompt the (time, tokens so far) of every chunk it streamed."""
    from openai import AsyncOpenAI

    async def stream(client, prompt: Window) -> list[tuple[float, int]]:
        events = []
        chunks = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=steps,
            temperature=0.0,
            stream=True,
            # A chunk may carry several tokens when the client falls behind.
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in chunks:
            if chunk.choices:
                events.append((time.perf_counter(), chunk.usage.completion_tokens))
        tick()
        return events

    base_url = f"{server.url}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))


def summary_table(settings: Settings, results: dict[str, Result], seconds: float) -> Table:
    """Memory, accuracy and speed, a row per dtype, each against ``auto``; *seconds* it all took."""
    cores = counted(len(os.sched_getaffinity(0)), "core")
    windows, streams = counted(settings.windows, "window"), counted(settings.streams, "stream")
    table = Table(
        title=f"KV caches of {escape(Path(settings.model).name)}",
        caption=f"Perplexity: {windows} of {settings.window:,} tokens of Python's reference; "
        f"change ± its standard error. Step: median time between two tokens of {streams} at "
        f"{settings.context:,} tokens each, eager, {cores}."
        f"{_scales_note(settings.dtypes)} All of it took {seconds:.0f} s.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("KV cache", no_wrap=True)
    memory = f"tokens in\n{settings.kv_memory_bytes / 2**30:g} GiB"
    # Broken by hand, so that no figure is: the table fits the 80 columns of a plain terminal.
    for name in (memory, "", "perplexity", "change, %", "decode\nstep", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    baseline = results[BASELINE]
    for dtype, result in results.items():
        change = "" if result is baseline else change_text(result.score, baseline.score)
        table.add_row(
            dtype,
            f"{result.kv_tokens:,}",
            f"{result.kv_tokens / baseline.kv_tokens:.2f}x",
            f"{result.score.perplexity:.3f}",
            change,
            f"{result.step_ms:.1f} ms",
            f"{baseline.step_ms / result.step_ms:.2f}x",
        )
    return table


def _scales_note(dtypes: Sequence[str]) -> str:
    names = ", ".join(filter(needs_scales, dtypes))
    return f" Scales of {names}: per channel, from {SAMPLES} other windows." if names else ""


def answers_table(results: dict[str, Result]) -> Table:
    """Every question with the answer of each KV cache, those equal to ``auto``'s marked so."""
    table = Table(title="The same questions, temperature 0", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("KV cache", no_wrap=True)
    table.add_column("answer")
    for question, answers in zip(QUESTIONS, answers_by_question(results), strict=True):
        table.add_section()
        table.add_row("", f"[bold]{question}[/bold]")
        for dtype, answer in answers.items():
            same = dtype != BASELINE and answer == answers[BASELINE]
            table.add_row(dtype, f"as {BASELINE}, word for word" if same else escape(answer))
    return table


def answers_by_question(results: dict[str, Result]) -> list[dict[str, str]]:
    """For each question the answer of every dtype."""
    return [{d: r.answers[i] for d, r in results.items()} for i in range(len(QUESTIONS))]
