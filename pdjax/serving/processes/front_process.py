"""A front as the engines' process holds it: the process, and the ends of two socketpairs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pdjax
from pdjax.serving.metrics import SHARED_FOLDER
from pdjax.serving.processes.dealer import Receiver

MAIN = "pdjax.serving.processes.front_main"


class FrontProcess:
    """A process of its own, started anew: one that has threads or JAX can't be forked safely.

    Args:
      metrics: a folder in which all fronts keep what they count.

    Attributes:
      messages: our end of the socketpair for messages.
      receiver: takes connections.
      pid: of the process.
    """

    def __init__(self, metrics: Path) -> None:
        self.messages, their_messages = socket.socketpair()
        channel, their_channel = socket.socketpair()
        self.receiver = Receiver(channel)
        theirs = [their_messages.fileno(), their_channel.fileno()]
        source = str(Path(pdjax.__file__).resolve().parents[1])
        path = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(path), SHARED_FOLDER: str(metrics)}
        with their_messages, their_channel:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MAIN, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                pass_fds=theirs,
                start_new_session=True,  # Ctrl-C is for the engines' process alone
            )
        self.pid = self._process.pid

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def end(self) -> int:
        """Close the socket for messages, which ends it, and return its exit status; if it goes on
        for a second, it is killed. The receiver stays open, for what the process has not taken."""
        self.messages.close()
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
