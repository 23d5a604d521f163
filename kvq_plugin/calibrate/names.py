"""Where in the checkpoint the scales of a running model's attention layer belong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvq_plugin.serving.scales.keys import NUMBER, parse

PROBE = ".k_scale"


def probes(tensor_names: Iterable[str]) -> list[str]:
    """Names a k scale could have in a checkpoint with these tensors, the likely ones first."""
    prefixes: dict[str, None] = {}
    for name in tensor_names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            prefixes[".".join(parts[:end])] = None
    return [p + PROBE for p in prefixes] + [f"{p}.attn{PROBE}" for p in prefixes]


def load_name(name: str, layers: Iterable[str] = ()) -> str:
    """*name* of a scale in a checkpoint as the scale loader renames it for a model's *layers*."""
    found = parse(name)
    return name if found is None else found.targets(layers)[0]


def checkpoint_names(modules: Iterable[str], loaded: Mapping[str, str | None]) -> dict[str, str]:
    """Attention module of the running model -> prefix of its scales in the checkpoint.

    Args:
        modules: names as vLLM has them, such as ``model.layers.0.self_attn.attn``.
        loaded: probe -> the name under which the running model would load it.

    A probe fits when it loads as the module's scale, or when one of the two names ends with
    the other: loaders of some models add leading parts such as ``model.``. Raises ValueError
    listing modules that fit none or several.
    """
    found, lost = {}, []
    exact: dict[str, str] = {}
    by_end: dict[str, list[tuple[str, str]]] = {}
    for probe, name in loaded.items():
        if name is not None:
            exact.setdefault(name, probe)
            by_end.setdefault(_from_number(name), []).append((probe, name))
    for module in modules:
        wanted = module + PROBE
        fits = [exact[wanted]] if wanted in exact else []
        if not fits:
            near = by_end.get(_from_number(wanted), [])
            fits = list(
                {name: p for p, name in reversed(near) if _ends_alike(name, wanted)}.values()
            )
        if len(fits) == 1:
            found[module] = fits[0].removesuffix(PROBE)
        else:
            lost.append(f"{module} ({', '.join(fits) or 'none'})")
    if lost:
        raise ValueError(
            "cannot tell which layer of the checkpoint these attention modules are, and so where "
            f"their scales belong (candidates in parentheses): {'; '.join(lost)}"
        )
    return found


def _from_number(name: str) -> str:
    """*name* from its layer number on; all of it without one."""
    found = NUMBER.search(name)
    return name if found is None else name[found.start(1) :]


def _ends_alike(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith("." + short)
