"""A model of fake engines whose tokens are bytes, so that it has text; and beside it, in the same
event loop, the backend of a front."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from pdjax.request_maker import RequestMaker, text_maker
from pdjax.serving.backend import ServedModel
from pdjax.serving.front import Settings
from pdjax.serving.processes.frames import Frames
from pdjax.serving.processes.front_link import FrontLink
from pdjax.serving.processes.messages import Setup
from pdjax.serving.processes.remote_backend import RemoteBackend
from pdjax.text.byte_tokenizer import byte_tokenizer
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.deployment import CONFIG, MAX_MODEL_LEN
from tests.helpers.house import House

TOKENIZER = byte_tokenizer()
MODEL = ServedModel("bytes", MAX_MODEL_LEN, MAX_MODEL_LEN, CONFIG.max_waiting)


class TextLLM(SimpleNamespace):
    """What `AsyncLLM` and `FrontLink` use of an LLM, over a house of fakes.

    Args:
      house: serves; None makes one whose tokens are bytes.
      tokenizer: None where the model has none.

    Attributes:
      house: has the deployment; `check` it at the end.
    """

    deployment = SimpleNamespace(disk=None)

    def __init__(self, house: House | None = None, tokenizer: Tokenizer | None = TOKENIZER) -> None:
        house = house or House(make_text=text_maker(TOKENIZER))
        made = house.deployment
        super().__init__(
            house=house,
            session=house.session,
            coordinator=made.coordinator,
            recorder=made.recorder,
            requests=RequestMaker("bytes", tokenizer, made.clock),
            config=CONFIG,
            max_model_len=MAX_MODEL_LEN,
            tokenizer=tokenizer,
            close=house.session.close,
        )


def linked(llm: Any) -> tuple[FrontLink, RemoteBackend, Frames]:
    """Both ends of a front in this event loop."""
    ours, theirs = socket.socketpair()

    async def report() -> dict[str, Any]:
        return {"live": len(llm.coordinator.loop.lifecycle.live)}

    async def fails() -> Any:
        raise OSError("/root/secret")

    setup = Setup(0, MODEL, Settings(), None, None, None, "info")
    methods = {"report": report, "recent": fails}
    link = FrontLink(ours, llm, methods, setup, lambda: None, lambda _: None, lambda: None)
    backend: RemoteBackend

    def received(message: Any) -> None:
        if not isinstance(message, Setup):
            backend.received(message)

    frames = Frames(theirs, received, lambda: backend.lost())
    backend = RemoteBackend(MODEL, TOKENIZER, frames.send)
    llm.session.after_turns.append(link.flush)
    llm.session.start()
    return link, backend, frames


@asynccontextmanager
async def remote(llm: Any) -> AsyncIterator[RemoteBackend]:
    """A front's backend; the session of the LLM is stopped at the end."""
    link, backend, frames = linked(llm)
    try:
        yield backend
    finally:
        frames.close()
        link.close()
        llm.session.after_turns.remove(link.flush)
        llm.session.stop()
