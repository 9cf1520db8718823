"""The server of a storm: a process of its own, looked at from outside."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 180.0
"""Seconds for a start, and for a server to come to rest."""


class Watched:
    """A running server.

    Args:
      process: with its children, the server.
      url: of its root.
    """

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self._process, self.url = process, url
        target = urlsplit(url)
        assert target.hostname is not None and target.port is not None
        self.host, self.port = target.hostname, target.port

    def get(self, path: str) -> Any:
        """What a path answers, as JSON."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as response:
            return json.load(response)

    @property
    def held(self) -> dict[str, int]:
        """What is held for requests: pages in use, rows in use, sequences, answers under way."""
        state = self.get("/engines")
        return {
            "pages": sum(pool["used_pages"] for pool in state["pools"].values()),
            "rows": sum(each["rows"] - each["free_rows"] for each in state["engines"].values()),
            "steps": sum(each["steps_in_flight"] for each in state["engines"].values()),
            "sequences": state["queue"]["waiting"] + state["queue"]["running"],
            "answers": state["open_answers"],
        }

    @property
    def descriptors(self) -> int:
        """Open files and sockets of the server's processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self._pids())

    @property
    def threads(self) -> int:
        """Threads of the server's processes."""
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self._pids())

    @property
    def resident(self) -> int:
        """Bytes of memory that the server's processes have."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._pids())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def rest(self, descriptors: int | None = None) -> dict[str, int]:
        """Wait until nothing is held, and no more descriptors are open than given; what is held and
        open in the end."""
        end = time.monotonic() + PATIENCE
        while True:
            found = self.held | {"descriptors": self.descriptors}
            at_rest = not any(found[name] for name in found if name != "descriptors")
            if (at_rest and found["descriptors"] <= (descriptors or 10**9)) or (
                time.monotonic() > end
            ):
                return found
            time.sleep(0.2)

    def _pids(self) -> Iterator[int]:
        todo = [self._process.pid]
        while todo:
            pid = todo.pop()
            yield pid
            for task in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{task}/children").read_text()
                todo += map(int, children.split())


@contextmanager
def serving(flags: Sequence[str], log: Path) -> Iterator[Watched]:
    """Run `pdjax serve` with these flags at a free port; its log lines go to a file.

    Raises:
      RuntimeError: it does not start.
    """
    program = [sys.executable, "-c", "from pdjax.cli import main; main()"]
    command = [*program, "serve", "--port=0", *flags]
    with log.open("w", encoding="utf-8") as lines:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=lines, text=True)
        try:
            assert process.stdout is not None
            told = process.stdout.readline()  # "pdjax serve: NAME at URL/v1"
            if " at http" not in told:
                raise RuntimeError(f"pdjax serve does not start; see {log}")
            yield Watched(process, told.split()[-1].removesuffix("/v1"))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
