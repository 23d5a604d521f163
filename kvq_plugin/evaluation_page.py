"""``kvq eval --report DIR``: a page that needs no network, its plots and its figures.

The folder is written beside its place and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kvq_plugin import __version__, _native
from kvq_plugin.disk import room_for
from kvq_plugin.doctor import processor, version
from kvq_plugin.evaluate import BASELINE, Evaluation, Score
from kvq_plugin.serving import compat
from kvq_plugin.tasks import page as task_page
from kvq_plugin.texts import labels

PAGE, FIGURES = "index.html", "report.json"
BINS = 32  # of token positions: some 64 tokens of every window each
#: plot -> what the page says of it.
PLOTS = {
    "perplexity_by_position.png": "Perplexity by the token's position in its window.",
    "kl_by_position.png": "KL divergence by the token's position in its window; "
    "the noise floor is dashed.",
    "memory_and_quality.png": "Tokens that the same memory holds, against what is lost: "
    "right and down is better.",
    task_page.PLOT: task_page.CAPTION,
}
_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } figure { margin: 1.5rem 0 } figcaption, .note { color: #555 }
"""


def check_folder(folder: Path) -> None:
    """ValueError when no report can be written to *folder*: before the engines run."""
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists: name another folder for the report, or remove it")
    parent = folder.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is not a writable directory: name another for the report")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--report needs matplotlib: pip install 'kvq-plugin[bench]'")


def about_run(model: str, **settings: Any) -> dict[str, Any]:
    """What is run on what, with which versions; *settings* as they are to be shown."""
    versions = {"kvq_plugin": __version__, "Python": platform.python_version()}
    versions |= {"vLLM": compat.vllm_version() or "none"}
    versions |= {name: version(name) or "none" for name in ("torch", "transformers")}
    try:
        kernels = _native.isa()
    except (ImportError, OSError, ValueError):
        kernels = "none"
    return {
        "model": Path(model).name,
        "command": shlex.join(["kvq", *sys.argv[1:]]),
        **settings,
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores for this process, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": platform.platform(),
        "compiled kernels": kernels,
        "versions": versions,
    }


def write(
    folder: Path,
    evaluations: Mapping[str, Evaluation],
    floor: Evaluation | None,
    length: int,
    about: Mapping[str, Any],
    agreements: Mapping[str, Sequence[int]] | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> None:
    """Write page, plots and figures to the new directory *folder*.

    Args:
        evaluations: by dtype, ``auto`` among them.
        floor: the unquantized engine against itself, on the first windows.
        length: tokens of a window.
        about: what was run, on what, with which versions; for the page and the JSON.
        agreements: by dtype, tokens of each greedy generation before the first that is not
            ``auto``'s.
        tasks: figures of the tasks (Asked.figures).
    """
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.resolve().parent))
    try:
        scratch = private / "new"
        scratch.mkdir()
        figures = collected(evaluations, floor, length)
        figures["greedy_tokens_in_common"] = dict(agreements or {})
        figures["tasks"] = dict(tasks or {"generated": {}, "longbench": {}})
        with room_for(f"the report {folder}", "name another folder with --report"):
            _plots(scratch, figures)
            text = json.dumps({"about": dict(about), **figures}, indent=1)
            (scratch / FIGURES).write_text(text + "\n", encoding="utf-8")
            (scratch / PAGE).write_text(_page(scratch, figures, about), encoding="utf-8")
        if folder.exists():
            raise ValueError(f"{folder} exists by now: name another folder for the report")
        scratch.rename(folder)
    finally:
        shutil.rmtree(private)


# --- figures ---------------------------------------------------------------------------


def collected(
    evaluations: Mapping[str, Evaluation], floor: Evaluation | None, length: int
) -> dict[str, Any]:
    """All figures as plain values: ``dtypes`` and ``floor`` by text, ``positions`` of the bins."""
    baseline = evaluations[BASELINE]
    edges = _edges(length - 1)
    return {
        # A token at index i of the window is the i-th that is scored, from 1.
        "positions": [[begin + 1, end] for begin, end in edges],
        "dtypes": {
            dtype: {
                "kv_tokens": evaluation.kv_tokens,
                "texts": _texts(evaluation, baseline, edges, length, floor),
            }
            for dtype, evaluation in evaluations.items()
        },
        "floor": None if floor is None else _texts(floor, baseline, edges, length),
    }


def _texts(
    evaluation: Evaluation,
    baseline: Evaluation,
    edges,
    length: int,
    floor: Evaluation | None = None,
) -> dict[str, Any]:
    floors = {} if floor is None else floor.scores
    return {
        text: _figures(score, baseline.scores[text], edges, length, floors.get(text))
        for text, score in evaluation.scores.items()
    }


def _figures(
    score: Score, baseline: Score, edges, length: int, floor: Score | None
) -> dict[str, Any]:
    change, error = score.change(baseline.head(len(score.logprobs)))
    figures = {
        "tokens": len(score.logprobs),
        "perplexity": score.perplexity,
        "change_percent": change,
        "change_error_percent": error,
        "nll_by_position": by_position([-x for x in score.logprobs], edges, length - 1),
    }
    if score.divergence is not None:
        figures["divergence"] = score.divergence.summary()
        figures["kl_by_position"] = by_position(score.divergence.kl, edges, length - 1)
        if floor is not None:
            figures["at_noise_floor"] = score.divergence.is_at(floor.divergence)
    return figures


def _edges(scored: int) -> list[tuple[int, int]]:
    """At most BINS ranges of about the same length that cover 0 to *scored*."""
    bins = min(BINS, scored)
    cuts = [scored * i // bins for i in range(bins + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def by_position(
    values: Sequence[float], edges: Sequence[tuple[int, int]], scored: int
) -> list[float]:
    """Means over the windows, *scored* values each, of every range of positions in *edges*."""
    windows = [values[at : at + scored] for at in range(0, len(values), scored)]
    return [statistics.fmean(v for w in windows for v in w[a:b]) for a, b in edges]


# --- plots -----------------------------------------------------------------------------


def _plots(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write those of PLOTS that the figures allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draws = (_draw_perplexity, _draw_kl, _draw_memory)
    for name, draw in zip(PLOTS, draws, strict=False):
        figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        try:
            if draw(axis, figures):
                axis.grid(alpha=0.3)
                axis.legend(fontsize=8)
                figure.savefig(folder / name, dpi=110, format="png")
        finally:
            pyplot.close(figure)
    if figures["tasks"]["generated"]:
        figure = task_page.heat_map(figures["tasks"]["generated"])
        figure.savefig(folder / task_page.PLOT, dpi=110, format="png")
        pyplot.close(figure)


def _label(name: str, text: str, figures: Mapping[str, Any]) -> str:
    texts = figures["dtypes"][BASELINE]["texts"]
    return f"{name}, {labels(texts)[text]}" if len(texts) > 1 else name


def _draw_perplexity(axis, figures: Mapping[str, Any]) -> bool:
    x = [statistics.fmean(ends) for ends in figures["positions"]]
    for dtype, found in figures["dtypes"].items():
        for text, of in found["texts"].items():
            y = [math.exp(nll) for nll in of["nll_by_position"]]
            axis.plot(x, y, label=_label(dtype, text, figures))
    axis.set(xlabel="token of the window", ylabel="perplexity", yscale="log")
    return True


def _draw_kl(axis, figures: Mapping[str, Any]) -> bool:
    x = [statistics.fmean(ends) for ends in figures["positions"]]
    lines = [(d, found["texts"], "-") for d, found in figures["dtypes"].items()]
    lines.append(("noise floor", figures["floor"] or {}, "--"))
    drawn = False
    for name, texts, style in lines:
        for text, of in texts.items():
            if "kl_by_position" in of:
                y = of["kl_by_position"]
                axis.plot(x, y, style, label=_label(name, text, figures))
                drawn = True
    axis.set(xlabel="token of the window", ylabel="KL divergence, nats per token", yscale="log")
    return drawn


def _draw_memory(axis, figures: Mapping[str, Any]) -> bool:
    """Without divergences: the change in perplexity."""
    dtypes = figures["dtypes"]
    held = dtypes[BASELINE]["kv_tokens"]
    if not held or len(dtypes) < 2 or not all(found["kv_tokens"] for found in dtypes.values()):
        return False
    with_kl = figures["floor"] is not None
    for marker, text in zip("osD^v<>ph*" * 9, dtypes[BASELINE]["texts"], strict=False):
        points = [
            (found["kv_tokens"] / held, _loss(found["texts"][text], with_kl), dtype)
            for dtype, found in dtypes.items()
            if dtype != BASELINE
        ]
        x, y, names = zip(*points, strict=True)
        [drawn] = axis.plot(x, y, marker, label=labels(dtypes[BASELINE]["texts"])[text])
        for point in points:
            axis.annotate(point[2], point[:2], xytext=(5, 5), textcoords="offset points", size=8)
        if with_kl:
            level = figures["floor"][text]["divergence"]["kl"]
            floor = _label("noise floor", text, figures)
            axis.axhline(level, linestyle="--", color=drawn.get_color(), linewidth=0.8, label=floor)
    loss = "KL divergence, nats per token" if with_kl else "change in perplexity, %"
    axis.set(xlabel=f"tokens in the same memory, {BASELINE} = 1", ylabel=loss)
    axis.set_xlim(0.9, 1.15 * max(found["kv_tokens"] / held for found in dtypes.values()))
    if with_kl:
        axis.set_yscale("log")
    return True


def _loss(of: Mapping[str, Any], with_kl: bool) -> float:
    return of["divergence"]["kl"] if with_kl else of["change_percent"]


# --- the page --------------------------------------------------------------------------


def _page(folder: Path, figures: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    title = f"KV caches of {about['model']}"
    parts = [f"<h1>{escape(title)}</h1>"]
    for text, label in labels(figures["dtypes"][BASELINE]["texts"]).items():
        parts += [f"<h2>{escape(label)}</h2>", _table(figures, text)]
    parts.append(
        '<p class="note">Change: of the perplexity, ± its standard error, on the same tokens. KL '
        "divergence of the next-token distributions in nats per token, TV total variation, top-1 "
        "how often the same token is the most likely, all against "
        f"{BASELINE}. Noise floor: {BASELINE} against itself, the first windows prefilled in "
        "chunks of another size; what is not above it on those (≤) is not told from "
        f"{BASELINE}.</p>"
    )
    if figures["greedy_tokens_in_common"]:
        parts += ["<h2>Greedy generations</h2>", _agreement_table(figures)]
    parts += task_page.html(figures["tasks"], BASELINE)
    for name, caption in PLOTS.items():
        if (folder / name).is_file():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}" />'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    parts += ["<h2>What was run</h2>", _rows(about)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(figures: Mapping[str, Any], text: str) -> str:
    headings = ("KV cache", "tokens", "perplexity", "change, %")
    headings += ("KL", "p50", "p99", "p99.9", "TV", "top-1")
    rows = [(d, f["kv_tokens"], f["texts"][text]) for d, f in figures["dtypes"].items()]
    if figures["floor"] is not None:
        rows.insert(1, (f"{BASELINE}, noise floor", None, figures["floor"][text]))
    lines = []
    for name, held, of in rows:
        change = f"{of['change_percent']:+.2f} ± {of['change_error_percent']:.2f}"
        cells = [f"{held:,}" if held else "", f"{of['perplexity']:.3f}"]
        cells.append("" if name == BASELINE else change)
        mark = ""
        if found := of.get("divergence"):
            kinds = ("kl", "kl_p50", "kl_p99", "kl_p99.9", "tv")
            cells += [*(f"{found[kind]:.5f}" for kind in kinds), f"{found['top1']:.2%}"]
            mark = "≤ " if of.get("at_noise_floor") else ""
        cells += [""] * (len(headings) - 1 - len(cells))
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in (mark + name, *cells)))
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _agreement_table(figures: Mapping[str, Any]) -> str:
    lines = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{statistics.median(tokens):g}</td>"
        f"<td>{', '.join(map(str, tokens))}</td></tr>"
        for name, tokens in figures["greedy_tokens_in_common"].items()
    )
    return (
        f"<p>Tokens before the first that differs from {BASELINE}'s generation.</p>\n<table>\n"
        "<thead><tr><th>KV cache</th><th>median</th><th>of each generation</th></tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody>\n</table>"
    )


def _rows(about: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{escape(_plain(value))}</td></tr>"
        for name, value in about.items()
    ]
    return "<table>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
