"""The ``kvq`` command."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from kvq_plugin import __version__
from kvq_plugin.evaluate import BASELINE
from kvq_plugin.options import (
    KV_MEMORY_GIB,
    add_dtypes,
    add_kv_memory,
    model_or_builtin,
    positive,
)
from kvq_plugin.servers import ServerError
from kvq_plugin.texts import BUILTIN_TEXT

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvq`` with *argv* (the process's by default) and return its exit code."""
    top = parser()
    _refuse_empty(top, sys.argv[1:] if argv is None else argv)
    options = top.parse_args(argv)
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


def _refuse_empty(top: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """No option or name of kvq's is meant to be empty: most would be taken for not given, and an
    empty path is the current folder."""
    for before, text in pairwise(("kvq", *argv)):
        if text == "" or re.fullmatch(r"--[\w-]+=", text):
            top.error(
                f"expected something {f'after {before}' if text == '' else f'behind {text}'}, got "
                "an empty argument: is a shell variable unset? Give it a value, or leave the "
                "argument out"
            )


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
    add_dtypes(demo, f"{BASELINE},fp8,int8,int8_per_token_head,int4")
    demo.add_argument(
        "--windows", type=positive, default=4, help="2048-token perplexity windows (%(default)s)"
    )
    demo.add_argument(
        "--streams", type=positive, default=4, help="concurrent decodes timed (%(default)s)"
    )
    demo.add_argument(
        "--context", type=positive, default=3000, help="tokens of each's prompt (%(default)s)"
    )
    demo.add_argument(
        "--steps", type=positive, default=64, help="tokens each of them decodes (%(default)s)"
    )
    add_kv_memory(demo)
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
    add_dtypes(evaluation, f"{BASELINE},fp8,int8_per_token_head")
    evaluation.add_argument(
        "--text",
        nargs="+",
        default=[BUILTIN_TEXT],
        metavar="FILE",
        help=f"UTF-8 files; {BUILTIN_TEXT!r}, the default, is the reference that Python carries",
    )
    evaluation.add_argument(
        "--windows", type=positive, default=8, help="2048-token windows (%(default)s)"
    )
    evaluation.add_argument(
        "--no-divergence",
        dest="divergence",
        action="store_false",
        help="perplexity alone, without KL divergence and the noise floor",
    )
    evaluation.add_argument(
        "--drift",
        type=positive,
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
    add_kv_memory(evaluation)
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
    from kvq_plugin.bench import arguments

    arguments.add(
        commands.add_parser(
            "bench",
            help="time our kernels, engines and caches against vLLM's and transformers' own",
        )
    )


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


def _run_demo(options: argparse.Namespace) -> None:
    from kvq_plugin import demo

    settings = demo.Settings(
        model=model_or_builtin(options.model),
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
        model_or_builtin(options.model),
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


def _run_inspect(options: argparse.Namespace) -> None:
    from kvq_plugin import inspection_report

    inspection_report.run(options.path, options.plot)


def _run_doctor(options: argparse.Namespace) -> None:
    from kvq_plugin import doctor, doctor_url

    if options.url is not None:
        doctor_url.run(options.url)
    else:
        doctor.run()


if __name__ == "__main__":
    sys.exit(main())
