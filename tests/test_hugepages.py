"""Huge pages under a cache: contents and neighbours stay, anything not fresh is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kvq_plugin import hugepages
from kvq_plugin.hugepages import HUGE_PAGE

needs_huge_pages = pytest.mark.skipif(
    not hugepages.allowed(), reason="this system gives no huge pages to programs"
)


def huge_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages:\s+(\d+) kB", rollup)[1]) << 10


@needs_huge_pages
def test_fresh_memory_moves_to_huge_pages():
    cache = torch.zeros(16 * HUGE_PAGE, dtype=torch.uint8)
    before = huge_bytes()
    assert hugepages.advise(cache[HUGE_PAGE:])  # any view stands for its storage
    assert huge_bytes() - before >= 8 * HUGE_PAGE
    assert not cache.any()


@needs_huge_pages
def test_bytes_outside_whole_huge_pages_stay():
    cache = torch.zeros(4 * HUGE_PAGE + 4096, dtype=torch.uint8)
    cache[0] = cache[-1] = 7
    hugepages.advise(cache)
    assert cache[0] == cache[-1] == 7 and cache.sum() == 14


def test_memory_in_use_is_left_alone():
    cache = torch.zeros(4 * HUGE_PAGE, dtype=torch.uint8)
    cache[2 * HUGE_PAGE] = 1
    assert not hugepages.advise(cache)
    assert cache[2 * HUGE_PAGE] == 1


def test_small_memory_is_left_alone():
    assert not hugepages.advise(torch.zeros(4096, dtype=torch.uint8))


def test_a_system_without_huge_pages(monkeypatch):
    monkeypatch.setattr(hugepages, "allowed", lambda: False)
    assert not hugepages.advise(torch.zeros(4 * HUGE_PAGE, dtype=torch.uint8))
