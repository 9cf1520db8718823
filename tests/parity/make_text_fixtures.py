"""Make the fixture of the parity tests of templates and tokenizers with Hugging Face transformers.

Made with Python 3.11, transformers 5.24.0, tokenizers 0.23.3, Jinja 3.1.6 and sentencepiece 0.2.3
(the versions are also written into `fixtures/text.json`). In an environment with these, run from
the repository root:

    python -m tests.parity.make_text_fixtures
"""

import datetime
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers.utils.chat_template_utils as template_utils
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from tests.parity import chat_cases, text_results, tokenizer_cases, tool_cases

FIXTURE = Path(__file__).parent / "fixtures" / "text.json"
PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece")


class _Clock:
    @staticmethod
    def now() -> datetime.datetime:
        return chat_cases.NOW


def templates() -> dict[str, str]:
    """Make a digest of each rendering, or "refused"."""
    template_utils.datetime = _Clock  # so that `strftime_now` always prints the same
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **chat_cases.SPECIAL_TOKENS)
    found = {}
    for name, source in chat_cases.TEMPLATES.items():
        for case, conversation in chat_cases.CONVERSATIONS.items():
            arguments = {"add_generation_prompt": True, **conversation}
            messages = arguments.pop("messages")
            variables = arguments.pop("chat_template_kwargs", {})
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, **arguments, **variables
                )
            except Exception:  # a template is a program that may raise any exception
                found[f"{name}/{case}"] = "refused"
            else:
                found[f"{name}/{case}"] = text_results.digest(text)
    return found


def tools() -> dict[str, str]:
    """Make a digest of each function's schema, keys in order, or "refused"."""
    found = {}
    for function in tool_cases.FUNCTIONS:
        try:
            schema = json.dumps(get_json_schema(function))
        except Exception:  # transformers raises exceptions of several classes
            found[function.__qualname__] = "refused"
        else:
            found[function.__qualname__] = text_results.digest(schema)
    return found


def tokenizers() -> dict[str, Any]:
    """Collect the named tokens of each directory, and digests of its tokenizer's ids and texts."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, files in tokenizer_cases.directories().items():
            found[name] = _tokenizer(tokenizer_cases.write(files, Path(scratch) / name))
    return found


def _tokenizer(directory: Path) -> dict[str, Any]:
    loaded = AutoTokenizer.from_pretrained(str(directory))

    def encode(text: str, around: bool) -> list[int]:
        return loaded(text, add_special_tokens=around)["input_ids"]

    def decode(ids: list[int], skip: bool) -> str:
        return loaded.decode(ids, skip_special_tokens=skip)

    return {
        "special_tokens": loaded.special_tokens_map,
        "added": text_results.digest(text_results.added_tokens(loaded.backend_tokenizer)),
        "strings": text_results.cut(encode, decode),
    }


def main() -> None:
    """Write the fixture."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    content: dict[str, Any] = {"versions": versions, "templates": templates(), "tools": tools()}
    content["tokenizers"] = tokenizers()
    text = json.dumps(content, separators=(",", ":"))
    FIXTURE.write_text(text.replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main()
