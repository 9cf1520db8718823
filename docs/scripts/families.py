"""Writes the tables of families in docs/models.md from the registry, the docstrings of the
families' modules, and the models that tests compare with other systems.

python -m docs.scripts.families
"""

import inspect
import re
import sys
from pathlib import Path

from pdjax.device.models.family import ModelFamily
from pdjax.device.models.registry import FAMILIES
from tests.helpers.tiny_models import TINY_MODELS
from tests.parity import family_tokens, gguf_models

PAGE = Path(__file__).resolve().parent.parent / "models.md"
COLUMNS = "family", "`model_type`", "GGUF `general.architecture`", "what it computes"
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


CHECKS = "family", "Hugging Face, float32", "GGUF, float32", "bfloat16", "CPU", "Hopper", "TPU"
_OTHERWISE = {
    "llama": "logits, also staged; SmolLM2's tokens",
    "qwen2": "logits, also staged",
    "qwen2_moe": "logits, also staged",
}
"""Of families without a model in tests/parity/family_tokens.py: tests/parity/test_smollm2.py, and
test_tiny_models.py there."""
CHECKS_HEAD = f"| {' | '.join(CHECKS)} |\n|{'---|' * len(CHECKS)}\n"


def table() -> str:
    """What families are: a row for each that this project ships."""
    return HEAD + "\n".join(map(_row, _shipped())) + "\n"


def checks() -> str:
    """What they are checked against, and where."""
    return CHECKS_HEAD + "\n".join(map(_checks, _shipped())) + "\n"


def page() -> str:
    """The text of the page with the tables as they have to be."""
    text = PAGE.read_text("utf-8")
    for head, made in ((HEAD, table()), (CHECKS_HEAD, checks())):
        start = text.index(head)
        text = text[:start] + made + text[text.index("\n\n", start) + 1 :]
    return text


def _shipped() -> list[ModelFamily]:
    return [family for family in FAMILIES.values() if type(family).__module__ in _modules()]


def _checks(family: ModelFamily) -> str:
    own = [name for name, config in TINY_MODELS.items() if config["model_type"] == family.name]
    assert own, f"{family.name}: no model in tests/helpers/tiny_models.py"
    tokens = any(name in family_tokens.MODELS for name in own)
    models = gguf_models.MODELS.values()
    files = [each for each in models if each.weights in own and each.arch == family.gguf]
    by_llama = any(model.same_in_llama_cpp for model in files)
    compared = "logits; llama.cpp, too" if by_llama else "logits" if files else "read"
    without = [
        *(["GeGLU"] if getattr(family, "activation", "silu") != "silu" else []),
        *(["products with experts"] if family.experts else []),
    ]
    cells = (
        _said(family)["name"],
        "logits, tokens" if tokens else _OTHERWISE[family.name],
        "none" if family.gguf is None else compared,
        "runs",
        "tested",
        f"kernels, but for {' and '.join(without)}" if without else "kernels",
        "kernels of attention, lowered",
    )
    return f"| {' | '.join(cells)} |"


def _modules() -> set[str]:
    return {name for name in sys.modules if name.startswith("pdjax.device.models.")}


def _said(family: ModelFamily) -> re.Match[str]:
    """What the docstring of a family's module says: its name, and what it computes."""
    doc = inspect.getdoc(sys.modules[type(family).__module__]) or ""
    about = " ".join(doc.split("\n\n")[0].split())
    said = re.match(
        r"The (?P<name>.+?) family(?P<of> of text models)?[^:]*: (?P<what>.+?)\.( |$)", about
    )
    assert said is not None, f"{type(family).__module__}: 'The NAME family ...: WHAT.', not {about}"
    return said


def _row(family: ModelFamily) -> str:
    said, gguf = _said(family), f"`{family.gguf}`" if family.gguf else ""
    cells = said["name"], f"`{family.name}`", gguf, said["what"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
