"""Two minutes of ``make soak``: one KV cache, three servers, one engine killed."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_soak():
    said = soak(["int4"], 120, minutes=2, seed=1)
    assert said["faults"] == []
    repeated = 2 * 2  # by each of the two servers under load
    assert said["wrong answers"] == 0
    assert said["answered"] + said["cancelled"] == 120 + repeated
    assert said["cancelled"] >= 10 and said["engines killed"] == 1 and said["servers"] == 3
    for what in ("preemptions", "cached tokens", "accepted drafts"):
        assert said[what] > 0, what
