"""Tables lose nothing, however narrow the console; and they fit where they can."""

from __future__ import annotations

import io

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from kvq_plugin.tables import print_table

FIGURES = [f"{1.23456789 + i:.8f} ± 0.12345678" for i in range(4)]
WORDS = "remarks may be long, and are broken between words: model.layers.11.self_attn.k_scale"


def printed(width: int, terminal: bool = False) -> list[str]:
    table = Table(box=box.SIMPLE_HEAD, title="Figures")
    for i in range(len(FIGURES)):
        table.add_column(f"column {i}", justify="right", no_wrap=True)
    table.add_column("remarks")
    table.add_row(*FIGURES, WORDS)
    output = io.StringIO()
    print_table(Console(file=output, width=width, force_terminal=terminal), table)
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [1, 40, 80, 120, 400])
@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_cut(width, terminal):
    lines = printed(width, terminal)
    text = "\n".join(lines)
    assert "…" not in text
    row = next(line for line in lines if FIGURES[0] in line)
    assert all(figure in row for figure in FIGURES)
    assert all(word in text for word in WORDS.split())
    assert "column 3" in text


def test_a_table_fits_where_words_allow():
    assert max(map(len, printed(180))) <= 180
    assert max(map(len, printed(400))) < 260  # and is not stretched


def test_every_table_is_printed_whole():
    """No command hands a table to Console.print itself."""
    import re
    from pathlib import Path

    import kvq_plugin

    for file in Path(kvq_plugin.__file__).parent.rglob("*.py"):
        if file.name != "tables.py":
            assert not re.search(r"\.print\(\w*table\b", file.read_text()), file
