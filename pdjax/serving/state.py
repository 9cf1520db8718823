"""What is served, and how it goes: models, health, metrics, engines."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pdjax.core.clock import unix_time
from pdjax.serving.briefly_kept import BrieflyKept
from pdjax.serving.errors import ApiError
from pdjax.serving.front import Front
from pdjax.serving.metrics import CONTENT_TYPE
from pdjax.serving.openapi.document import told
from pdjax.serving.openapi.server_answers import ModelCard, ModelList
from pdjax.serving.openapi.statuses import errors

ANSWER_S = 5.0
"""Seconds in which the engines' process answers a front, unless it hangs."""


def routes(front: Front) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    model = front.backend.model
    card = {
        "id": model.name,
        "object": "model",
        "created": unix_time(),
        "owned_by": "pdjax",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }

    Name = Annotated[str, Path(description="The model's name.", examples=[model.name])]

    @router.get("/v1/models", response_model=None, responses=told(ModelList))
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}", response_model=None, responses=told(ModelCard, 404))
    async def one_model(name: Name) -> dict[str, Any]:
        """One model."""
        front.check_model(name)
        return card

    kept_report = BrieflyKept(front.backend.report)

    @router.head("/health", include_in_schema=False)
    @router.get("/health", response_class=PlainTextResponse, responses=errors())
    async def health() -> Response:
        """Whether the server lives."""
        return PlainTextResponse("ok\n")

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", response_class=PlainTextResponse, responses=errors())
    async def ready() -> Response:
        """Whether the server takes requests: not while it drains, nor while the engines' process
        says nothing."""
        if front.is_draining:
            raise ApiError(503, "draining", kind="server_error", code="shutting_down")
        try:
            await asyncio.wait_for(kept_report(), ANSWER_S)
        except TimeoutError:
            message = "the engines do not answer"
            raise ApiError(503, message, kind="server_error", code="engines_hang") from None
        return PlainTextResponse("ok\n")

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse, responses=errors())
    async def metrics() -> Response:
        """Prometheus's text format."""
        report = await front.backend.report()
        text = await asyncio.to_thread(front.metrics.text, report)  # some milliseconds
        return Response(text, headers={"content-type": CONTENT_TYPE})

    @router.get("/engines", responses=errors())
    async def engines() -> dict[str, Any]:
        """The state of each engine, pool and link, of the queue, and of each front."""
        own = {"open_answers": len(front.answers), "draining": front.is_draining}
        return {**own, **await kept_report()}

    async def written() -> bytes:
        return bytes(JSONResponse({"requests": await front.backend.recent()}).body)

    recent = BrieflyKept(written)  # it may be large

    @router.get("/requests", response_class=JSONResponse, responses=errors())
    async def requests() -> Response:
        """What the newest requests did when, in milliseconds after the arrival of each."""
        return Response(await recent(), media_type=JSONResponse.media_type)

    return router
