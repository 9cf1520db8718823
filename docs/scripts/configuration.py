"""Writes docs/configuration.md from the docstrings of the config's dataclasses.

python docs/scripts/configuration.py
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from pdjax.config import Config
from pdjax.config.presets import PRESETS

PAGE = Path(__file__).resolve().parent.parent / "configuration.md"

HEAD = """\
# Configuration

*Written by `docs/scripts/configuration.py` from the docstrings of `pdjax/config/`; change those.*

A run is described by one `Config`: frozen dataclasses that check their fields when they are made.
An error names the field, its value and what is allowed.

`LLM(config, overrides)` and `--config=` take a preset's name ({presets}), a
Python file with `get_config() -> Config`, or, from Python, a `Config`. Any field can be overridden
by its dotted name:

```python
from pdjax import load_config

config = load_config("smollm2", {{"decode.rows": 16, "handoff.layer_groups": 2}})
print(config.decode.rows, config.handoff.layer_groups, config.devices)
```

```output
16 2 2
```

From a shell the same are `--config.decode.rows=16 --config.handoff.layer_groups=2`; what is true or
false is `--config.kv.prefix_cache` or `--noconfig.kv.prefix_cache`. An override of
`model.source` resets `model.max_model_len` and the page buckets, which suit the config's own model
only. `configs/` has set-ups to start from.
"""


def page() -> str:
    """The text of the page."""
    names = ", ".join(f"`{name}`" for name in PRESETS)
    parts = [HEAD.format(presets=names)]
    parts += _section("", Config, "Config")
    for field in dataclasses.fields(Config):
        made = getattr(Config(), field.name)
        if dataclasses.is_dataclass(made):
            parts += _section(f"{field.name}.", type(made), type(made).__name__)
    return "\n".join(parts).rstrip() + "\n"


def _section(prefix: str, kind: Any, name: str) -> list[str]:
    intro, about, rest = _described(kind)
    out = [f"## `{prefix.rstrip('.') or 'config'}`: {name}", "", intro, ""]
    out += ["| field | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        value = getattr(kind(), field.name)
        if dataclasses.is_dataclass(value):
            continue  # a part, with a section of its own
        text = about[field.name].replace("|", "\\|")
        out.append(f"| `{prefix}{field.name}` | `{value!r}` | {text} |")
    return [*out, "", *([rest, ""] if rest else [])]


def _described(kind: Any) -> tuple[str, dict[str, str], str]:
    """A docstring's introduction, the text of each of its attributes, and what follows them.

    Raises:
      ValueError: a field that the docstring does not describe.
    """
    doc = inspect.getdoc(kind) or ""
    intro, _, body = doc.partition("Attributes:\n")
    about: dict[str, str] = {}
    names: list[str] = []
    rest: list[str] = []
    for line in body.split("\n"):
        head = re.match(r"  ((?:\w+)(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            about |= dict.fromkeys(names, head[2])
        elif line.startswith("    "):
            about |= {name: f"{about[name]} {line.strip()}" for name in names}
        else:
            rest.append(line)
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in about]
    if missing:
        raise ValueError(f"{kind.__name__}: its docstring does not describe {', '.join(missing)}")
    return intro.strip(), about, "\n".join(rest).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
