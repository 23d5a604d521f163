"""Huge pages under a KV cache: asked for as vLLM allocates it, said in the log, switched off."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from engine_jobs import Batch, Job, only, run
from tiny_models import make

from kvq_plugin import hugepages
from kvq_plugin.hugepages import HUGE_PAGE, HugePages, huge_bytes

needs_huge_pages = pytest.mark.skipif(
    hugepages.obstacle() is not None, reason=f"no huge pages here: {hugepages.obstacle()}"
)
LOG = logging.getLogger("test_hugepages")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, LOG.name)
    return lambda: caplog.messages[-1]


@needs_huge_pages
def test_zeros_come_on_huge_pages(said):
    before = huge_bytes()
    with HugePages(LOG):
        cache = torch.zeros(16 * HUGE_PAGE, dtype=torch.int8)
    assert huge_bytes() - before >= 15 * HUGE_PAGE
    assert "0.03 of 0.03 GiB on huge pages, zeroed in 0." in said()
    assert cache.shape == (16 * HUGE_PAGE,) and cache.dtype == torch.int8
    assert not cache.any()


@needs_huge_pages
def test_memory_that_was_in_use_moves_too():
    """As an allocator may hand it out again: its small pages, and what they hold, are gone."""
    memory = torch.ones(4 * HUGE_PAGE, dtype=torch.uint8)
    size = hugepages.ask(memory)
    before = huge_bytes()  # now, because what the allocator handed out may have been huge already
    assert size >= 3 * HUGE_PAGE
    assert memory.sum() == memory.nbytes - size  # bytes outside whole huge pages stay
    memory.fill_(2)
    assert huge_bytes() - before >= 2 * HUGE_PAGE


def test_only_zeros_inside_the_block_are_concerned(said, caplog):
    with HugePages(LOG):
        assert torch.ones(2).tolist() == [1, 1]
    torch.zeros(16 * HUGE_PAGE, dtype=torch.int8)
    assert not caplog.messages


def _everything_refused(*_):
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"setting": "always madvise [never]"}, "enabled says always madvise [never]"),
        ({"setting": None}, "this system has no "),
        ({"env": "0"}, "KVQ_HUGE_PAGES=0"),
        ({"size": 4096}, "it is smaller than one"),
        ({"ask": _everything_refused}, "the system refused (Invalid argument)"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_the_log_says_why_not(change, reason, said, monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    if change.get("setting", "always [madvise] never") is not None:
        setting.write_text(change.get("setting", "always [madvise] never"))
    monkeypatch.setattr(hugepages, "_SETTING", setting)
    monkeypatch.setattr(hugepages, "ask", change.get("ask", hugepages.ask))
    monkeypatch.setenv("KVQ_HUGE_PAGES", change.get("env", "1"))
    with HugePages(LOG):
        cache = torch.zeros(change.get("size", 4 * HUGE_PAGE), dtype=torch.uint8)
    assert said().startswith("KV cache: not on huge pages: ") and reason in said()
    assert not cache.any()


def test_a_bad_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("KVQ_HUGE_PAGES", "off")
    with pytest.raises(ValueError, match=r"'off': expected 1 .* or 0"):
        hugepages.enabled()


@pytest.mark.parametrize(("name", "ours"), [("int4_per_token_head", True), ("auto", False)])
def test_only_caches_of_ours_are_concerned(name, ours):
    """An engine without one of ours allocates as without the plugin."""
    pytest.importorskip("vllm")
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvq_plugin.formats import FORMATS
    from kvq_plugin.serving import backend

    dtype = torch.uint8 if ours else torch.bfloat16
    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=dtype)
    if ours:
        spec = backend.BACKENDS[FORMATS[name]].customize_spec(spec)
    around = backend.cache_memory([spec])
    assert isinstance(around, HugePages if ours else nullcontext)


#: engine_jobs, but that a batch looks at the memory of an engine no request has reached yet.
LOOK = """\
import sys
sys.path.insert(0, {tests!r})
import engine_jobs
from kvq_plugin.hugepages import huge_bytes

def look(*_):
    output = dict.fromkeys(("prompt", "logprobs", "margins", "prompt_logprobs"), [])
    return [output | dict(tokens=[huge_bytes()], cached=0)]

engine_jobs._generate = look
engine_jobs._main(*sys.argv[1:])
"""


@needs_huge_pages
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_has_huge_pages_before_its_first_request(tmp_path):
    """64 MiB of cache, with the switch on and off."""
    job = Job({"model": str(make(tmp_path, "gqa")), "kv_cache_dtype": "fp8"}, [Batch([[1]])])
    script = tmp_path / "look.py"
    script.write_text(LOOK.format(tests=str(Path(__file__).parent)))

    def huge(switch: str) -> int:
        (result,) = only(run([job], script=str(script), env={"KVQ_HUGE_PAGES": switch}))
        return result.batches[0][0].tokens[0]

    assert huge("1") - huge("0") > 48 << 20
