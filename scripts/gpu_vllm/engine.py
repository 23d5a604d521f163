"""One engine of real vLLM in this process: starts it, and appends what it finds stage by stage."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose end is the end
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo"),
    "VLLM_HOST_IP": "127.0.0.1",
}
#: Prompts of the stage tokens, in tokens: some within a block, most over several chunks.
LENGTHS = (5, 17, 64, 129, 300, 777, 1500, 2600)
DRY_LENGTHS = (5, 17, 40, 70)
NEW = 48
CHUNK = 2048
MAX_LEN = 8192
#: The stage time: decodes of SEQS sequences of CONTEXT tokens.
SEQS, CONTEXT, WARM, STEPS, PROFILED = 16, 4096, 8, 40, 4


@contextmanager
def gpu(folder: Path, exclusive: bool):
    """The GPU beside others' engines, or alone for a time to be measured."""
    with open(folder / "gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


class Evidence:
    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.begin = path, name, time.monotonic()

    def write(self, stage: str, status: str, **row) -> None:
        line = {"engine": self.name, "stage": stage, "status": status,
                "at": round(time.monotonic() - self.begin, 1), **row}  # fmt: skip
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")

    def stage(self, name: str, call, *args):
        """Result of call(*args), whose dict is written; None if it failed."""
        try:
            row = call(*args)
        except Exception as e:
            text = traceback.format_exc()
            self.write(name, "fail", error=f"{type(e).__name__}: {e}"[:600], trace=text[-2500:])
            print(text, file=sys.stderr, flush=True)
            return None
        self.write(name, "pass", **{k: v for k, v in row.items() if k[0] != "_"})
        return row


def start(spec: dict, model: Path, dry: str) -> dict:
    from vllm import LLM, ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    fit_torch()
    # Else vLLM looks at the class in a process of its own, which takes 10 s.
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    chunk, longest = (64, 256) if dry == "interpret" else (CHUNK, MAX_LEN)
    graphs = spec.get("graphs", "NONE")
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32" if dry == "interpret" else "bfloat16",  # the interpreter errs in bf16
        kv_cache_dtype=spec["dtype"],
        attention_backend=spec["backend"],
        enforce_eager=graphs == "NONE",
        max_num_seqs=SEQS,
        max_num_batched_tokens=chunk,
        max_model_len=longest,
        kv_cache_memory_bytes=(64 << 20) if dry else (6 << 30),
        gpu_memory_utilization=0.05,
        enable_prefix_caching=False,
        disable_log_stats=True,
        compilation_config={
            "mode": spec.get("mode", 0),
            "cudagraph_mode": graphs,
            "cudagraph_capture_sizes": [*range(1, SEQS + 1), *(() if dry else (256, CHUNK))],
            "custom_ops": ["none"],
        },
        kernel_config={
            "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
        },
    )
    return {"_llm": llm, **describe(llm)}


def fit_torch() -> None:
    """What this vLLM asks of a torch newer than 2.11, and a way without the bundle's views of the
    host's memory where they fail."""
    import torch
    from vllm.utils import platform_utils
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        Worker._scoped_allocator_max_split = lambda *args, **kwargs: nullcontext()
    if not torch.cuda.is_available():
        return
    try:
        host = torch.zeros(4, dtype=torch.int32, pin_memory=True)
        torch.ops._C.get_cuda_view_from_cpu_tensor(host).add_(1)
        torch.cuda.synchronize()
        assert host.tolist() == [1] * 4, f"a GPU's writes are not in pinned memory: {host}"
    except Exception:
        traceback.print_exc()
        buffer_utils.is_uva_available = platform_utils.is_uva_available = lambda: False


def describe(llm) -> dict:
    """What was selected: so that no other backend's numbers pass for ours."""
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    backends = {layer.attn_backend.__module__ + "." + layer.attn_backend.__qualname__
                for layer in layers if hasattr(layer, "attn_backend")}  # fmt: skip
    return {
        "backends": sorted(backends),
        "cache_dtype": config.cache_config.cache_dtype,
        "block_size": config.cache_config.block_size,
        "blocks": config.cache_config.num_gpu_blocks,
        "graphs": str(config.compilation_config.cudagraph_mode),
        "mode": str(config.compilation_config.mode),
        "v2_runner": bool(config.use_v2_model_runner),
        "async": bool(config.scheduler_config.async_scheduling),
    }


def prompts(lengths, vocab: int) -> list[dict]:
    import random

    r = random.Random(0)
    return [{"prompt_token_ids": [r.randrange(vocab) for _ in range(n)]} for n in lengths]


def tokens(llm, lengths, new: int) -> dict:
    """Greedy tokens, their log-probabilities, and how far the second choice was behind."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=2,
                            detokenize=False)  # fmt: skip
    begin = time.monotonic()
    outputs = llm.generate(prompts(lengths, vocab(llm)), params, use_tqdm=False)
    took = time.monotonic() - begin
    ids, logprobs, gaps = [], [], []
    for output in outputs:
        done = output.outputs[0]
        ids.append(list(done.token_ids))
        best = [sorted((x.logprob for x in row.values()), reverse=True) for row in done.logprobs]
        logprobs.append(
            [round(row[t].logprob, 4) for row, t in zip(done.logprobs, ids[-1], strict=True)]
        )
        gaps.append([round(row[0] - row[1], 4) for row in best])
    return {"seconds": round(took, 2), "tokens": ids, "logprobs": logprobs, "gaps": gaps}


def drift(llm, lengths) -> dict:
    """Log-probabilities of the prompts' own tokens, through chunked prefills."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(prompts(lengths, vocab(llm)), params, use_tqdm=False)
    rows = []
    for output in outputs:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        rows.append([round(row[t].logprob, 4) for t, row in pairs])
    return {"prompt_logprobs": rows}


def reference_drift(model: Path, lengths) -> dict:
    """As :func:`drift`, by transformers in float32: whether vLLM without its library is right."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    rows = []
    for prompt in prompts(lengths, llama.config.vocab_size):
        ids = torch.tensor([prompt["prompt_token_ids"]], device=device)
        with torch.inference_mode():
            logprobs = llama(ids).logits[0, :-1].log_softmax(-1)
        found = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        rows.append([round(x, 4) for x in found.tolist()])
    return {"prompt_logprobs": rows}


def vocab(llm) -> int:
    return llm.llm_engine.model_config.get_vocab_size()


def decode_time(llm, seqs: int, context: int, steps: int) -> dict:
    """Median time of a step in which all sequences decode one token."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=WARM + steps + PROFILED + 8, ignore_eos=True,
                            detokenize=False)  # fmt: skip
    for i, prompt in enumerate(prompts([context] * seqs, vocab(llm))):
        engine.add_request(f"time-{i}", prompt, params)
    sync = _synchronize
    sync()
    begin, made = time.monotonic(), {}
    while len(made) < seqs or min(made.values()) < WARM:
        _count(engine.step(), made)
        assert time.monotonic() - begin < 60, f"no end of the prefill: {made}"
    sync()
    prefill, times = time.monotonic() - begin, []
    before = sum(made.values())
    for _ in range(steps):
        now = time.perf_counter()
        _count(engine.step(), made)
        times.append(1e3 * (time.perf_counter() - now))
    sync()
    given = sum(made.values()) - before
    row = {
        "seqs": seqs, "context": context, "median_ms": round(statistics.median(times), 4),
        "mean_ms": round(statistics.mean(times), 4), "min_ms": round(min(times), 4),
        "tokens_a_step": given / steps, "prefill_s": round(prefill, 3),
    }  # fmt: skip
    return row | {"_left": [f"time-{i}" for i in range(seqs)], "_made": made}


def profile(llm, made: dict) -> dict:
    """Time on the GPU by kernel, in some steps of the stage time: microseconds a step."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as p:
        for _ in range(PROFILED):
            llm.llm_engine.step()
        _synchronize()
    found: dict[str, list] = {}
    for event in p.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found.setdefault(event.name[:110], [0.0, 0])
            entry[0] += event.device_time_total / PROFILED
            entry[1] += 1 / PROFILED
    top = sorted(found.items(), key=lambda item: -item[1][0])
    kernels = [[name, round(us, 1), round(n, 1)] for name, (us, n) in top[:16]]
    return {"gpu_us": round(sum(us for us, _ in found.values()), 1), "kernels": kernels}


def _count(outputs, made: dict) -> None:
    for output in outputs:
        made[output.request_id] = len(output.outputs[0].token_ids)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--spec", type=json.loads, required=True)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--lines", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--dry", choices=("", "interpret", "compile"), default="")
    a = p.parse_args()
    evidence = Evidence(a.lines, a.spec["name"])
    evidence.write("process", "begin", pid=os.getpid())
    os.environ |= ENVIRONMENT
    lengths, new, timing = LENGTHS, NEW, (SEQS, CONTEXT, STEPS)
    if a.spec["name"] == "transformers":
        lengths = DRY_LENGTHS if a.dry else LENGTHS
        with gpu(a.work, exclusive=False):
            evidence.stage("drift", reference_drift, a.model, lengths)
        return evidence.write("process", "end")
    if a.dry:
        import dry

        if a.dry == "interpret":
            os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
        dry.become_cuda()
        if a.dry == "compile":
            dry.compile_only(a.work)
            dry.compiled_kernels()
            new, timing = 6, (SEQS, 300, 2)
        else:
            dry.reference_kernels()
            lengths, new, timing = DRY_LENGTHS, 4, (2, 24, 2)

    def imported() -> dict:
        import torch
        import vllm

        return {"vllm": vllm.__version__, "torch": torch.__version__}

    if evidence.stage("import", imported) is None:
        return
    with gpu(a.work, exclusive=False):
        started = evidence.stage("start", start, a.spec, a.model, a.dry)
        if started is None:
            return
        llm = started["_llm"]
        evidence.stage("tokens", tokens, llm, lengths, new)
        evidence.stage("drift", drift, llm, lengths)
    with gpu(a.work, exclusive=True):
        timed = evidence.stage("time", decode_time, llm, *timing)
        if timed and not a.dry:
            evidence.stage("profile", profile, llm, timed["_made"])
    evidence.write("process", "end")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing to take down that the process's end does not
