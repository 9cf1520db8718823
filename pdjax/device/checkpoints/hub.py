"""A model of the Hugging Face Hub, by its id: from this machine's cache, else over the network.

Only the files are fetched that loading reads. Each question to the network has a time limit, so
that a machine without one gets an answer.
"""

import queue
import re
import threading
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, TypeVar

from pdjax.core.messages import one_line
from pdjax.device.checkpoints.hf_config import CONFIG_FILE
from pdjax.device.checkpoints.hf_shards import (
    EXPLICIT,
    INDEX_FILE,
    INDEX_SUFFIX,
    SINGLE_FILE,
)
from pdjax.formats.json_file import read_json

Answer = TypeVar("Answer")

SECONDS = 5.0
"""How long a connection to the Hub may be silent."""

PATIENCE = 10.0
"""Seconds for the first question to the Hub. Looking up a name has no time limit of its own."""

COMPANIONS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside the weights that loading reads, of which a repository may lack any but the first."""

TEMPLATES = "additional_chat_templates/"
"""A folder of chat templates that have names."""

_ID = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


def hub_id(source: str) -> tuple[str, str | None] | None:
    """Repository and revision if `source` has the form ORGANISATION/NAME[@REVISION], else None."""
    found = _ID.fullmatch(source)
    if found is None or ".." in source or "--" in found["repository"]:
        return None
    return found["repository"], found["revision"]


def fetch_from_hub(repository: str, revision: str | None, endpoint: str | None = None) -> Path:
    """A directory with the model's files.

    What the cache of huggingface_hub holds completely is used without asking the network; the
    cache's own `main` is then the newest that is known. `HF_HOME`, `HF_HUB_CACHE`,
    `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_TOKEN` mean what they mean to huggingface_hub.

    Raises:
      ValueError: neither the cache nor the network has the model; says why.
    """
    name = repository if revision is None else f"{repository}@{revision}"
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    cached = None
    try:
        cached = _cached(repository, revision)
        if cached is not None and not _missing(cached):
            return cached
        _refuse_offline()
        api = huggingface_hub.HfApi(endpoint=endpoint)
        info = _in_time(lambda: api.model_info(repository, revision=revision, timeout=SECONDS))
        listed = {sibling.rfilename for sibling in info.siblings or ()}
        wanted = _needed(listed)
        while wanted:  # config.json may name an index, and that its shards
            directory = Path(
                huggingface_hub.snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=wanted,
                    etag_timeout=SECONDS,
                    endpoint=endpoint,
                )
            )
            absent = {name for name in _weights(directory) if not (directory / name).is_file()}
            wanted = sorted((absent & listed).difference(wanted))
    except HfHubHTTPError as error:
        raise _refusal(name, cached, _status(error)) from error
    except Exception as error:  # the transport below has exceptions of its own
        raise _refusal(name, cached, one_line(error)) from error
    missing = _missing(directory)
    if missing:
        raise ValueError(f"model={name!r}: the repository holds no {missing}")
    return directory


def _in_time(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns or raises, if it does so within PATIENCE."""
    outcomes: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def put() -> None:
        try:
            outcomes.put(ask())
        except Exception as error:
            outcomes.put(error)

    # A daemon, so that a name that is still being looked up doesn't keep the process.
    threading.Thread(target=put, name="hub", daemon=True).start()
    try:
        outcome = outcomes.get(timeout=PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"the Hub has not answered within {PATIENCE:g} s") from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _refuse_offline() -> None:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE forbids to ask the network")


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    code = int(getattr(response, "status_code", 0))
    reasons = {
        401: "there is no such public model; set HF_TOKEN if it is private or gated",
        403: "access is denied; accept the model's terms and set HF_TOKEN",
        404: "there is no such model or revision",
    }
    return reasons.get(code, f"the Hub answers {code}: {one_line(error)}")


def _refusal(name: str, cached: Path | None, reason: str) -> ValueError:
    has = "the cache does not have it" if cached is None else f"the cache lacks {_missing(cached)}"
    return ValueError(
        f"model={name!r}: is no local path, {has}, and it cannot be fetched ({reason})"
    )


def _cached(repository: str, revision: str | None) -> Path | None:
    """The directory of this revision in the cache, whatever it holds."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, CONFIG_FILE, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _missing(directory: Path) -> str:
    """The first file that a complete directory would have; empty if there is none."""
    if not (directory / CONFIG_FILE).is_file():
        return CONFIG_FILE
    absent = [name for name in _weights(directory) if not (directory / name).is_file()]
    return f"{SINGLE_FILE} or {INDEX_FILE}" if absent[:1] == [INDEX_FILE] else "".join(absent[:1])


def _weights(directory: Path) -> list[str]:
    """Files of weights that loading reads, as far as the files that are there name them."""
    first = read_json(directory / CONFIG_FILE).get(EXPLICIT)
    if not isinstance(first, str):
        first = SINGLE_FILE if (directory / SINGLE_FILE).is_file() else INDEX_FILE
    if not first.endswith(INDEX_SUFFIX) or not (directory / first).is_file():
        return [first]
    weight_map = read_json(directory / first).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    return [first, *sorted({name for name in shards if isinstance(name, str)})]


def _needed(known: Set[str]) -> list[str]:
    """Of a repository's files, those that loading reads whatever they hold."""
    if CONFIG_FILE not in known:
        raise ValueError(
            f"the repository holds no {CONFIG_FILE}, so no model of a kind that is read"
        )
    weights = {SINGLE_FILE} & known
    if not weights:
        shards = {name for name in known if re.fullmatch(r"model-[^/]*\.safetensors", name)}
        weights = ({INDEX_FILE} & known) | shards
    if not weights and not any(name.endswith(".safetensors") for name in known):
        raise ValueError("the repository holds no safetensors")
    templates = {name for name in known if name.startswith(TEMPLATES) and name.endswith(".jinja")}
    return sorted(weights | templates | (known & set(COMPANIONS)))
