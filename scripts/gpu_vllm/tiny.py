"""A Llama with random weights, large enough for its KV cache to be read at a GPU's bandwidth."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def write(folder: Path, dry: str = "") -> None:
    """The model in *folder*/plain, and again with scales of static int8 in *folder*/scaled."""
    import torch
    from safetensors.torch import save_file

    hidden, layers, heads, kv_heads, size, inner, vocab = 1024, 8, 32, 8, 128, 2048, 4096
    if dry == "compile":
        layers = 1
    elif dry:
        hidden, layers, heads, kv_heads, size, inner, vocab = 64, 2, 4, 2, 32, 128, 128
    device = "cuda" if torch.cuda.is_available() and not dry else "cpu"
    g = torch.Generator(device).manual_seed(0)

    def weight(rows: int, columns: int, gain: float = 1.0):
        w = torch.randn(rows, columns, generator=g, device=device) * (gain / columns**0.5)
        return w.to(torch.bfloat16).cpu()

    scales, tensors = {}, {"model.embed_tokens.weight": weight(vocab, hidden, 0.3 * hidden**0.5)}
    for i in range(layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        # Peaked attention, or errors of K and V would average out over the context.
        tensors[f"{attn}.q_proj.weight"] = weight(heads * size, hidden, 1.7)
        tensors[f"{attn}.k_proj.weight"] = weight(kv_heads * size, hidden, 1.7)
        tensors[f"{attn}.v_proj.weight"] = weight(kv_heads * size, hidden)
        tensors[f"{attn}.o_proj.weight"] = weight(hidden, heads * size)
        tensors[f"{mlp}.gate_proj.weight"] = weight(inner, hidden)
        tensors[f"{mlp}.up_proj.weight"] = weight(inner, hidden)
        tensors[f"{mlp}.down_proj.weight"] = weight(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        # Of static int8: K and V have a standard deviation of 1.7 and 1.
        scales[f"{attn}.k_scale"] = torch.tensor(8.0 / 127)
        scales[f"{attn}.v_scale"] = torch.tensor(5.0 / 127)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = weight(vocab, hidden, 3.0)
    plain, scaled = folder / "plain", folder / "scaled"
    for target in (plain, scaled):
        target.mkdir(parents=True)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (scaled / "model.safetensors").symlink_to(plain.resolve() / "model.safetensors")
    save_file(scales, scaled / "scales.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": size, "intermediate_size": inner, "vocab_size": vocab, "hidden_act": "silu",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    for target in (plain, scaled):
        (target / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
