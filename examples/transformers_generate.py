"""The same KV caches in transformers' `generate`, without vLLM.

python transformers_generate.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvq_plugin.hf_cache import KVQCache
from kvq_plugin.model import builtin_model


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else str(builtin_model())
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvq")
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    for kv_cache in ("int8_per_token_head", "int4"):
        cache = KVQCache(model.config, kv_cache)
        answer = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
        print(f"{kv_cache}: {tokenizer.decode(answer[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
