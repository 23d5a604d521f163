"""Write what docs/ holds of data: the support matrix and the picture of formats.

    python scripts/make_docs.py            # docs/support.md, docs/images/formats.svg
    python scripts/make_docs.py --check    # exit 1 when docs/support.md is not what the data say

The matrix comes from docs/data/support.toml, the picture from docs/data/formats.csv (matplotlib).
"""

from __future__ import annotations

import csv
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
START, END = "<!-- the matrix: scripts/make_docs.py -->", "<!-- end of the matrix -->"
OWN = {"own": "transformers' own cache"}


def tables() -> list[dict]:
    """The tables of support.toml."""
    return tomllib.loads((DOCS / "data" / "support.toml").read_text(encoding="utf-8"))["table"]


def cell(text: str) -> str:
    """``refused tests/x.py::y`` -> what the page says."""
    kind, _, _ = text.partition(" ")
    if kind.startswith(("tests/", "benchmarks/")):
        return "**tested**"
    return {"-": "–", "emulated": "emulated"}.get(kind, OWN.get(kind, kind))


def matrix() -> str:
    """Markdown of all tables."""
    lines = []
    for table in tables():
        lines += ["", f"### {table['title']}", "", f"| | {' | '.join(table['columns'])} |"]
        lines += ["|---" * (len(table["columns"]) + 1) + "|"]
        for name, *cells in table["rows"]:
            assert len(cells) == len(table["columns"]), name
            lines.append(f"| {name} | {' | '.join(map(cell, cells))} |")
    return "\n".join([START, *lines, "", END])


def page() -> tuple[Path, str, str]:
    """docs/support.md: where, as it is, and as it should be."""
    path = DOCS / "support.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    return path, text, before + matrix() + after


def formats() -> list[dict[str, str]]:
    """The rows of formats.csv."""
    with (DOCS / "data" / "formats.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(target: Path) -> None:
    """Memory against quality, with decode speed as colour and figure."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "kvq", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot

    rows = formats()
    x, y, speed = ([float(row[k]) for row in rows] for k in ("tokens", "perplexity", "speed"))
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    dots = axes.scatter(x, y, c=speed, s=170, cmap="viridis", vmin=1, vmax=3.5, edgecolor="white")
    #: points to move a name by, where the next one is near
    offsets = {
        "int8_per_token_head": (-4, -20),
        "int4_per_token_head": (-4, -22),
        "k3v2": (-60, 12),
        "fp8": (12, 6),
        "fp8_per_token_head": (12, -12),
    }
    for row in rows:
        name = row["name"]
        axes.annotate(
            f"{name}, {row['speed']}x",
            (float(row["tokens"]), float(row["perplexity"])),
            xytext=offsets.get(name, (12, -4)),
            textcoords="offset points",
        )
    axes.plot([1], [0.08], marker="^", color="grey", linestyle="none")
    axes.annotate("auto (bf16), 1x: no change", (1, 0.08), xytext=(10, -4),
                  textcoords="offset points", color="grey")  # fmt: skip
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_ylim(10, 0.07)  # better is up
    axes.set_xlim(0.95, 5.5)
    axes.set_xlabel("tokens in the memory where bf16 holds one (more is better)")
    axes.set_ylabel("change of perplexity, % (up is better)")
    figure.colorbar(dots, label="decode attention, times the speed of vLLM's bf16")
    axes.grid(alpha=0.25)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    path, is_, should_be = page()
    if "--check" in sys.argv[1:]:
        if is_ != should_be:
            raise SystemExit(f"{path} is not what docs/data says: run scripts/make_docs.py")
        return
    path.write_text(should_be, encoding="utf-8")
    draw(DOCS / "images" / "formats.svg")


if __name__ == "__main__":
    main()
