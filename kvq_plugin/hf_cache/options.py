"""What the options of transformers' ``QuantizedCache`` are here."""

from __future__ import annotations

BACKENDS = ("quanto", "hqq", "fp8")
#: nbits -> the format that stores as many.
BITS = {8: "int8_per_token_head", 4: "int4_per_token_head"}
FP8 = "fp8_per_token_head"


def format_like(
    head_size: int | None,
    *,
    backend: str,
    nbits: int | None,
    axis_key: int | None,
    axis_value: int | None,
    q_group_size: int | None,
    residual_length: int | None,
    has_scales: bool,
) -> str:
    """The name of the format for these options; ValueError naming the one that has none. Without a
    *head_size* any group size will do: there is nothing to quantize, as the cache then says."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "fp8":
        if nbits is not None and nbits != 8:
            raise _no("nbits", nbits, "the fp8 backend has 8 bits")
        name = FP8
    elif (nbits := 4 if nbits is None else nbits) in BITS:
        name = BITS[nbits]
    else:
        known = ", ".join(f"nbits={bits} is {name!r}" for bits, name in BITS.items())
        raise _no("nbits", nbits, f"{known}; KVQCache(config, 'k3v2') has 3 bits for K, 2 for V")
    channels = {"axis_key": axis_key, "axis_value": axis_value}
    for option, axis in channels.items():
        if axis not in (None, 0, 1, -1):
            raise _no(option, axis, "expected -1 or 1, a scale per token")
    if has_scales:
        if name != BITS[8] or 0 not in channels.values():
            raise ValueError(
                "scales= goes with nbits=8 and axis 0, static scales per channel ('int8'); with "
                "other options they are computed while writing"
            )
        name = "int8"
    elif 0 in channels.values():
        option = next(option for option, axis in channels.items() if axis == 0)
        raise _no(
            option,
            0,
            f"{name!r} has a scale per token and head, axis -1; for scales per channel run `kvq "
            "calibrate` and pass nbits=8 and scales=DIRECTORY",
        )
    if q_group_size is not None and q_group_size < (head_size or 0) and name != "int8":
        raise _no(
            "q_group_size",
            q_group_size,
            f"{name!r} has one scale for the {head_size} values of a token and head: leave it out",
        )
    if residual_length:
        raise _no(
            "residual_length",
            residual_length,
            f"{name!r} stores each token once, as it comes, and never quantizes it again, so it "
            "needs no tokens in full precision: pass 0 or leave it out, or make a KVQCache(config, "
            "'int4'), which keeps the newest 32 to 63 tokens in 8 bits",
        )
    return name


def _no(option: str, value: object, instead: str) -> ValueError:
    return ValueError(f"{option}={value} has no equivalent: {instead}")
