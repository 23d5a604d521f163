"""Tables for terminals, pipes and files of any width."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_WIDE = 10_000  # columns: more than any cell takes


def print_table(console: Console, table: Table) -> None:
    """Print *table* with every word and figure whole.

    Rich cuts figures off where a table is wider than the console, and takes a pipe to be 80
    columns wide. Here such a table's lines are longer than the console's instead.
    """
    options = console.options.update(width=_WIDE)
    for column in table.columns:
        cells = [console.measure(cell, options=options) for cell in (column.header, *column.cells)]
        column.min_width = max(c.maximum if column.no_wrap else c.minimum for c in cells)
    needed = console.measure(table, options=options).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)
