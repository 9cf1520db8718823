"""Command lines: absl flags, a config with overrides of any field, help, and errors in one line.

Every program of this project takes `--config=FILE` and, for any field of the config,
`--config.decode.rows=8`. A program keeps its flags to itself (`new_flags`) instead of adding them
to absl's global ones, so that any number of programs can be imported side by side.
"""

import contextlib
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from pdjax.config import Config
from pdjax.config.load import PRESETS, load_config
from pdjax.core.messages import shown

_FIELD = "config.FIELD"
_INTERRUPTED = 130
_MOST_CHARACTERS = 1500
"""Of a message: it may quote a whole value or the name of a file."""
_HELP = {"-h", "--help", "-help", "--helpshort", "--helpfull"}


def new_flags(config: str | None = None) -> flags.FlagValues:
    """The flags that every program has; `--config` and its fields where a default is given.

    A program adds its own with absl's `DEFINE_...(..., flag_values=...)`.
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
    flags.DEFINE_bool(
        "traceback", False, "where an error arises, show the whole way to it", flag_values=values
    )
    return values


def config_of(values: flags.FlagValues) -> Config:
    """The config that a parsed command line names, with its overrides.

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

    A second interrupt ends it at once: what is taken down after the first must not be left half
    done, since threads may still be within XLA, which aborts then.
    """
    argv = sys.argv if argv is None else argv
    # absl's own flags are given nothing to parse; its logging and crash handlers are wanted.
    app.run(
        lambda _: _last(status(main, values, usage, argv)),
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
    """Exit status of a program: its own (0 for None), 2 for bad input, 130 where it is interrupted.

    Bad input is any ValueError or OSError; its message goes to stderr as one line.
    """
    logging.set_verbosity(logging.WARNING)
    program = os.path.basename(argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal's or the locale's characters lack is written as an escape, not lost.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if _HELP & set(argv[1:]):
            print(describe(values, usage))
            code = 0
        else:
            _parse(values, argv)
            code = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is known only now
        return code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output has had enough of it
        _let_go_of_output()
        return 1
    except (ValueError, OSError, flags.Error) as error:
        if values["traceback"].value:
            raise
        print(f"{program}: {_one_line(str(error))}", file=sys.stderr)
        _let_go_of_output()
        return 2


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."


def _let_go_of_output() -> None:
    """Write out what is left. Where that fails, drop it: Python would try again at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _last(code: int) -> int:
    if code == _INTERRUPTED:
        with contextlib.suppress(OSError):  # whoever read the output may have been interrupted, too
            sys.stdout.flush()
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    return code


def describe(values: flags.FlagValues, usage: str) -> str:
    """The help page: what the program does, then its flags with their defaults."""
    lines = [textwrap.dedent(usage).strip(), "", "Flags:"]
    for name in values:
        flag = values[name]
        if flag.name != name or name in ("flagfile", "undefok"):
            continue  # a short name, or one of absl's own that no program here is about
        kind = flag.flag_type().split()[-1]  # of "multi string", "string enum"
        shown = f"  --[no]{name}" if kind == "bool" else f"  --{name}={kind.upper()}"
        if name == _FIELD:
            shown = f"  --{name}=VALUE"
        text = (flag.help or "").split(";\n")[0]  # absl adds a remark to what may be repeated
        if flag.default not in (None, [], "") and kind != "bool":
            text += f" (default: {flag.default})"
        lines += [shown, textwrap.fill(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
    values.unparse_flags()  # a second command line in one process starts from the defaults too
    try:
        rest = values(_rewritten(argv))
    except RecursionError as error:  # absl looks for a flag of a similar name, letter by letter
        longest = max(argv[1:], key=lambda arg: len(arg) if arg.startswith("-") else 0)
        raise ValueError(f"{shown(longest)}: not a flag; --help lists them") from error
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r}: not a flag; --help lists them")


def _rewritten(argv: list[str]) -> list[str]:
    """Fields of the config as values of one repeated flag; dashes in names as underscores."""
    out = argv[:1]
    args = iter(argv[1:])
    for arg in args:
        field = re.fullmatch(r"--?config\.([^=]+)(=.*)?", arg, re.DOTALL)
        named = re.fullmatch(r"--?([a-z][a-z-]*)(=.*)?", arg, re.DOTALL)
        if field:
            value = field[2] or f"={next(args, '')}"
            if value == "=" or (not field[2] and value.startswith("=--")):
                raise ValueError(f"{arg}: needs a value, as in --config.{field[1]}=VALUE")
            out.append(f"--{_FIELD}={field[1]}{value}")
        elif named:
            out.append(f"--{named[1].replace('-', '_')}{named[2] or ''}")
        else:
            out.append(arg)
    return out
