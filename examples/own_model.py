"""Weights of one's own: a directory with config.json and safetensors, served like any other model.

You see the tokens that a tiny model with random weights answers to a prompt of token ids, and how
many parameters it has. Replace the random numbers by trained ones; the names are Hugging Face's.
A model that computes something else is a family: docs/extending.md.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pdjax import LLM, SamplingParams

V, L, D, F, N, K, H = 64, 2, 32, 64, 4, 2, 8  # vocabulary, layers, dims, heads, KV heads, head dim
config = {"model_type": "llama", "vocab_size": V, "num_hidden_layers": L, "hidden_size": D}
config |= {"intermediate_size": F, "num_attention_heads": N, "num_key_value_heads": K}
config |= {"max_position_embeddings": 256, "tie_word_embeddings": True, "eos_token_id": 0}
shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
for layer in range(L):
    at = f"model.layers.{layer}."
    shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
    shapes |= {
        at + "self_attn.q_proj.weight": (N * H, D),
        at + "self_attn.o_proj.weight": (D, N * H),
    }
    shapes |= {at + f"self_attn.{part}_proj.weight": (K * H, D) for part in "kv"}
    shapes |= {at + f"mlp.{part}_proj.weight": (F, D) for part in ("gate", "up")}
    shapes |= {at + "mlp.down_proj.weight": (D, F)}

chance, folder = np.random.default_rng(0), Path(tempfile.mkdtemp())
weights = {name: chance.normal(0, 0.3, each).astype(np.float32) for name, each in shapes.items()}
(folder / "config.json").write_text(json.dumps(config))
save_file(weights, folder / "model.safetensors")
with LLM("smollm2", {"model.source": folder, "decode.stages": 2}) as llm:
    [answer] = llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=8))
print(f"{sum(each.size for each in weights.values()):,} parameters answer", answer.token_ids)
