"""Make the fixtures of the GGUF parity tests with llama.cpp and transformers.

Made with Python 3.11, xllamacpp 2026.10.11549 (llama.cpp), transformers 5.24.0, torch 2.13.0,
tokenizers 0.23.1, sentencepiece 0.2.3 and gguf 0.19.0. In an environment with these and numpy,
safetensors and jinja2, run from the repository root:

    python -m tests.parity.make_gguf_fixtures

It writes `fixtures/gguf_tokens.json` (vocabularies and llama.cpp's token ids) and
`fixtures/gguf_logits.npz` (logits of the models in `gguf_models.py`, by transformers, and the last
position's log-probabilities by llama.cpp where it computes the same model).
"""

import io
import json
import subprocess
import sys
import tempfile
import unicodedata
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pdjax.text.gguf_pretokenizers import PRETOKENIZERS
from tests.helpers import tiny_models
from tests.helpers.nasty_strings import WRITTEN, random_strings
from tests.helpers.tiny_gguf import write_gguf
from tests.parity import gguf_models, gguf_tokenizers

CORPUS = WRITTEN * 3 + random_strings(4000, seed=1)
PACKAGES = ("xllamacpp", "transformers", "torch", "tokenizers", "sentencepiece", "gguf")


def train_merges() -> list[str]:
    """Train the merges of a byte-level BPE with tokens that span words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    found = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    unions: dict[str, str] = {}
    for merge in found:  # one merge a token, since the tests make the vocabulary from the merges
        unions.setdefault(merge.replace(" ", ""), merge)
    return list(unions.values())


def train_pieces() -> list[list[Any]]:
    """Train the pieces [text, score, type] of a SentencePiece BPE with byte fallback."""
    import sentencepiece

    written = io.BytesIO()
    lines = [line for text in CORPUS for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = []
    for index in range(model.vocab_size()):
        kind = 6 if model.is_byte(index) else 3 if model.is_control(index) else 1
        kind = 2 if model.is_unknown(index) else kind
        pieces.append([model.id_to_piece(index), round(model.get_score(index), 4), kind])
    return pieces


def ids_by_llama_cpp(metadata: dict[str, Any], strings: list[str]) -> list[list[int]]:
    """Get the token ids of strings from llama.cpp, with BOS and EOS as the metadata say."""
    config = dict(tiny_models.TINY_MODELS["llama"])
    tiny_models.TINY_MODELS["llama"]["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = write_gguf(Path(scratch) / "m.gguf", metadata=metadata)
            return _ask(path, "tokens", strings)
    finally:
        tiny_models.TINY_MODELS["llama"] = config


def _ask(path: Path, what: str, asked: Any) -> Any:
    """Get an answer from llama.cpp in another process, since llama.cpp may end its process."""
    command = [sys.executable, "-m", "tests.parity.make_gguf_fixtures", str(path), what]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.split("ANSWER", 1)[1].splitlines()[0])


def _serve(path: str, what: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = path, 512, 1, 0
    params.warmup, params.verbosity = False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(end: str, **asked: Any) -> Any:
        body = json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + end, body, headers)
        return json.load(urllib.request.urlopen(request))

    asked = json.load(sys.stdin)
    if what == "tokens":
        answer: Any = [
            post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            for text in asked
        ]
    else:
        size = len(gguf_models.TOKENS)
        found = post("/completion", prompt=asked, n_predict=1, n_probs=size, temperature=0.0)
        top = found["completion_probabilities"][0]["top_logprobs"]
        answer = [entry["logprob"] for entry in sorted(top, key=lambda entry: entry["id"])]
    print("ANSWER" + json.dumps(answer), flush=True)


def tokens() -> dict[str, Any]:
    """Make the fixture of token ids."""
    merges, pieces = train_merges(), train_pieces()
    asked = gguf_tokenizers.STRINGS + gguf_tokenizers.WITH_TOKENS
    by_kind: dict[Any, str] = {}
    for name, kind in PRETOKENIZERS.items():
        by_kind.setdefault(kind, name)
    ids = {}
    for kind, name in by_kind.items():
        # llama.cpp leaves out the composition of characters.
        texts = [unicodedata.normalize("NFC", text) if kind.composed else text for text in asked]
        ids[name] = ids_by_llama_cpp(gguf_tokenizers.byte_level(merges, name), texts)
    for name in PRETOKENIZERS:  # aliases must have the same ids in llama.cpp
        kind = PRETOKENIZERS[name]
        texts = [unicodedata.normalize("NFC", text) if kind.composed else text for text in asked]
        found = ids_by_llama_cpp(gguf_tokenizers.byte_level(merges, name), texts)
        assert found == ids[by_kind[kind]], name
    for variant in gguf_tokenizers.SENTENCEPIECE:
        metadata = gguf_tokenizers.sentencepiece(pieces, variant)
        ids[f"sentencepiece_{variant}"] = ids_by_llama_cpp(metadata, asked)
    versions = {name: version(name) for name in PACKAGES}
    return {"versions": versions, "merges": merges, "pieces": pieces, "ids": ids}


def logits() -> dict[str, np.ndarray]:
    """Make the fixture of logits: NAME f32[T, V] by transformers, NAME.llama_cpp f32[V]."""
    import torch
    from transformers import AutoModelForCausalLM

    made = {}
    for name, model in gguf_models.MODELS.items():
        ids = gguf_models.token_ids()
        with tempfile.TemporaryDirectory() as scratch:
            directory = gguf_models.write_hugging_face(name, Path(scratch) / "hf")
            network = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.inference_mode():
                made[name] = network(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
            if model.same_in_llama_cpp:
                path = gguf_models.write(name, Path(scratch) / "m.gguf")
                made[f"{name}.llama_cpp"] = np.float32(_ask(path, "logits", ids.tolist()))
    return made


def main() -> None:
    """Write both fixtures."""
    if len(sys.argv) == 3:
        _serve(*sys.argv[1:])
        return
    made: dict[str, Any] = logits()
    np.savez_compressed(gguf_models.FIXTURE, **made)
    text = json.dumps(tokens(), ensure_ascii=True, separators=(",", ":"))
    gguf_tokenizers.FIXTURE.write_text(text.replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
