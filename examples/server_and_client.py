"""`vllm serve` with a quantized KV cache, and the OpenAI client asking it.

    python server_and_client.py [MODEL]

In two terminals it would be

    vllm serve MODEL --kv-cache-dtype int8_per_token_head

and the client below; here one script starts the server, asks, and stops it.
"""

import sys

from kvq_plugin.model import builtin_model
from kvq_plugin.servers import serve


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(builtin_model())
    # Eager: compiling the model takes g++ and a minute.
    arguments = ["--enforce-eager", "--max-model-len", "2048"]
    arguments += ["--kv-cache-memory-bytes", str(256 << 20)]
    with serve(model, "int8_per_token_head", args=arguments) as server:
        print(f"{server.url} holds {server.kv_tokens():,} tokens")
        client = server.client()  # openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        question = [{"role": "user", "content": "What is the boiling point of water?"}]
        stream = client.chat.completions.create(
            model=model, messages=question, temperature=0.0, max_tokens=32, stream=True
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
