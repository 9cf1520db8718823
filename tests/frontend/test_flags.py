"""Command lines: overrides of any config field, help, and one line for bad input."""

import subprocess
import sys

import pytest
from absl import flags, logging

from pdjax.flags import config_of, describe, new_flags, status


@pytest.fixture
def values() -> flags.FlagValues:
    values = new_flags(config="smollm2")
    flags.DEFINE_integer("max_tokens", 16, "most tokens", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "ends it", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32"], "precision", flag_values=values)
    return values


def run(values: flags.FlagValues, *args: str, main=lambda: None) -> int:
    return status(main, values, "Says what it does.", ["/bin/program", *args])


def test_overrides_of_any_field(values):
    args = ["--config.decode.rows=12", "--config.decode.stages", "3", "-config.kv.page_size=4"]
    args += ["--config.model.source=a=b.gguf", "--config.prefill.token_buckets=(64, 512)"]
    assert run(values, *args) == 0
    config = config_of(values)
    assert (config.decode.rows, config.decode.stages, config.kv.page_size) == (12, 3, 4)
    assert config.model.source == "a=b.gguf"
    assert config.prefill.token_buckets == (64, 512)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config.kv.prefix_cache", "--max_tokens=3"], True),
        (["--config.kv.prefix_cache=true", "--max_tokens=3"], True),
        (["--config.kv.prefix_cache=1", "--max_tokens=3"], True),
        (["--config.kv.prefix_cache", "--noconfig.kv.prefix_cache", "--max_tokens=3"], False),
        (["--config.kv.prefix_cache=False", "--max_tokens", "3"], False),
    ],
)
def test_booleans_are_written_as_absl_writes_them(values, args, expected):
    assert run(values, *args) == 0
    assert config_of(values).kv.prefix_cache is expected
    assert values["max_tokens"].value == 3


def test_one_size_is_a_tuple_of_one(values):
    assert run(values, "--config.prefill.token_buckets=512") == 0
    assert config_of(values).prefill.token_buckets == (512,)


def test_verbosity_is_that_of_absl(values):
    before = logging.get_verbosity()
    assert run(values, "--verbosity=1", main=lambda: logging.get_verbosity()) == 1
    assert run(values, main=lambda: -logging.get_verbosity()) == 1
    logging.set_verbosity(before)


def test_a_field_does_not_swallow_the_next_flag(values, capsys):
    assert run(values, "--config.decode.rows", "--max_tokens=3") == 2
    assert "--config.decode.rows: needs a value" in capsys.readouterr().err


def test_the_last_override_of_a_field_holds(values):
    assert run(values, "--config.seed=1", "--config.seed=2") == 0
    assert config_of(values).seed == 2


def test_config_names_a_file(values, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text("from pdjax.config import Config\ndef get_config(): return Config(seed=7)\n")
    assert run(values, f"--config={file}") == 0
    assert config_of(values).seed == 7


def test_names_may_have_dashes_and_values_keep_theirs(values):
    assert run(values, "--max-tokens=3", "--stop=a-b", "--stop", "c") == 0
    assert values["max_tokens"].value == 3
    assert values["stop"].value == ["a-b", "c"]


def test_each_command_line_starts_from_the_defaults(values):
    assert run(values, "--max_tokens=3", "--stop=a") == 0
    assert run(values) == 0
    assert values["max_tokens"].value == 16
    assert values["stop"].value == []


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--config.decode.row=3", "program: decode.row: no such field; DecodeConfig has engines"),
        ("--config.decode.rows=many", "program: decode.rows='many': must be int"),
        ("--config.decode.rows=0", "decode.rows=0: must be at least 1"),
        ("--config.seed", "--config.seed: needs a value"),
        ("--noconfig.seed", "--noconfig.seed: a field that is true or false is negated"),
        ("--noconfig.kv.prefix_cache=1", "is negated without a value"),
        ("--config=no_such.py", "config='no_such.py': no such Python file"),
        ("--max_token=3", "'max_token'"),
        ("--max_tokens=x", "max_tokens=x"),
        ("--dtype=int8", "<float32>"),
        ("--model=a", "--model: no such flag; did you mean --config.model.source or"),
        ("--tp=2", "--tp: no such flag; did you mean --config.prefill.tp or --config.decode.tp?"),
        ("--nothing=2", "Unknown command line flag 'nothing'"),
        ("loose", "'loose': not a flag; each is written --NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_status_2(values, capsys, arg: str, message: str):
    assert run(values, arg, main=lambda: config_of(values) and None) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("program: ")
    assert message in err
    assert err.count("\n") == 1


def test_traceback_on_demand(values):
    with pytest.raises(ValueError, match="must be at least 1"):
        run(values, "--traceback", "--config.seed=-1", "--config.decode.rows=0",
            main=lambda: config_of(values) and None)  # fmt: skip


def test_a_bug_is_not_dressed_up_as_bad_input(values):
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(values, main=main)


def test_status_of_main_and_of_an_interrupt(values, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run(values, main=lambda: 1) == 1
    assert run(values, main=interrupted) == 130
    assert capsys.readouterr().err == "program: interrupted\n"


def test_help_lists_flags_and_runs_nothing(values, capsys):
    assert run(values, "--nonsense", "--help", main=lambda: 1) == 0
    page = capsys.readouterr().out
    assert page == describe(values, "Says what it does.") + "\n"
    assert page.startswith("Says what it does.\n\nFlags:\n")
    for line in ("--max_tokens=INT", "--dtype=ENUM", "--config.FIELD=VALUE", "--[no]traceback"):
        assert f"  {line}\n" in page
    assert "(default: 16)" in page
    assert "undefok" not in page


@pytest.mark.smoke
def test_a_program_ends_with_its_status():
    program = (
        "from pdjax.flags import *; import sys\n"
        "run(lambda: 3, new_flags(config='smollm2'), 'usage', ['prog', *sys.argv[1:]])"
    )
    for args, expected in (["--config.seed=1"], 3), (["--config.sed"], 2):
        ran = subprocess.run(
            [sys.executable, "-c", program, *args], capture_output=True, text=True, check=False
        )
        assert ran.returncode == expected, ran.stderr
        assert "Traceback" not in ran.stderr


@pytest.mark.smoke
def test_a_second_interrupt_ends_a_program_at_once():
    program = (
        "from pdjax.flags import *; import atexit, os, signal, time\n"
        "def main():\n"
        "    print('so far')\n"
        "    raise KeyboardInterrupt\n"
        "atexit.register(time.sleep, 60)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "run(main, new_flags(), 'usage', ['prog'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "so far\n", "prog: interrupted\n")
