"""What a long start tells: lines where nobody looks at a terminal."""

import io
import sys
import threading

import pytest

from pdjax.core import progress
from pdjax.core.progress import Progress


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)


class Lines(io.StringIO):
    """A log that lets a test wait for a number of lines."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Semaphore(0)

    def write(self, text: str) -> int:
        if text.endswith("\n"):
            self.written.release()
        return super().write(text)


@pytest.mark.usefixtures("hasty")
def test_a_phase_has_a_line_and_more_while_it_lasts(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := Lines())
    told = Progress()
    for item in told.each([1, 2], "compiling", "shapes"):
        for _ in range(3):
            assert log.written.acquire(timeout=20)
        if item == 2:
            assert "pdjax: compiling, 1 of 2 shapes\n" in log.getvalue()
    told.end("ready")
    lines = log.getvalue().splitlines()
    assert lines[0] == "pdjax: compiling, 0 of 2 shapes"
    assert lines[-1].startswith("pdjax: ready after ")


def test_what_is_over_at_once_has_no_line(capsys):
    told = Progress()
    with told.phase("opening the model"):
        pass
    told.end("ready")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("hasty")
def test_it_can_be_turned_off_and_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := Lines())
    told = Progress(show=False)
    assert not told.shown
    with pytest.raises(OSError, match="no"), told.phase("reading"):
        raise OSError("no")
    told.end("ready")
    assert log.getvalue() == ""
    with pytest.raises(OSError, match="no"), Progress().phase("reading"):
        raise OSError("no")
    assert not [each for each in threading.enumerate() if each.name == "pdjax progress"]


@pytest.mark.usefixtures("hasty")
def test_a_terminal_has_a_bar(monkeypatch):
    log = Lines()
    monkeypatch.setattr(log, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", log)
    with Progress().phase("reading weights", 4, "arrays") as advance:
        advance(4)
    assert "reading weights: " in log.getvalue()
    assert "pdjax:" not in log.getvalue()


@pytest.mark.usefixtures("hasty")
def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    class Closed(Lines):
        def write(self, text: str) -> int:
            self.written.release()
            raise OSError("closed")

    monkeypatch.setattr(sys, "stderr", log := Closed())
    told = Progress()
    with told.phase("reading"):
        assert log.written.acquire(timeout=20)
    assert not told.shown
