"""A batch of prompts through vLLM's offline engine, with 3.3 times the tokens in the same memory.

python offline_batch.py [MODEL]
"""

import sys

from vllm import LLM, SamplingParams

from kvq_plugin.model import builtin_model


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(builtin_model())
    engine = LLM(
        model,
        kv_cache_dtype="int4",
        kv_cache_memory_bytes=256 << 20,
        max_model_len=2048,
        enforce_eager=True,  # without it vLLM compiles the model, which takes g++ and a minute
    )
    questions = (
        "What is the boiling point of water in degrees Celsius?",
        "Name the three primary colors.",
        "What is the capital of Japan?",
    )
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = engine.chat(chats, SamplingParams(temperature=0.0, max_tokens=32), use_tqdm=False)
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n    {answer.outputs[0].text.strip()}")


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    main()
