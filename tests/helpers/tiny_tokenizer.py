"""Writes a tokenizer directory with bytes as its tokens."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
USER = [{"role": "user", "content": "hi"}]


def write_directory(path: Path, config: dict[str, Any], template: str | None = None) -> Path:
    backend = Backend(models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path
