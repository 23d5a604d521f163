"""Abuse of real servers, and what came of it as JSON.

    python tests/soak.py [--requests 1000] [--minutes 20] [--dtypes int4,...] [--seed 0]

Each KV cache gets its share of the requests, half of them with n-gram speculation, through servers
whose block pool is far too small, with a prefix cache: prompts of mixed lengths that share
prefixes, streamed or not, a third cancelled halfway. All other answers must be, token for token,
those of a quiet server with room for everything and no prefix cache: matrix products are exact in
both (exact_server/), so rounding is no excuse. Memory and file descriptors must level off, and no
process may be left when a server ends. In the middle its engine is killed with -9: clients must
hear of it, the server must end, and the next one serves.

Exit status 1 if anything of this is not so; what was not begun after --minutes is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fuzz_engine import requests
from scaled import add_scales, change
from tiny_models import make

from kvq_plugin.formats import SERVED
from kvq_plugin.servers import GRACE_SECONDS, Server, process_group, serve

TESTS = Path(__file__).parent
CLIENTS = 24
ANSWERS = 64  # different tokens that answers consist of
BLOCKS = 16  # of 128 tokens, for up to 16 requests of up to 510 tokens
COMMON = ["--enforce-eager", "--max-model-len", "512", "--dtype", "bfloat16"]
COMMON += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "m"]
QUIET = ["--no-enable-prefix-caching", "--num-gpu-blocks-override", "256"]
TIGHT = ["--enable-prefix-caching", "--num-gpu-blocks-override", str(BLOCKS)]
TIGHT += ["--max-num-seqs", "16", "--max-num-batched-tokens", "128"]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
#: A server may take so much more memory in its second half, MiB, and so many more descriptors.
MORE_MEMORY, MORE_DESCRIPTORS = 48, 16
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "cached tokens": "vllm:prefix_cache_hits_total",
    "drafted tokens": "vllm:spec_decode_num_draft_tokens_total",
    "accepted drafts": "vllm:spec_decode_num_accepted_tokens_total",
}


def models(folder: Path) -> tuple[Path, Path]:
    """A tiny model with the built-in one's tokenizer, and one with int8 scales.

    They answer with few different tokens, which soon repeat: among 49,152 no draft was accepted.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from kvq_plugin.model import builtin_model

    tokenizer = AutoTokenizer.from_pretrained(builtin_model())
    plain = make(folder, "gqa", vocab_size=len(tokenizer))
    head = load_file(plain / "model.safetensors")["lm_head.weight"]
    head[ANSWERS:] = 0
    plain = change(plain, folder / "plain", {"lm_head.weight": head})
    prompts = [prompt for prompt, _ in requests(random.Random(1), 8)]
    scaled = add_scales(plain, folder / "int8", prompts, "int", [("channel", "channel")])
    for path in (plain, scaled):
        tokenizer.save_pretrained(path)
    return plain, scaled


def start(model: Path, dtype: str, args: Sequence[str]):
    path = [str(TESTS / "exact_server"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    return serve(model, dtype, args=[*COMMON, *args], env=env, timeout=600)


# --- requests --------------------------------------------------------------------------


async def _ask(client, prompt, new: int, stream: bool, cancel: bool) -> list[int] | None:
    """The tokens of the answer; None if it was cancelled."""
    options = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0.0}
    options["extra_body"] = {"ignore_eos": True, "return_token_ids": True}
    if not stream:
        asking = client.completions.create(**options)
        if not cancel:
            return (await asking).choices[0].token_ids
        with suppress(TimeoutError):  # the connection is closed; vLLM aborts the request
            return (await asyncio.wait_for(asking, 0.005 * new)).choices[0].token_ids
        return None
    ids: list[int] = []
    async with await client.completions.create(**options, stream=True) as chunks:
        async for chunk in chunks:
            ids += chunk.choices[0].token_ids or []
            if cancel and len(ids) >= new / 2:
                return None
    return ids


async def _ask_all(server: Server, asked, rng: random.Random, abuse: bool) -> list:
    from openai import AsyncOpenAI

    room = asyncio.Semaphore(CLIENTS if abuse else 8)

    async def one(prompt, new, stream, cancel):
        async with room:
            return await _ask(client, prompt, new, stream, cancel)

    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=600
    ) as client:
        plans = [
            (abuse and rng.random() < 0.5, abuse and rng.random() < 1 / 3 and new > 1)
            for _, new in asked
        ]
        return await asyncio.gather(
            *(one(*request, *plan) for request, plan in zip(asked, plans, strict=True)),
            return_exceptions=True,
        )


# --- a server's health -----------------------------------------------------------------


def footprint(server: Server) -> dict[str, int]:
    """MiB of resident memory and open file descriptors of the server's processes."""
    pages = descriptors = 0
    for pid in server.group_members():
        with suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    return {"MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20, "descriptors": descriptors}


def engine_of(server: Server) -> int:
    """Process id of the server's engine."""
    for pid in server.group_members():
        with suppress(OSError):
            if "EngineCor" in Path(f"/proc/{pid}/comm").read_text():
                return pid
    raise RuntimeError("no engine process in the server's group")


def left_behind(server: Server) -> list[int]:
    """Processes of the server that are there *GRACE_SECONDS* after its end."""
    deadline = time.monotonic() + GRACE_SECONDS
    while process_group(server.process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process_group(server.process.pid)


def settle(server: Server) -> None:
    """Return when no request is running: aborted ones take a step."""
    for _ in range(100):
        if not server.metric("vllm:num_requests_running"):
            return
        time.sleep(0.1)


# --- the soak --------------------------------------------------------------------------


class Soak:
    """Totals and faults so far."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.plain, self.scaled = models(folder)
        self.rng = random.Random(seed)
        self.totals: Counter = Counter()
        self.faults: list[str] = []
        self.growth = {"MiB": 0, "descriptors": 0}

    def format(self, dtype: str, count: int, kill: bool) -> None:
        """*count* requests to servers with KV cache *dtype*, the first of which is killed if so."""
        model = self.scaled if dtype == "int8" else self.plain
        asked = requests(self.rng, count)
        with start(model, dtype, QUIET) as server:
            expected = asyncio.run(_ask_all(server, asked, self.rng, abuse=False))
            self.totals["servers"] += 1
        if wrong := [e for e in expected if not isinstance(e, list)]:
            self.faults.append(f"{dtype}, quiet: {wrong[0]!r}")
            return
        half = count // 2
        for speculation, part in ((False, slice(0, half)), (True, slice(half, count))):
            args = TIGHT + (["--speculative-config", json.dumps(NGRAM)] if speculation else [])
            with start(model, dtype, args) as server:
                self.totals["servers"] += 1
                who = f"{dtype}{', speculating' if speculation else ''}"
                self._abuse(server, who, asked[part], expected[part])
                if kill and not speculation:
                    self._kill(server, who, asked)
                else:
                    self._end(server, who)

    def _abuse(self, server: Server, who: str, asked, expected) -> None:
        middle = len(asked) // 2
        sizes = []
        for part in (slice(0, middle), slice(middle, None)):
            found = asyncio.run(_ask_all(server, asked[part], self.rng, abuse=True))
            settle(server)
            sizes.append(footprint(server))
            self._compare(f"{who}: {part}", found, expected[part])
        # Whether so small a pool still has a prefix when it is asked for again is chance: once
        # again the longest prompt, twice and alone.
        longest = max(range(len(asked)), key=lambda i: len(asked[i][0]))
        for _ in range(2):
            found = asyncio.run(_ask_all(server, [asked[longest]], self.rng, abuse=False))
            self._compare(f"{who}: {longest} again", found, [expected[longest]])
        for name, metric in COUNTERS.items():
            self.totals[name] += int(server.metric(metric))
        limits = {"MiB": MORE_MEMORY, "descriptors": MORE_DESCRIPTORS}
        for what, limit in limits.items():
            more = sizes[1][what] - sizes[0][what]
            self.growth[what] = max(self.growth[what], more)
            if more > limit:
                self.faults.append(f"{who}: {more} more {what} after the second half")

    def _compare(self, who: str, found, expected) -> None:
        for i, (answer, right) in enumerate(zip(found, expected, strict=True)):
            self.totals["requests"] += 1
            if answer is None:
                self.totals["cancelled"] += 1
            elif isinstance(answer, BaseException):
                self.faults.append(f"{who}: {answer!r}")
            else:
                self.totals["answered"] += 1
                self.totals["tokens"] += len(answer)
                if answer != right:
                    self.totals["wrong answers"] += 1
                    self.faults.append(f"{who}: request {i}: {answer} for {right}")

    def _end(self, server: Server, who: str) -> None:
        server.process.send_signal(signal.SIGTERM)
        if code := server.process.wait(2 * GRACE_SECONDS):
            self.faults.append(f"{who}: ended with {code}")
        if orphans := left_behind(server):
            self.faults.append(f"{who}: left processes {orphans}")

    def _kill(self, server: Server, who: str, asked) -> None:
        """-9 for the engine under load: errors for clients, an end with a reason, no orphans."""

        async def under_load():
            asking = asyncio.create_task(_ask_all(server, asked[:CLIENTS], self.rng, abuse=False))
            await asyncio.sleep(0.3)
            os.kill(engine_of(server), signal.SIGKILL)
            return await asyncio.wait_for(asking, 120)

        found = asyncio.run(under_load())
        self.totals["engines killed"] += 1
        heard = [answer for answer in found if isinstance(answer, Exception)]
        server.process.wait(2 * GRACE_SECONDS)  # vLLM 0.32 ends with status 0 here, too
        if not heard:
            self.faults.append(f"{who}: no client heard of the engine's end")
        said = server.log.read_text(errors="replace")
        if "EngineCore encountered an issue" not in said and "EngineDeadError" not in said:
            self.faults.append(f"{who}: the log does not say that the engine died: {said[-500:]}")
        if orphans := left_behind(server):
            self.faults.append(f"{who}: left processes {orphans} after its engine was killed")


def soak(dtypes: Sequence[str], count: int, minutes: float, seed: int, tick=print) -> dict:
    begin = time.monotonic()
    done = []
    with tempfile.TemporaryDirectory(prefix="kvq-soak-") as folder:
        it = Soak(Path(folder), seed)
        for number, dtype in enumerate(dtypes):
            if time.monotonic() - begin > 60 * minutes:
                break
            it.format(dtype, count // len(dtypes), kill=number == len(dtypes) // 2)
            done.append(dtype)
            tick(f"{dtype}: {dict(it.totals)}")
    return {
        "dtypes": done,
        **it.totals,
        "wrong answers": it.totals["wrong answers"],
        "most growth in a server's second half": it.growth,
        "seconds": round(time.monotonic() - begin),
        "faults": it.faults,
    }


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    names = [name for name, format in SERVED.items() if name == format.name]
    p.add_argument("--dtypes", type=lambda text: text.split(","), default=names)
    p.add_argument("--requests", type=int, default=1000)
    p.add_argument("--minutes", type=float, default=20)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    said = soak(a.dtypes, a.requests, a.minutes, a.seed, lambda text: print(text, file=sys.stderr))
    print(json.dumps(said, indent=1))
    return 1 if said["faults"] or said["dtypes"] != a.dtypes else 0


if __name__ == "__main__":
    sys.exit(main())
