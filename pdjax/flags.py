"""Command lines: absl flags, a config with overrides of any field, help, and errors in one line.

Every program of this project takes `--config=FILE` and, for any field of the config, an override
such as `--config.decode.rows=8`; a boolean is written as absl's are, `--config.kv.prefix_cache` or
`--noconfig.kv.prefix_cache`. (`ml_collections.config_flags` would read the same command lines, but
it assigns field by field to one object: our configs are frozen, and check all of their fields
together.) A program has its own flags (`new_flags`) and adds none to absl's
global ones, so that any number of programs can be imported side by side.
"""

import contextlib
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging

from pdjax.config import Config
from pdjax.config.load import is_switch, load_config
from pdjax.config.names import fields_called
from pdjax.config.presets import PRESETS
from pdjax.core.messages import shown

_FIELD = "config.FIELD"
_INTERRUPTED = 130
_MOST_CHARACTERS = 1500
"""Most characters of a message, which may quote a whole value or the name of a file."""
_HELP = {"-h", "--help", "-help", "--helpshort", "--helpfull"}


def new_flags(config: str | None = None) -> flags.FlagValues:
    """Make the flags that every program has.

    Args:
      config: default of `--config`; None leaves out `--config` and its fields.

    A program adds its own flags with absl's `DEFINE_...(..., flag_values=...)`.
    """
    values = flags.FlagValues()
    if config is not None:
        flags.DEFINE_string(
            "config",
            config,
            f"a Python file with get_config(), or a preset: {', '.join(PRESETS)}",
            flag_values=values,
        )
        flags.DEFINE_multi_string(
            _FIELD,
            [],
            "override a field of the config, as in --config.decode.rows=8; may be repeated",
            flag_values=values,
        )
    flags.DEFINE_bool("traceback", False, "show the traceback of an error", flag_values=values)
    flags.DEFINE_integer(
        "verbosity", -1, "log errors (-2), warnings (-1), infos (0) or more", flag_values=values
    )
    return values


def config_of(values: flags.FlagValues) -> Config:
    """Load the config that a parsed command line names, with its overrides.

    Raises:
      ValueError: no such config or field, or a value out of range.
    """
    source, fields = values["config"].value, values[_FIELD].value
    assert source is not None and fields is not None, "flags without a config, or not parsed"
    return load_config(source, dict(item.split("=", 1) for item in fields))


def run(
    main: Callable[[], int | None],
    values: flags.FlagValues,
    usage: str,
    argv: list[str] | None = None,
) -> NoReturn:
    """Parse the command line, run `main`, and end the process with `status`.

    After an interrupt, a second one ends the process at once, without Python's shutdown: XLA
    aborts if shutdown is interrupted while threads still run in it.
    """
    argv = sys.argv if argv is None else argv
    # absl's global flags parse only the program's name: only absl's logging and crash handlers
    # are used here.
    app.run(
        lambda _: _end_at_second_interrupt(status(main, values, usage, argv)),
        argv=argv[:1],
        flags_parser=lambda args: flags.FLAGS(args),
    )
    raise AssertionError("app.run ends the process")


def status(
    main: Callable[[], int | None],
    values: flags.FlagValues,
    usage: str,
    argv: list[str],
) -> int:
    """Run a program and return its exit status.

    The status is what `main` returns (0 for None), 1 where the reader of its output has closed the
    pipe, 2 for bad input, 130 where it is interrupted. Bad input is any ValueError, OSError or
    error of flags; its message goes to stderr as one line.
    """
    logging.set_verbosity(logging.WARNING)  # absl itself logs while it parses
    program = program_name(argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal or the locale lacks is written as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if _HELP & set(argv[1:]):
            print(describe(values, usage))
            code = 0
        else:
            _parse(values, argv)
            logging.set_verbosity(int(values["verbosity"].value or 0))
            code = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # raises here if the output cannot be written
        return code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        _flush_or_drop_output()
        return 1
    except (ValueError, OSError, flags.Error) as error:
        if values["traceback"].value:
            raise
        print(f"{program}: {_one_line(str(error))}", file=sys.stderr)
        _flush_or_drop_output()
        return 2


def program_name(path: str) -> str:
    """Return the name of the file at `path`, or of the package whose `__main__.py` it is."""
    folder, name = os.path.split(path)
    return os.path.basename(folder) if name == "__main__.py" else name


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."


def _flush_or_drop_output() -> None:
    """Flush stdout. If that fails, drop the rest: Python would try again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_at_second_interrupt(code: int) -> int:
    if code == _INTERRUPTED:
        with contextlib.suppress(OSError):  # Ctrl-C may have ended the output's reader, too
            sys.stdout.flush()
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    return code


def describe(values: flags.FlagValues, usage: str) -> str:
    """Write the help page: what the program does, then its flags with their defaults."""
    lines = [textwrap.dedent(usage).strip(), "", "Flags:"]
    for name in values:
        flag = values[name]
        if flag.name != name or name in ("flagfile", "undefok"):
            continue  # a short name, or a flag of absl that no program here uses
        kind = flag.flag_type().split()[-1]  # absl says "multi string", "string enum"
        heading = f"  --[no]{name}" if kind == "bool" else f"  --{name}={kind.upper()}"
        if name == _FIELD:
            heading = f"  --{name}=VALUE"
        text = (flag.help or "").split(";\n")[0]  # absl adds a remark to flags that may be repeated
        if flag.default not in (None, [], "") and kind != "bool":
            text += f" (default: {flag.default})"
        indent = " " * 6
        lines += [heading, textwrap.fill(text, 92, initial_indent=indent, subsequent_indent=indent)]
    return "\n".join(lines)


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
    values.unparse_flags()  # a second command line in one process also starts from the defaults
    try:
        rest = values(_rewritten(argv))
    except RecursionError as error:  # absl's search for a similar name recurses once a letter
        longest = max(argv[1:], key=lambda arg: len(arg) if arg.startswith("-") else 0)
        raise ValueError(f"{shown(longest)}: not a flag; --help lists them") from error
    except flags.UnrecognizedFlagError as error:
        fields = fields_called(error.flagname) if _FIELD in values else []
        if not fields:
            raise
        named = " or ".join(f"--config.{field}" for field in fields)
        raise ValueError(f"--{error.flagname}: no such flag; did you mean {named}?") from error
    if len(rest) > 1:
        raise ValueError(
            f"{shown(rest[1])}: not a flag; each is written --NAME=VALUE, and --help lists them"
        )


def _rewritten(argv: list[str]) -> list[str]:
    """Rewrite config fields as values of one repeated flag, and dashes in names as underscores.

    Raises:
      ValueError: a field has no value, or one that it can't have.
    """
    out = argv[:1]
    args = iter(argv[1:])
    for arg in args:
        field = re.fullmatch(r"--?(no)?config\.([^=]+)(=.*)?", arg, re.DOTALL)
        named = re.fullmatch(r"--?([a-z][a-z-]*)(=.*)?", arg, re.DOTALL)
        if field:
            value = _value_of(arg, bool(field[1]), field[2], field[3], args)
            out.append(f"--{_FIELD}={field[2]}={value}")
        elif named:
            out.append(f"--{named[1].replace('-', '_')}{named[2] or ''}")
        else:
            out.append(arg)
    return out


def _value_of(arg: str, negated: bool, name: str, written: str | None, args: Iterator[str]) -> str:
    """The value of a field: what is `written` behind its name, with the "=". Without that, a
    boolean is true, or false where it is negated, and another field takes the next of `args`."""
    if negated:
        if written is not None or not is_switch(name):
            raise ValueError(f"{arg}: a field that is true or false is negated without a value")
        return "False"
    if written is None and is_switch(name):
        return "True"
    value = next(args, "") if written is None else written[1:]
    if not value or (written is None and re.match(r"--?[a-z]", value)):
        raise ValueError(f"{arg}: needs a value, as in --config.{name}=VALUE")
    return value
