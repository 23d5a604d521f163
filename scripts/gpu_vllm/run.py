"""Starts the engines of a run, one process each, ends them in time, and says what they found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LINES = "vllm.jsonl"
#: A second choice so close behind the first may win when only the order of a sum has changed.
NEAR = 0.12


def engines() -> list[dict]:
    """Most telling first. ``like``: whose tokens they are compared with."""
    ours = {"backend": "KVQ", "like": "auto"}
    graphs = {"graphs": "FULL_DECODE_ONLY"}
    int8, fp8 = {**ours, "dtype": "int8_per_token_head"}, {**ours, "dtype": "fp8"}
    int4 = {**ours, "dtype": "int4_per_token_head"}
    sealed = {**ours, "dtype": "int4"}
    breakable = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}  # pieces without torch.compile
    auto = {"dtype": "auto", "backend": "TRITON_ATTN", "like": "transformers"}
    plan = {
        "auto": auto,
        "int8": int8,
        "int8-graphs": {**int8, **graphs, "like": "int8"},
        "transformers": {},
        "auto-graphs": {**auto, **graphs, "like": "auto"},
        "fp8": fp8,
        "fp8-graphs": {**fp8, **graphs, "like": "fp8"},
        "int4": int4,
        "int4-graphs": {**int4, **graphs, "like": "int4"},
        "sealed": sealed,
        "sealed-graphs": {**sealed, **graphs, "like": "sealed"},
        "static": {**ours, "dtype": "int8", "model": "scaled"},
        "static-graphs": {**ours, **graphs, "dtype": "int8", "model": "scaled", "like": "static"},
        "int8-full": {**int8, "graphs": "FULL", "like": "int8"},
        "int8-both": {**int8, "graphs": "FULL_AND_PIECEWISE", "like": "int8", "env": breakable},
        "vllm-fp8": {**auto, **graphs, "dtype": "fp8", "like": "auto"},
        "int8-v1": {**int8, **graphs, "like": "int8", "env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
        "int8-triton": {**int8, **graphs, "like": "int8", "env": {"KVQ_GPU_KERNELS": "triton"}},
    }
    return [{"name": name, **spec} for name, spec in plan.items()]


#: What a run does unless told otherwise.
DEFAULT = 14


def main(a) -> int:
    begin = time.monotonic()
    a.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-vllm-"))
    with tarfile.open(a.file) as archive:
        archive.extractall(work, filter="fully_trusted")
    site = work / "site"
    if a.library:
        shutil.copy2(a.library, ROOT / "kvq_plugin" / "_kvq_cuda.so")
    wanted = a.engines.split(",") if a.engines else [s["name"] for s in engines()[:DEFAULT]]
    waiting = [s for s in engines() if s["name"] in wanted]
    cache = work / "triton"
    if (site / "triton-cache").is_dir():
        move_cache(site / "triton-cache", cache)
    known = {d.name for d in cache.glob("*")}
    env = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join((str(site), str(HERE), str(ROOT))),
        PYTHONUNBUFFERED="1",
        OMP_NUM_THREADS="2",
        TRITON_CACHE_DIR=str(cache),
    )
    say(begin, f"bundle unpacked; engines: {', '.join(s['name'] for s in waiting)}")
    # Before all engines import the same 2,000 files at once.
    compiling = subprocess.Popen(
        [sys.executable, "-m", "compileall", "-q", "-j", "0", str(site / "vllm")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    model = [sys.executable, str(HERE / "tiny.py"), str(work / "model"), a.dry]
    subprocess.run(model, env=env, check=True)
    compiling.wait()
    say(begin, "compiled its Python and wrote the model")
    running: list[Engine] = []
    try:
        while waiting or running:
            left = a.seconds - (time.monotonic() - begin)
            while waiting and len(running) < a.slots and left > 20:
                running.append(Engine(a, waiting.pop(0), work, env))
            if left <= 20:
                waiting.clear()
            for engine in [e for e in running if e.over(left)]:
                running.remove(engine)
                say(begin, engine.finish(a.out))
                if hopeless(a.out):
                    say(begin, "no engine starts: the others are not tried")
                    waiting.clear()
            time.sleep(0.1)
    finally:
        for engine in running:
            engine.kill()
    new = [d.name for d in cache.glob("*") if d.name not in known and any(d.glob("*.json"))]
    say(begin, f"Triton: {len(known)} folders came along, {len(new)} kernels were compiled here")
    if a.keep_cache:
        shutil.copytree(cache, a.keep_cache, dirs_exist_ok=True)
    text = summarize(a.out)
    (a.out / "vllm-summary.txt").write_text(text + "\n")
    print(text, flush=True)
    return 0


def hopeless(out: Path) -> bool:
    """True when three engines have ended and none has started."""
    lines = [json.loads(text) for text in (out / LINES).read_text().splitlines()]
    tried = {x["engine"] for x in lines if x["stage"] == "end"} - {"transformers"}
    return len(tried) >= 3 and not any(
        x["stage"] == "start" and x["status"] == "pass" for x in lines
    )


def move_cache(source: Path, target: Path) -> None:
    """Triton notes whole paths in its cache."""
    source.rename(target)
    for file in target.glob("*/__grp__*.json"):
        group = json.loads(file.read_text())
        paths = group["child_paths"]
        group["child_paths"] = {name: str(file.parent / name) for name in paths}
        file.write_text(json.dumps(group))


def say(begin: float, text: str) -> None:
    print(f"{time.monotonic() - begin:6.1f} s  {text}", flush=True)


class Engine:
    """One process, the head of a group of its own."""

    def __init__(self, a, spec: dict, work: Path, env: dict) -> None:
        self.name, self.log = spec["name"], work / f"{spec['name']}.log"
        model = work / "model" / spec.get("model", "plain")
        command = [sys.executable, str(HERE / "engine.py"), "--spec", json.dumps(spec),
                   "--model", str(model), "--lines", str(a.out / LINES), "--work", str(work),
                   "--dry", a.dry]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env={**env, **spec.get("env", {})}, stdout=log,
                stderr=subprocess.STDOUT, process_group=0, cwd=work,
            )  # fmt: skip
        self.end = time.monotonic() + a.limit
        self.how = ""

    def over(self, left: float) -> bool:
        if self.process.poll() is None and (time.monotonic() > self.end or left < 3):
            self.how = "killed past its time limit"
            self.kill()
        return self.process.poll() is not None

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass

    def finish(self, out: Path) -> str:
        how = self.how or f"ended with status {self.process.returncode}"
        text = self.log.read_text(errors="replace")
        with (out / "vllm-engines.log").open("a") as f:
            f.write(f"=== {self.name}: {how}\n{text[:8000]}\n...\n{text[-16000:]}\n")
        line = {"engine": self.name, "stage": "end", "status": how, "tail": text[-3000:]}
        with (out / LINES).open("a") as f:
            f.write(json.dumps(line) + "\n")
        return f"{self.name}: {how}"


def summarize(folder: Path) -> str:
    """Text of what the lines in *folder* hold."""
    found: dict[str, dict[str, dict]] = {}
    for text in (folder / LINES).read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["engine"], {})[line["stage"]] = line
    like = {s["name"]: s.get("like") for s in engines()}
    out = []
    for name, stages in found.items():
        bad = [f"{s} FAILED: {x['error']}" for s, x in stages.items() if x["status"] == "fail"]
        facts = []
        if (start := stages.get("start", {})).get("status") == "pass":
            runner = "V2" if start["v2_runner"] else "V1"
            facts.append(f"{start['backends'][0].split('.')[-1]} graphs {start['graphs']} {runner}")
        other = found.get(like.get(name) or "", {})
        for stage, compare in (("tokens", same_tokens), ("drift", same_prompts)):
            mine, theirs = stages.get(stage, {}), other.get(stage, {})
            if mine.get("status") == theirs.get("status") == "pass":
                facts.append(f"{compare(mine, theirs)} (against {like[name]})")
        if (timed := stages.get("time", {})).get("status") == "pass":
            facts.append(
                f"decode step {timed['median_ms']} ms, {timed['seqs']} x {timed['context']} tokens"
            )
        if (kernels := stages.get("profile", {})).get("status") == "pass":
            facts.append(f"GPU {kernels['gpu_us']} us a step")
            facts += [f"    {us:9.1f} us {n:5.1f} x {k}" for k, us, n in kernels["kernels"][:4]]
        if "process" in stages and stages["process"]["status"] == "begin":
            bad.append(stages.get("end", {}).get("status", "still running"))
        out += [name, *(f"  {x}" for x in facts + bad)]
    return "\n".join(out)


def same_tokens(mine: dict, theirs: dict) -> str:
    """How far greedy decoding went the same way, and whether near ties explain where it left it."""
    equal = total = far = left = 0
    errors = []
    for a, b, la, lb, gaps in zip(
        mine["tokens"], theirs["tokens"], mine["logprobs"], theirs["logprobs"], theirs["gaps"],
        strict=True,
    ):  # fmt: skip
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal, total = equal + n, total + len(a)
        errors += [abs(x - y) for x, y in zip(la[:n], lb[:n], strict=True)]
        if n < len(a):
            left += 1
            far += gaps[n] > NEAR
    mean = statistics.mean(errors) if errors else float("nan")
    return (
        f"tokens: {equal} of {total} before the first that differs; {left} of "
        f"{len(mine['tokens'])} sequences part, {far} of them where the choice was not near; "
        f"log-probabilities differ by {mean:.4f}"
    )


def same_prompts(mine: dict, theirs: dict) -> str:
    errors = sorted(
        abs(x - y)
        for a, b in zip(mine["prompt_logprobs"], theirs["prompt_logprobs"], strict=True)
        for x, y in zip(a, b, strict=True)
    )
    mean = statistics.mean(errors)
    return f"prompts: log-probabilities differ by {mean:.4f}, at most {errors[-1]:.3f}"
