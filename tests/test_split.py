"""How a store's tokens are dealt out to threads (csrc/cpu/split.h), on its own.

Time is not measured: what is held is that parts are equal in work wherever the slots are, and that
tokens which share a word of V, or a slot, stay together and in order.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CSRC = Path(__file__).parent.parent / "csrc"
GROUP = 16
SOURCE = """
#include <vector>
#include "cpu/split.h"
extern "C" bool deal(const int64_t* slots, long tokens, long block_size, int parts, int group,
                     int* part_of, int* turn_of, int* run_of) {
  const long bytes = kvq::split_bytes(tokens, parts);
  std::vector<char> memory(bytes + 64, 0x5A);
  const kvq::Split s = kvq::split(slots, tokens, block_size, parts, memory.data(), group);
  int turn = 0;
  for (int part = 0; part < parts; ++part) {
    for (int i = s.begin[part]; i < s.begin[part + 1]; ++i) {
      const kvq::Run& r = s.runs[i];
      for (int t = 0; t < r.count; ++t) {
        const bool right = r.block * block_size + r.position == r.slot &&
                           slots[r.token + t] == r.slot + t && part_of[r.token + t] < 0;
        part_of[r.token + t] = right ? part : 1 << 20;
        turn_of[r.token + t] = turn++;
        run_of[r.token + t] = r.alone ? r.count : 0;
      }
    }
  }
  for (int i = 0; i < 64; ++i) {
    if (memory[bytes + i] != 0x5A) return false;
  }
  return true;
}
"""


@pytest.fixture(scope="module")
def deal(tmp_path_factory):
    """``deal(slots, parts, block_size, group) -> (part of each token, its turn, tokens of its run
    if no other is in its group, else 0)``; -1: left out."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (the compiled kernels were built elsewhere)")
    folder = tmp_path_factory.mktemp("split")
    (folder / "split.cpp").write_text(SOURCE)
    command = [compiler, "-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover",
               "-fPIC", "-shared", f"-I{CSRC}", str(folder / "split.cpp"),
               "-o", str(folder / "split.so")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    function = ctypes.CDLL(str(folder / "split.so")).deal
    function.restype = ctypes.c_bool

    def call(slots, parts, block_size=128, group=GROUP):
        slots = np.ascontiguousarray(slots, np.int64)
        found = np.full((3, len(slots)), -1, np.int32)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (slots, *found)]
        sizes = ctypes.c_long(len(slots)), ctypes.c_long(block_size), parts, group
        assert function(pointers[0], *sizes, *pointers[1:]), "more memory than split_bytes() says"
        return found

    return call


def sizes(part_of, parts) -> np.ndarray:
    return np.bincount(part_of[part_of >= 0], minlength=parts)


@pytest.mark.parametrize("parts", (8, 12, 64, 256))
@pytest.mark.parametrize("block_size", (16, 32, 128))
@pytest.mark.parametrize("offset", (0, 5, 127))
def test_lockstep_sequences_spread_over_all_parts(deal, parts, block_size, offset):
    """128 sequences whose new tokens have the same place in their blocks: as many to each part."""
    blocks = np.random.default_rng(0).permutation(1000)[:128]
    part_of, _, _ = deal(blocks * block_size + offset % block_size, parts, block_size)
    found = sizes(part_of, parts)
    assert found.max() - found.min() <= 1 and found.sum() == 128


@pytest.mark.parametrize("stride", (1, 16, 64, 128, 256, 1024, 2048, 4096 + 16))
def test_tokens_at_any_distance(deal, stride):
    part_of, _, _ = deal(np.arange(512) * stride, 8)
    assert sizes(part_of, 8).max() <= 512 / 8 + GROUP


def test_a_prompt_is_cut_into_contiguous_parts(deal):
    """A part's pages are neighbours, and so are the rows it reads."""
    part_of, _, _ = deal(np.arange(4096) + 37 * 128, 8)
    assert (np.diff(part_of) >= 0).all()
    assert sizes(part_of, 8).max() <= 4096 / 8 + GROUP


def test_shuffled_tokens_of_few_groups(deal):
    """Groups come back again and again; their work is known before they are dealt out."""
    part_of, _, _ = deal(np.random.default_rng(0).permutation(4096), 8)
    assert sizes(part_of, 8).max() <= 4096 / 8 + GROUP


@pytest.mark.parametrize("parts", (1, 8))
def test_runs_of_longer_groups_know_whether_they_are_alone(deal, parts):
    """Tokens 0 to 99 and, of their groups of 32 slots, one token more."""
    _, _, runs = deal([*range(100), 70], parts, group=32)
    assert runs.tolist() == [32] * 64 + [0] * 32 + [4] * 4 + [0]


def check(slots, part_of, turn_of, parts):
    slots = np.asarray(slots)
    real = slots >= 0
    assert ((part_of >= 0) == real).all() and part_of.max(initial=0) < parts
    assert sorted(turn_of[real]) == list(range(real.sum()))
    for group in np.unique(slots[real] // GROUP):
        mine = real & (slots // GROUP == group)
        assert len(set(part_of[mine])) == 1, "tokens that share words are one thread's"
        assert (np.diff(turn_of[mine]) > 0).all(), "the last token of a slot is the one that stays"


@given(
    slots=st.lists(st.one_of(st.integers(-1, 200), st.integers(0, 2**40)), max_size=120),
    parts=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_any_slots(deal, slots, parts):
    part_of, turn_of, _ = deal(slots, parts, block_size=32)
    check(slots, part_of, turn_of, parts)
    work = sum(1 for s in slots if s >= 0)
    largest = max(np.unique([s // GROUP for s in slots if s >= 0], return_counts=True)[1],
                  default=0)  # fmt: skip
    # Work counts a token once and each run of neighbours once more.
    assert sizes(part_of, parts).max() <= 2 * work / parts + 2 * largest
