"""The command that serves with vLLM, where it is installed: random weights in a model's shapes."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdjax.core.model_spec import ModelSpec


def installed() -> bool:
    """Whether the program `vllm` is there."""
    return shutil.which("vllm") is not None


@contextmanager
def serve_command(spec: ModelSpec, longest: int, replicas: int) -> Iterator[str]:
    """A command with `{port}` in it, and the folder that it names, until the context ends.

    As pdjax's rival is: chunked prefill, prefix caching, CUDA graphs, whatever this version does
    unless told otherwise. Prompts are token ids, so that it needs no tokenizer.

    Args:
      spec: the model's shapes; plain Llama alone.
      longest: tokens of the longest sequence.
      replicas: data-parallel engines of a GPU each, behind one port.

    Raises:
      ValueError: a model that is no plain Llama.
    """
    if spec.family != "llama":
        raise ValueError(f"model.spec: family={spec.family!r}; vLLM is given plain Llama alone")
    with tempfile.TemporaryDirectory(prefix="pdjax-vllm-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(llama_config(spec)), "utf-8")
        words = ["vllm", "serve", folder, "--host=127.0.0.1", "--port={port}"]
        words += ["--load-format=dummy", "--dtype=bfloat16", "--skip-tokenizer-init"]
        words += [f"--max-model-len={longest}", f"--data-parallel-size={replicas}"]
        yield shlex.join(words)


def llama_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of Hugging Face transformers that has these shapes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.model_dim,
        "intermediate_size": spec.mlp_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.query_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context,
        "rope_theta": spec.rope.theta,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": "bfloat16",
    }
