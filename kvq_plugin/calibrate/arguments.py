"""The command line of ``kvq calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvq_plugin.calibrate.settings import (
    DRIVERS,
    DTYPES,
    OBSERVERS,
    PERCENTILE,
    SCHEMES,
    Settings,
    Strategy,
)
from kvq_plugin.options import gib, positive
from kvq_plugin.texts import BUILTIN_TEXT

_DEFAULTS = Settings()


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments to *command*."""
    command.add_argument("model", help="directory or hub name")
    command.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    command.add_argument("--force", action="store_true", help="replace an earlier output")
    command.add_argument("--copy", action="store_true", help="copy the weights, never link them")
    _add_scheme(command.add_argument_group("what to calibrate"))
    _add_samples(command.add_argument_group("samples"))
    _add_driver(command.add_argument_group("running the model"))


def _add_scheme(group) -> None:
    group.add_argument("--scheme", choices=SCHEMES, default=_DEFAULTS.scheme, help="(%(default)s)")
    group.add_argument(
        "--strategy",
        choices=[s.value for s in Strategy],
        default=_DEFAULTS.strategy.value,
        help="what shares a scale: the layer, a head, a channel, or a group of a head's "
        "channels (%(default)s)",
    )
    group.add_argument("--group-size", type=int, metavar="N", help="channels of a group")
    group.add_argument(
        "--asymmetric", action="store_true", help="integer zero points beside the scales (int8)"
    )
    group.add_argument(
        "--exact-scales",
        action="store_true",
        help="fp8 scales of amax / 448 as they are, not rounded up to a power of two",
    )
    group.add_argument(
        "--observer",
        choices=OBSERVERS,
        help="how a range is chosen: extremes, moving average of the samples' extremes, "
        "percentile, least squared error (the best measured: mse for int8 per tensor and head, "
        "else minmax)",
    )
    group.add_argument(
        "--percentile",
        type=float,
        help=f"of the percentile observer ({PERCENTILE})",
    )
    group.add_argument("--q-scale", action="store_true", help="scales of the query, too")
    group.add_argument(
        "--prob-scale", action="store_true", help="scales of the attention probabilities, too"
    )
    group.add_argument(
        "--ignore",
        type=_layers,
        default=frozenset(),
        metavar="N,N,...",
        help="layers that get no scales and keep an unquantized cache",
    )


def _add_samples(group) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        default=[BUILTIN_TEXT],
        metavar="FILE",
        help=f".txt or .jsonl; {BUILTIN_TEXT!r}, the default, is the reference that Python carries",
    )
    group.add_argument("--samples", type=positive, default=32, help="(%(default)s)")
    group.add_argument("--length", type=positive, default=2048, help="tokens of each (%(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of drawing the samples (%(default)s)")


def _add_driver(group) -> None:
    group.add_argument(
        "--driver",
        choices=DRIVERS,
        default=DRIVERS[0],
        help="vLLM's engine, or transformers (%(default)s)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of activations")
    group.add_argument(
        "--tensor-parallel-size", type=positive, default=1, metavar="N", help="(%(default)s)"
    )
    group.add_argument(
        "--kv-memory-gib",
        type=gib,
        default=0.5,
        help="memory of the engine's unquantized KV cache (%(default)s)",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code the checkpoint brings"
    )


def _layers(text: str) -> frozenset[int]:
    try:
        return frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected layer numbers separated by commas, got {text!r}"
        ) from None


def run(options: argparse.Namespace) -> None:
    """Do what the parsed *options* ask for."""
    from kvq_plugin.calibrate.engine import Load
    from kvq_plugin.calibrate.output import Target
    from kvq_plugin.calibrate.run import Job, Samples
    from kvq_plugin.calibrate.run import run as run_job

    settings = Settings(
        scheme=options.scheme,
        strategy=Strategy(options.strategy),
        group_size=options.group_size,
        observer=options.observer,
        percentile=options.percentile,
        asymmetric=options.asymmetric,
        exact=options.exact_scales,
        q_scale=options.q_scale,
        prob_scale=options.prob_scale,
        ignore=options.ignore,
    )
    run_job(
        Job(
            model=options.model,
            target=Target(options.output, options.force, options.copy),
            settings=settings,
            samples=Samples(options.data, options.samples, options.length, options.seed),
            load=Load(
                options.dtype,
                options.tensor_parallel_size,
                int(options.kv_memory_gib * 2**30),
                options.trust_remote_code,
            ),
            driver=options.driver,
        )
    )
