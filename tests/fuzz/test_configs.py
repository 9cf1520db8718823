"""For any overrides, config file or command line, the answer within a second is a Config, or one
line that names the wrong field."""

import contextlib
import dataclasses
import io
import random
from functools import partial
from typing import Any

import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, KVConfig
from pdjax.config.load import load_config
from pdjax.flags import config_of, new_flags, status
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import DecodePipeline
from tests.helpers.mutate import BadRepr, answer, cases, check_message, integer, ring, text, value


def names(config: Any = None, above: str = "") -> list[str]:
    """List the dotted names of all fields."""
    config = config or Config()
    found = []
    for field in dataclasses.fields(config):
        current = getattr(config, field.name)
        found.append(above + field.name)
        if dataclasses.is_dataclass(current):
            found += names(current, f"{above}{field.name}.")
    return found


NAMES = names()


def a_name(draw: random.Random) -> Any:
    if draw.random() < 0.85:
        return draw.choice(NAMES)
    odd = (
        *(
            "",
            ".",
            "decode.",
            ".rows",
            "decode..rows",
            "decode.rows.x",
            "__class__",
            "decode.__dict__",
        ),
        *(
            "a" * 10_000,
            "a." * 5_000,
            "größe",
            "decode.r\u00f6ws",
            "\ud800",
            "a b",
            "a\nb",
            3,
            None,
        ),
        *((1, 2), text(draw)),
    )
    return draw.choice(odd)


def a_value(draw: random.Random) -> Any:
    if draw.random() < 0.3:
        return draw.choice((KVConfig(), DecodeConfig(rows=2), Config(), KVConfig, *range(1, 5)))
    if draw.random() < 0.3:
        return integer(draw)
    return value(draw)


def overrides(draw: random.Random) -> dict[Any, Any]:
    return {a_name(draw): a_value(draw) for _ in range(draw.randint(1, 4))}


def deal(config: Config, draw: random.Random) -> None:
    """Do the work on a config that comes before any device is used."""
    context = config.model.max_model_len or draw.choice((512, 8192, 131_072, 2**24))
    buckets = Buckets.of(config.prefill, None, config.kv.page_size, context)
    tables = Buckets.of(None, config.decode, config.decode_page_size, context)
    assert len(list(buckets.prefill_shapes())) <= 1024
    assert config.devices <= 1024
    if config.decode.rows * tables.table_pages[-1] < 2**22:
        DecodePipeline(config.decode.stages, config.decode.rows, tables)


def test_overrides():
    seen = set()
    for seed in cases(330):
        draw = random.Random(seed)
        given = overrides(draw)
        try:
            config = answer(partial(load_config, "smollm2", given))
            if isinstance(config, Config):
                answer(partial(deal, config, draw))
        except BaseException as error:
            raise AssertionError(f"seed {seed}, overrides {list(given)}: {error!r}") from error
        seen.add(type(config))
    assert seen == {Config, str}


def a_file(draw: random.Random) -> bytes:
    """Write a config file, which most often does something wrong."""
    returned = draw.choice(
        (
            "Config()",
            "Config",
            "None",
            f"Config(seed={draw.choice((0, -1, 2**40, 'None', '1e999'))})",
            f"Config(decode=DecodeConfig(rows={draw.choice((1, 0, 10**12, True, '{}'))}))",
            f"replace(Config(), {draw.choice(('seed', 'x', 'kv', 'decode'))}={draw.randint(0, 9)})",
        )
    )
    before = draw.choice(
        (
            *(
                "",
                "print('hello')",
                "import sys; sys.exit(3)",
                "raise KeyError",
                "raise SystemExit",
            ),
            *("raise RecursionError", "raise MemoryError", "raise GeneratorExit", "1 / 0", "x ="),
            *("def f(): f()\n    f()", "raise ValueError", "raise ValueError('a\\nb' * 9999)"),
            *(
                "class E(Exception):\n        __str__ = None\n    raise E",
                "raise BaseException('a\\nb')",
            ),
            "raise ExceptionGroup('many', [ValueError('one')])",
        )
    )
    imports = "from dataclasses import replace\nfrom pdjax.config import *\n"
    body = f"{imports}def get_config():\n    {before}\n    return {returned}\n"
    odd = (body.encode("utf-16"), b"\xff\xfe\x00", b"", b"\x00", b"get_config = 3\n", b"# \xff\n")
    return draw.choice(odd) if draw.random() < 0.15 else body.encode()


def test_files(tmp_path, capsys):
    seen = set()
    for seed in cases(120):
        draw = random.Random(seed)
        file = tmp_path / f"config_{seed}.py"
        file.write_bytes(a_file(draw))
        config = answer(partial(load_config, file))
        seen.add(type(config))
        file.unlink()
    assert seen == {Config, str}
    assert capsys.readouterr().out == ""  # stdout is for results; a file's prints go to stderr


def a_flag(draw: random.Random) -> list[str]:
    name, given = a_name(draw), draw.choice((text(draw), str(draw.randint(-1, 20)), "(8,)"))
    return draw.choice(
        (
            [f"--config.{name}={given}"],
            [f"--config.{name}", given],
            [f"-config.{name}={given}"],
            [f"--config.{name}"],
            [f"--config={given}"],
            [f"--{given}"],
            [given],
            ["--traceback=maybe"],
            [f"--flagfile={given}"],
        )
    )


def test_command_lines():
    values = new_flags(config="smollm2")

    def main() -> None:
        config_of(values)

    seen = set()
    for seed in cases(250):
        draw = random.Random(seed)
        argv = ["program", *(arg for _ in range(draw.randint(1, 3)) for arg in a_flag(draw))]
        screen = io.StringIO()
        with contextlib.redirect_stderr(screen):
            code = answer(partial(status, main, values, "usage", argv))
        assert code in (0, 2), (seed, argv, code)
        if code == 2:
            check_message(screen.getvalue().removesuffix("\n"))
        seen.add(code)
    assert seen == {0, 2}


# Input that fuzzing found, each as a test of its own.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decode.rows": {}}, "decode.rows={}: must be int"),
        ({"decode": {"rows": {}}}, "decode.rows={}: must be int"),
        ({"decode.rows": 10**12}, "decode.rows=1000000000000: must be at most 65536"),
        ({"kv.page_size": 2**40}, "kv.page_size=1099511627776: must be at most 65536"),
        ({"decode.engines": 10**6}, "decode.engines=1000000: must be at most 1024"),
        ({"decode.engines": 1000, "prefill.engines": 1000}, "their meshes need 2000 devices"),
        ({"seed": 10**5000}, "seed=<integer of 16610 bits>: must be in"),
        ({"handoff.lease": float("nan")}, "handoff.lease=nan: must be None or above 0"),
        ({"handoff.deadline": float("inf")}, "handoff.deadline=inf: must be at most"),
        ({"handoff.retries": 10**12}, "handoff.retries=1000000000000: must be at most 1000"),
        ({"prefill.pages": 2**31}, "prefill.pages=2147483648: must be at most"),
        (
            {"prefill.pages": 2**28},
            "prefill.pages=268435456: must be at most 134217727 pages of 16",
        ),
        ({"prefill.page_buckets": tuple(range(1, 99))}, "98 sizes; must be at most 32"),
        ({"prefill.page_buckets": (2**40,)}, "must be at most 1073741824"),
        ({"prefill.page_buckets": ("a", 1)}, "must be whole numbers"),
        ({"decode.rows": "(" * 1000}, "decode.rows='((("),
        ({"decode.rows": "-" * 1500}, "decode.rows='---"),
        ({"decode.rows": "{[]: 1}"}, "decode.rows='{[]: 1}': must be int"),
        ({"decode.rows": "9" * 9999}, "must be at most 2000 characters"),
        ({"decode.rows": BadRepr()}, "decode.rows=<BadRepr"),
        ({"decode.rows": np.zeros((2, 2))}, "decode.rows=array"),
        ({"model.source": np.zeros(3)}, "model.source=array"),
        ({3: 4}, "3: must be the name of a field"),
        ({"decode": {3: 4}}, "3: must be the name of a field"),
        ({"": 1}, "'': no such field"),
        ({"decode..rows": 1}, "'decode.': no such field"),
        ({"decode.\n": 1}, r"'decode.\n': no such field"),
        ({"decode.__class__": 1}, "decode.__class__: no such field"),
        ({"a." * 5000: 1}, "no such field"),
        ({"decode": ring()}, "no such field"),
        ({"compilation_cache": "a\x00b"}, "compilation_cache='a\\x00b': must be a directory"),
    ],
)
def test_odd_overrides_are_refused_by_name(given, message):
    said = answer(lambda: load_config("smollm2", given))
    assert isinstance(said, str) and message in said, said


@pytest.mark.parametrize(
    "source", [3, None, b"smollm2", "x" * 5000 + ".py", "a\x00.py", "\ud800.py"]
)
def test_odd_sources_are_refused(source):
    assert str(answer(lambda: load_config(source))).startswith("config=")


@pytest.mark.parametrize("given", [[("seed", 1)], "seed=1", 3])
def test_overrides_are_a_mapping(given):
    assert str(answer(lambda: load_config("smollm2", given))).startswith("overrides=")


def test_what_a_file_does_is_its_own_business(tmp_path):
    def loaded(source: str) -> Any:
        (tmp_path / "config.py").write_text(source)
        return answer(lambda: load_config(tmp_path / "config.py"))

    assert "SystemExit: 3" in loaded("import sys\nsys.exit(3)\n")
    assert "RecursionError" in loaded("def get_config():\n    return get_config()\n")
    assert len(loaded("raise ValueError('long\\n' * 9999)\n")) < 500
    (tmp_path / "folder.py").mkdir()
    assert "no such Python file" in str(answer(lambda: load_config(tmp_path / "folder.py")))
    (tmp_path / "config.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):  # it may be the user's Ctrl-C
        load_config(tmp_path / "config.py")


def test_overrides_are_left_as_they_are():
    mine = {"decode": {"rows": 4}, "decode.lookahead": 2}
    config = load_config("smollm2", mine)
    assert (config.decode.rows, config.decode.lookahead) == (4, 2)
    assert mine == {"decode": {"rows": 4}, "decode.lookahead": 2}


@pytest.mark.parametrize(
    ("rows", "context", "message"),
    [
        (
            65_536,
            131_072,
            "decode.rows=65536: must be at most 2048 with model.max_model_len=131072",
        ),
        (8, 2**31, "model.max_model_len=2147483648: must be at most"),
    ],
)
def test_tables_that_no_host_could_hold_are_refused(rows, context, message):
    config = Config(decode=DecodeConfig(rows=rows))
    said = answer(lambda: Buckets.of(config.prefill, config.decode, 16, context))
    assert message in said
