"""Run vLLM's AsyncLLM in a process of its own, as engine_jobs runs LLM, and bring back tokens."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine_jobs import ENGINE


def run(
    llm: dict, prompts: list[list[int]], ranks: list[int], *, tokens: int, env: dict, timeout: float
) -> list[list[int]]:
    """Generate *tokens* tokens for each prompt, all at once, on the data-parallel rank beside it.

    *llm* are arguments of the engine over ENGINE.
    """
    work = {"llm": ENGINE | llm, "prompts": prompts, "ranks": ranks, "tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "work.json"), Path(folder, "tokens.json")
        source.write_text(json.dumps(work))
        done = subprocess.run(
            [sys.executable, __file__, str(source), str(target)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if not target.is_file():
            raise RuntimeError(f"the engine process died:\n{(done.stdout + done.stderr)[-4000:]}")
        return json.loads(target.read_text())


# --- inside the process ----------------------------------------------------------------


async def _main(source: str, target: str) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    work = json.loads(Path(source).read_text())
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**work["llm"]))
    params = SamplingParams(
        temperature=0.0,
        max_tokens=work["tokens"],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def generate(number: int, prompt: list[int], rank: int) -> list[int]:
        request = {"prompt_token_ids": prompt}
        outputs = engine.generate(request, params, str(number), data_parallel_rank=rank)
        return [list(output.outputs[0].token_ids) async for output in outputs][-1]

    try:
        pairs = enumerate(zip(work["prompts"], work["ranks"], strict=True))
        tokens = await asyncio.gather(*(generate(i, *pair) for i, pair in pairs))
        Path(target).write_text(json.dumps(tokens))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
