"""A session over a deployment of fakes, and what its tests ask of both."""

import itertools
import threading
from typing import Any

from pdjax.core.request import Request, SamplingParams
from pdjax.entry import Entry, Listener
from pdjax.session import Session
from pdjax.stream import Stream
from tests.helpers.deployment import LAYOUT, Deployment, deploy
from tests.helpers.fakes import expected_output

PATIENCE = 20.0
"""Seconds after which a thread that should have ended hangs."""


class House:
    """A deployment of fakes, and a session over it."""

    def __init__(self, **how: Any) -> None:
        self.deployment: Deployment = deploy(**how)
        self.session = Session(self.deployment.coordinator, self.deployment.recorder)
        self._ids = itertools.count()

    def request(self, **params: Any) -> Request:
        number = next(self._ids)
        values = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **params}
        return Request(f"r{number}", (1 + number % 9, 2, 3), SamplingParams(**values), 0.0)

    def generate(self, count: int = 1, **params: Any) -> list[Entry]:
        listener = Listener()
        entries = [
            self.session.submit(self.request(**params), listener=listener, patient=True)
            for _ in range(count)
        ]
        self.session.wait_for(entries, listener, lambda done: None)
        return entries

    def stream(self, **params: Any) -> Stream:
        request = self.request(**params)
        entry = self.session.submit(request, listener=Listener(), streams=True)
        return Stream(self.session, entry)

    def rest(self) -> None:
        while self.session.has_work:
            self.session.step()
        self.check()

    def check(self) -> None:
        self.deployment.coordinator.check()
        assert not self.session.book.entries


class Crosses:
    """Text that is what its callback is given."""

    def __init__(self) -> None:
        self._fresh, self.text = "", ""
        self.finished = False

    def push(self, token_id: int) -> None:
        self._fresh += "x"
        self.text += "x"

    def take(self) -> str:
        fresh, self._fresh = self._fresh, ""
        return fresh

    def finish(self) -> None:
        self.finished = True


def text_house() -> House:
    return House(make_text=lambda request: Crosses())


def exact(entry: Entry) -> bool:
    assert entry.answer is not None
    expected = expected_output(entry.sequences[0], LAYOUT.num_layers)
    return entry.answer.token_ids == expected


def in_threads(*calls: Any) -> None:
    errors: list[BaseException] = []

    def run(call: Any) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "somebody waits for ever"
    assert not errors, errors


def raising(error: BaseException) -> Any:
    def on_text(text: str) -> None:
        raise error

    return on_text
