"""Calibrate int8 scales for a model, then serve the result, which needs no flag.

    python calibrate_and_serve.py [MODEL]

On the command line it is `kvq calibrate MODEL -o OUT` and `vllm serve OUT`. Four short samples are
enough to show the way; `kvq calibrate` takes 32 of 2,048 tokens by default.
"""

import sys
import tempfile

from kvq_plugin import cli
from kvq_plugin.model import builtin_model
from kvq_plugin.servers import serve


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(builtin_model())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/calibrated"
        samples = ["--samples", "4", "--length", "256", "--driver", "hf"]
        if cli.main(["calibrate", model, "-o", checkpoint, *samples]):
            raise SystemExit("calibration failed")
        arguments = ["--enforce-eager", "--max-model-len", "2048"]
        arguments += ["--kv-cache-memory-bytes", str(256 << 20)]
        # "auto": the checkpoint itself declares that its KV cache is int8.
        with serve(checkpoint, "auto", args=arguments) as server:
            print(f"{server.kv_tokens():,} tokens in 256 MiB, with scales from {checkpoint}")
            reply = server.client().chat.completions.create(
                model=checkpoint,
                messages=[{"role": "user", "content": "What is the boiling point of water?"}],
                temperature=0.0,
                max_tokens=32,
            )
            print(reply.choices[0].message.content)


if __name__ == "__main__":
    main()
