"""The ``kvq`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvq_plugin import __version__
from kvq_plugin.evaluate import BASELINE, BUILTIN_TEXT
from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import NAMES
from kvq_plugin.servers import ServerError

INTERRUPTED = 130
KV_MEMORY_GIB = 1.0  # of each engine, unless the user says otherwise
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvq`` with *argv* (the process's by default) and return its exit code."""
    options = parser().parse_args(argv)
    with _leaving_in_order():
        try:
            options.run(options)
        except KeyboardInterrupt:
            print("kvq: interrupted", file=sys.stderr)
            return INTERRUPTED
        except (ServerError, ValueError, OSError) as error:
            print(f"kvq: {error}", file=sys.stderr)
            return 1
    return 0


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Within the block a signal that ends the process unwinds it first, which stops servers."""
    heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores

    def leave(number: int, _frame) -> None:
        for again in heard:  # a second signal must not cut the unwinding short
            signal.signal(again, signal.SIG_IGN)
        before.clear()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Version(argparse.Action):
    """Prints the version and which kernels are installed, which loads them: not before asked."""

    def __call__(self, parser, *_) -> None:
        from kvq_plugin import doctor

        print(f"kvq {__version__}")
        try:
            print(doctor.built_kernels())
        except (ImportError, OSError, ValueError) as error:
            print(error)
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command line of ``kvq``."""
    top = argparse.ArgumentParser(prog="kvq", description="Quantized KV caches for vLLM.")
    top.add_argument("--version", action=_Version, nargs=0, help="version and kernels; then exit")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_eval(commands)
    _add_calibrate(commands)
    _add_allocate(commands)
    _add_bench(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    return top


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="serve a model with several KV caches, one after the other, and compare them",
    )
    demo.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    _add_dtypes(demo, f"{BASELINE},fp8,int8,int8_per_token_head,int4")
    demo.add_argument(
        "--windows", type=_positive, default=4, help="2048-token perplexity windows (%(default)s)"
    )
    demo.add_argument(
        "--streams", type=_positive, default=4, help="concurrent decodes timed (%(default)s)"
    )
    demo.add_argument(
        "--context", type=_positive, default=3000, help="tokens of each's prompt (%(default)s)"
    )
    demo.add_argument(
        "--steps", type=_positive, default=64, help="tokens each of them decodes (%(default)s)"
    )
    _add_kv_memory(demo)
    demo.set_defaults(run=_run_demo)


def _add_eval(commands) -> None:
    from kvq_plugin.tasks import arguments as task_arguments

    evaluation = commands.add_parser(
        "eval",
        help="perplexity, KL divergence and tasks through vLLM or transformers, against the "
        "unquantized cache",
    )
    evaluation.add_argument(
        "model", nargs="?", help="directory or hub name; without it, the built-in SmolLM2"
    )
    _add_dtypes(evaluation, f"{BASELINE},fp8,int8_per_token_head")
    evaluation.add_argument(
        "--text",
        nargs="+",
        default=[BUILTIN_TEXT],
        metavar="FILE",
        help=f"UTF-8 files; {BUILTIN_TEXT!r}, the default, is the reference that Python carries",
    )
    evaluation.add_argument(
        "--windows", type=_positive, default=8, help="2048-token windows (%(default)s)"
    )
    evaluation.add_argument(
        "--no-divergence",
        dest="divergence",
        action="store_false",
        help="perplexity alone, without KL divergence and the noise floor",
    )
    evaluation.add_argument(
        "--drift",
        type=_positive,
        default=0,
        metavar="N",
        help="also N long greedy generations: where each KV cache first leaves those of "
        f"{BASELINE}, and what it makes of {BASELINE}'s, token by token",
    )
    task_arguments.add(evaluation)
    evaluation.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="a folder to make: the report as one HTML page, its plots and figures",
    )
    evaluation.add_argument(
        "--driver",
        choices=("vllm", "transformers"),
        default="vllm",
        help="what runs the model (%(default)s); transformers: generate's models with KVQCache, "
        "in this process, beside transformers' own cache",
    )
    _add_kv_memory(evaluation)
    evaluation.set_defaults(run=_run_eval, kv_memory_gib=None)


def _add_calibrate(commands) -> None:
    from kvq_plugin.calibrate import arguments

    calibrate = commands.add_parser(
        "calibrate", help="add calibrated scales of K and V to a checkpoint, as a new directory"
    )
    arguments.add(calibrate)
    calibrate.set_defaults(run=arguments.run)


def _add_allocate(commands) -> None:
    from kvq_plugin.allocate import arguments

    allocate = commands.add_parser(
        "allocate", help="choose each layer's KV cache under a budget, as a new checkpoint"
    )
    arguments.add(allocate)
    allocate.set_defaults(run=arguments.run)


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench", help="time our kernels, engines and caches against vLLM's and transformers' own"
    )
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    kernels = ",".join(dict.fromkeys(format.name for format in SERVED.values()))
    for kind, repeats in (("attention", 15), ("store", 15)):
        each = kinds.add_parser(kind, help=f"{kind} kernels alone, with vLLM's CPU kernels")
        _add_dtypes(each, kernels)
        each.add_argument("--threads", type=_positive, default=len(os.sched_getaffinity(0)))
        each.add_argument("--repeats", type=_positive, default=repeats)
        each.add_argument("--out", type=Path, help="folder for a CSV and a plot")
        each.set_defaults(run=_run_bench_kernels, kind=kind)
    engine = kinds.add_parser("engine", help="median decode step of real engines")
    engine.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    _add_dtypes(engine, f"{BASELINE},fp8,int8_per_token_head,int4_per_token_head")
    engine.add_argument("--streams", type=_positive, default=6)
    engine.add_argument("--context", type=_positive, default=7000)
    engine.add_argument("--bursts", type=_positive, default=8)
    engine.add_argument("--compiled", action="store_true", help="with torch.compile, not eager")
    _add_kv_memory(engine)
    engine.set_defaults(run=_run_bench_engine)
    serve = kinds.add_parser(
        "serve", help="vLLM's own bench serve, against servers with the same KV memory"
    )
    serve.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    _add_dtypes(serve, f"{BASELINE},int8_per_token_head,int4_per_token_head,int4")
    for name, default, what in (
        ("--requests", 32, "requests sent at once"),
        ("--input", 512, "tokens of each one's prompt"),
        ("--output", 384, "tokens each generates"),
        ("--rounds", 3, "interleaved rounds"),
    ):
        serve.add_argument(name, type=_positive, default=default, help=f"{what} (%(default)s)")
    serve.add_argument("--compiled", action="store_true", help="with torch.compile, not eager")
    _add_kv_memory(serve, 0.125)
    serve.add_argument("--out", type=Path, help="folder for a CSV and a plot")
    serve.set_defaults(run=_run_bench_serve)
    generate = kinds.add_parser("generate", help="transformers' generate, with its caches and ours")
    generate.add_argument("--model", help="directory or hub name; without it, the built-in SmolLM2")
    _add_dtypes(generate, "int8_per_token_head,int4_per_token_head")
    generate.add_argument(
        "--contexts",
        type=_positives,
        default="1000,2000,4000",
        metavar="N,N,...",
        help="tokens of context (%(default)s)",
    )
    generate.add_argument(
        "--batches",
        type=_positives,
        default="1,8",
        metavar="N,N,...",
        help="sequences at once (%(default)s)",
    )
    generate.add_argument("--bursts", type=_positive, default=6)
    generate.add_argument("--out", type=Path, help="folder for a CSV and two plots")
    generate.set_defaults(run=_run_bench_generate)


def _add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect", help="the KV scales of a checkpoint, and what each KV cache does with them"
    )
    inspect.add_argument("path", help="directory of a checkpoint, or hub name")
    inspect.add_argument("--plot", type=Path, metavar="FILE.png", help="scales over layers")
    inspect.set_defaults(run=_run_inspect)


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor", help="what works on this machine, what does not, and what would run faster"
    )
    doctor.add_argument(
        "--url", help="a running server instead: what it serves with, and whether its scales fit"
    )
    doctor.set_defaults(run=_run_doctor)


def _add_dtypes(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--dtypes",
        type=parse_dtypes,
        default=default,
        metavar="NAME,NAME,...",
        help=f"KV caches to compare (%(default)s); {BASELINE} is always measured, first",
    )


def _add_kv_memory(command: argparse.ArgumentParser, default: float = KV_MEMORY_GIB) -> None:
    command.add_argument(
        "--kv-memory-gib",
        type=float,
        default=default,
        help=f"memory for each engine's KV cache ({default:g})",
    )


def parse_dtypes(text: str) -> list[str]:
    """``"fp8,int8"`` → ``["auto", "fp8", "int8"]``; argparse's error names the known ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name != BASELINE and name not in NAMES:
            raise argparse.ArgumentTypeError(
                f"unknown KV-cache dtype {name!r}; known are {BASELINE}, {', '.join(NAMES)}"
            )
    return list(dict.fromkeys([BASELINE, *names]))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _model(name: str | None) -> str:
    from kvq_plugin.model import builtin_model

    return name or str(builtin_model())


def _positives(text: str) -> list[int]:
    """``"1000,4000"`` -> ``[1000, 4000]``, each once and in order."""
    return sorted({_positive(number) for number in text.split(",")})


def _run_demo(options: argparse.Namespace) -> None:
    from kvq_plugin import demo

    settings = demo.Settings(
        model=_model(options.model),
        dtypes=options.dtypes,
        windows=options.windows,
        streams=options.streams,
        context=options.context,
        steps=options.steps,
        kv_memory_bytes=int(options.kv_memory_gib * 2**30),
    )
    demo.run(settings)


def _run_eval(options: argparse.Namespace) -> None:
    from kvq_plugin import report
    from kvq_plugin.tasks import arguments as task_arguments

    memory = KV_MEMORY_GIB if options.kv_memory_gib is None else options.kv_memory_gib
    if options.driver != report.DRIVERS[0] and options.kv_memory_gib is not None:
        raise ValueError(
            f"--kv-memory-gib {memory:g} was asked: with --driver {options.driver} a cache grows "
            "with its tokens and has no pool; leave it out, or use --driver vllm"
        )
    report.run_evaluation(
        _model(options.model),
        options.dtypes,
        options.text,
        windows=options.windows,
        driver=options.driver,
        kv_memory_bytes=int(memory * 2**30),
        divergence=options.divergence,
        drift=options.drift,
        tasks=task_arguments.settings(options),
        page=options.report,
    )


def _run_bench_kernels(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import output

    names = [name for name in options.dtypes if name != BASELINE]
    output.run_kernels(options.kind, names, options.threads, options.repeats, options.out)


def _run_bench_engine(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import engine, output
    from kvq_plugin.evaluate import builtin_text, load_tokenizer, make_windows

    model = _model(options.model)
    prompts = make_windows(load_tokenizer(model), builtin_text(), options.streams, options.context)
    load = engine.Load(
        model=model,
        prompts=prompts,
        bursts=options.bursts,
        eager=not options.compiled,
        kv_memory_bytes=int(options.kv_memory_gib * 2**30),
    )
    output.run_engines(load, engine.beside_stock(options.dtypes))


def _run_bench_serve(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import engine, output, serve

    load = serve.Load(
        model=_model(options.model),
        requests=options.requests,
        input=options.input,
        output=options.output,
        rounds=options.rounds,
        eager=not options.compiled,
        kv_memory_bytes=int(options.kv_memory_gib * 2**30),
    )
    output.run_serve(load, engine.beside_stock(options.dtypes), options.out)


def _run_bench_generate(options: argparse.Namespace) -> None:
    from kvq_plugin.bench import output
    from kvq_plugin.evaluate import builtin_text, load_tokenizer, make_windows

    model = _model(options.model)
    [prompt] = make_windows(load_tokenizer(model), builtin_text(), 1, max(options.contexts) + 1)
    output.run_generate(
        model,
        prompt,
        options.contexts,
        options.batches,
        [name for name in options.dtypes if name != BASELINE],
        options.bursts,
        options.out,
    )


def _run_inspect(options: argparse.Namespace) -> None:
    from kvq_plugin import inspection_report

    inspection_report.run(options.path, options.plot)


def _run_doctor(options: argparse.Namespace) -> None:
    from kvq_plugin import doctor, doctor_url

    if options.url:
        doctor_url.run(options.url)
    else:
        doctor.run()


if __name__ == "__main__":
    sys.exit(main())
