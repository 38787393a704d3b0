"""The HTTP application: its paths, and how errors look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from trtvlm.runtime.server.chat import ChatCompletions
from trtvlm.runtime.server.errors import ApiError
from trtvlm.runtime.server.metrics import CONTENT_TYPE, CountResponses
from trtvlm.runtime.server.responses import Json
from trtvlm.runtime.server.service import State

if TYPE_CHECKING:
    from starlette.requests import Request

    from trtvlm.runtime.server.service import Service

CHAT = "/v1/chat/completions"
PATHS = frozenset({CHAT, "/v1/models", "/health", "/ready", "/metrics"})


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service."""
    app = FastAPI(title="trtvlm", openapi_url=None)  # its pages load scripts from elsewhere
    app.router.routes.append(Route(CHAT, ChatCompletions(service), methods=["POST"]))
    app.add_middleware(CountResponses, metrics=service.metrics, paths=PATHS)

    @app.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.model:
            raise ApiError(
                404, f"This server has only the model {service.model}.", param="model", code="model_not_found"
            )
        return Json(_model(service))

    @app.get("/health")
    async def health() -> Response:
        """The process lives and answers."""
        return Json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Generation requests are taken."""
        service.require_ready()
        return Json({"status": State.READY.value})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return Json(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        messages = {404: "There is nothing at this path.", 405: f"This path does not take {request.method}."}
        known = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
        return Json(known.body, known.status, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        error = ApiError(500, "The server failed; its log says why.", code="internal_error")
        return Json(error.body, error.status)

    return app


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": service.created, "owned_by": "trtvlm"}
