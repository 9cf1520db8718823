"""The command `pdjax`: what a shell can ask for. Each subcommand loads JAX only once it runs."""

import sys
from importlib.metadata import version
from typing import NoReturn

from pdjax.cli import bench, convert, explain, generate, serve, trace
from pdjax.flags import run

COMMANDS = {
    "generate": generate.COMMAND,
    "convert": convert.COMMAND,
    "trace": trace.COMMAND,
    "serve": serve.COMMAND,
    "bench": bench.COMMAND,
    "explain": explain.COMMAND,
}


def overview() -> str:
    """The page that `pdjax --help` shows: the first line of each subcommand's own."""
    lines = [command.usage.strip().split("\n")[0] for command in COMMANDS.values()]
    return "\n".join(
        [
            "pdjax: language models served with prefill and decode on different JAX device meshes.",
            "",
            *(f"  {line}" for line in lines),
            "",
            "pdjax COMMAND --help lists the flags of a command.",
            "pdjax --version says which pdjax this is.",
        ]
    )


def main(argv: list[str] | None = None) -> NoReturn:
    """The entry point of the command; ends the process.

    A config may name classes of modules in the current folder, so that folder ends Python's path,
    unless Python was told not to look there (`-P`)."""
    argv = sys.argv if argv is None else argv
    name = argv[1] if len(argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        sys.exit(0)
    if name == "--version":
        print(f"pdjax {version('pdjax')}")
        sys.exit(0)
    if name not in COMMANDS:
        print(
            f"pdjax: {name!r}: no such command; allowed are {', '.join(COMMANDS)}", file=sys.stderr
        )
        sys.exit(2)
    if not sys.flags.safe_path and "" not in sys.path:
        sys.path.append("")
    command = COMMANDS[name]
    run(command.main, command.values, command.usage, [f"pdjax {name}", *argv[2:]])
