"""The command line of ``kvq bench``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from kvq_plugin.evaluate import BASELINE
from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import MIXED
from kvq_plugin.options import (
    add_dtypes,
    add_kv_memory,
    model_or_builtin,
    positive,
    positives,
)


def add(command: argparse.ArgumentParser) -> None:
    """Add what can be timed to *command*, with its arguments."""
    kinds = command.add_subparsers(required=True, metavar="WHAT")
    kernels = ",".join(dict.fromkeys(format.name for format in SERVED.values()))
    for kind, repeats in (("attention", 15), ("store", 15)):
        each = kinds.add_parser(kind, help=f"{kind} kernels alone, with vLLM's CPU kernels")
        add_dtypes(each, kernels)
        each.add_argument("--threads", type=_threads, default=len(os.sched_getaffinity(0)))
        each.add_argument("--repeats", type=positive, default=repeats)
        each.add_argument("--out", type=Path, help="folder for a CSV and a plot")
        each.set_defaults(run=_run_kernels, kind=kind)
    engine = kinds.add_parser("engine", help="median decode step of real engines")
    engine.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    add_dtypes(engine, f"{BASELINE},fp8,int8_per_token_head,int4_per_token_head")
    engine.add_argument("--streams", type=positive, default=6)
    engine.add_argument("--context", type=positive, default=7000)
    engine.add_argument("--bursts", type=positive, default=8)
    engine.add_argument("--compiled", action="store_true", help="with torch.compile, not eager")
    add_kv_memory(engine)
    engine.add_argument("--out", type=Path, help="folder for a CSV and a plot")
    engine.set_defaults(run=_run_engine)
    serve = kinds.add_parser(
        "serve", help="vLLM's own bench serve, against servers with the same KV memory"
    )
    serve.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    add_dtypes(serve, f"{BASELINE},int8_per_token_head,int4_per_token_head,int4")
    for name, default, what in (
        ("--requests", 32, "requests sent at once"),
        ("--input", 512, "tokens of each one's prompt"),
        ("--output", 384, "tokens each generates"),
        ("--rounds", 3, "interleaved rounds"),
    ):
        serve.add_argument(name, type=positive, default=default, help=f"{what} (%(default)s)")
    serve.add_argument("--compiled", action="store_true", help="with torch.compile, not eager")
    add_kv_memory(serve, 0.125)
    serve.add_argument("--out", type=Path, help="folder for a CSV and a plot")
    serve.set_defaults(run=_run_serve)
    generate = kinds.add_parser("generate", help="transformers' generate, with its caches and ours")
    generate.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    add_dtypes(generate, "int8_per_token_head,int4_per_token_head")
    generate.add_argument(
        "--contexts",
        type=positives,
        default="1000,2000,4000",
        metavar="N,N,...",
        help="tokens of context (%(default)s)",
    )
    generate.add_argument(
        "--batches",
        type=positives,
        default="1,8",
        metavar="N,N,...",
        help="sequences at once (%(default)s)",
    )
    generate.add_argument("--bursts", type=positive, default=6)
    generate.add_argument("--out", type=Path, help="folder for a CSV and two plots")
    generate.set_defaults(run=_run_generate)


def _threads(text: str) -> int:
    """A number of threads; a million end the process without a word."""
    count, cores = positive(text), os.cpu_count() or 1
    if count > cores:
        raise argparse.ArgumentTypeError(
            f"expected at most {cores}, the processors of this machine, got {text}: more threads "
            "than that wait for one another"
        )
    return count


def _uniform(options: argparse.Namespace) -> list[str]:
    """Names of our formats among ``--dtypes``; ValueError for a mapping, which belongs to a served
    model."""
    if MIXED in options.dtypes:
        raise ValueError(
            f"--dtypes has {MIXED}, a KV cache for each layer of a checkpoint that vLLM serves: "
            f"expected formats, of {', '.join(SERVED)}; time its formats one by one, or use `kvq "
            "bench engine` or `kvq bench serve` with a checkpoint that `kvq allocate` wrote"
        )
    return [name for name in options.dtypes if name != BASELINE]


def _check_model(model: str, options: argparse.Namespace, needed: int, what: str) -> None:
    """ValueError, before engines start, for a dtype that cannot serve *model*, and where it has no
    positions for *needed* tokens, which are *what*."""
    from kvq_plugin.inspection import check_dtypes
    from kvq_plugin.tasks.asked import positions

    check_dtypes(model, options.dtypes)
    limit = positions(model)
    if limit is not None and needed > limit:
        raise ValueError(
            f"{what} take {needed:,} positions, and the model has {limit:,}: ask for fewer tokens"
        )


def _run_kernels(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import output

    names = _uniform(options)
    output.run_kernels(options.kind, names, options.threads, options.repeats, options.out)


def _run_engine(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import engine, output
    from kvq_plugin.evaluate import load_tokenizer, make_windows
    from kvq_plugin.texts import builtin_text

    model = model_or_builtin(options.model)
    prompts = make_windows(load_tokenizer(model), builtin_text(), options.streams, options.context)
    load = engine.Load(
        model=model,
        prompts=prompts,
        bursts=options.bursts,
        eager=not options.compiled,
        kv_memory_bytes=int(options.kv_memory_gib * 2**30),
    )
    what = f"streams of {options.context} tokens, and {load.tokens} that each decodes,"
    _check_model(model, options, load.length, what)
    output.run_engines(load, engine.beside_stock(options.dtypes), options.out)


def _run_serve(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import engine, output, serve

    model = model_or_builtin(options.model)
    what = f"requests of {options.input} tokens in and {options.output} out, and one that begins,"
    _check_model(model, options, options.input + options.output + 1, what)
    load = serve.Load(
        model=model,
        requests=options.requests,
        input=options.input,
        output=options.output,
        rounds=options.rounds,
        eager=not options.compiled,
        kv_memory_bytes=int(options.kv_memory_gib * 2**30),
    )
    output.run_serve(load, engine.beside_stock(options.dtypes), options.out)


def _run_generate(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import generate, output
    from kvq_plugin.evaluate import load_tokenizer, make_windows
    from kvq_plugin.texts import builtin_text

    model, dtypes, most = model_or_builtin(options.model), _uniform(options), max(options.contexts)
    new = 1 + (1 + options.bursts) * generate.BURST  # after a token of the text, a burst to warm up
    _check_model(model, options, most + new, f"contexts of {most} tokens and {new} after them")
    [prompt] = make_windows(load_tokenizer(model), builtin_text(), 1, most + 1)
    output.run_generate(
        model,
        prompt,
        options.contexts,
        options.batches,
        dtypes,
        options.bursts,
        options.out,
    )
