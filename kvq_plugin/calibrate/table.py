"""The summary of a calibration: a row per layer, what looks wrong marked."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from kvq_plugin.calibrate.scales import LayerScales, StreamScales
from kvq_plugin.calibrate.settings import Settings


def scale_table(settings: Settings, layers: Sequence[LayerScales]) -> Table:
    """Greatest magnitudes and scales per layer of K, V and, where calibrated, Q."""
    kinds = [kind for kind in "kvq" if any(kind in layer.streams for layer in layers)]
    shift = " and zero points" if settings.asymmetric else ""
    table = Table(
        title=f"{settings.scheme} scales{shift}, per {settings.strategy.value}",
        caption="amax: greatest magnitude seen; scale: least to greatest of the layer",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(f"{kind.upper()} amax", justify="right", no_wrap=True)
        table.add_column(f"{kind.upper()} scale", justify="right", no_wrap=True)
    table.add_column("suspect", overflow="fold")
    for layer in layers:
        cells: list[str | Text] = [str(layer.number)]
        for kind in kinds:
            cells += _figures(layer.streams[kind])
        found = [
            f"{kind.upper()}: {phrase}" for kind in kinds for phrase in layer.streams[kind].suspects
        ]
        table.add_row(*cells, Text("; ".join(found), style="yellow"))
    return table


def _figures(stream: StreamScales) -> list[str]:
    least, greatest = float(stream.scale.min()), float(stream.scale.max())
    scale = f"{least:.3g}" if least == greatest else f"{least:.3g} … {greatest:.3g}"
    return [f"{stream.amax:.3g}", scale]
