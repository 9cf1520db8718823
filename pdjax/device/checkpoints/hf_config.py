"""`config.json` of a Hugging Face directory -> ModelSpec, refusing what this project does not
compute.

A field that changes the arithmetic is either honoured or refused by name: a model that loads and
answers almost right is the worst outcome. The family that the file's model type names reads it.
"""

from dataclasses import replace
from pathlib import Path

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.registry import FAMILIES
from pdjax.formats.json_file import read_json
from pdjax.text.end_tokens import stated_end_token_ids

CONFIG_FILE = "config.json"


def read_config(directory: Path) -> Fields:
    """The fields of `config.json` in `directory`.

    Raises:
      ValueError: the file is missing or no JSON object.
    """
    return Fields(f"{directory / CONFIG_FILE}:", read_json(directory / CONFIG_FILE))


def read_spec(directory: Path) -> ModelSpec:
    """The architecture that `config.json` in `directory` describes.

    Raises:
      ValueError: naming the field that is missing, malformed or not supported, its value, and what
        is allowed.
    """
    config = read_config(directory)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise config.refuse("model_type", ", ".join(FAMILIES))
    ends = stated_end_token_ids(directory)
    try:
        return replace(FAMILIES[kind].spec(config), eos_token_ids=ends)
    except ValueError as error:
        if str(error).startswith(config.where):
            raise
        raise ValueError(f"{config.where} {error}") from error
