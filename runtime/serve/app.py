"""The application: which path does what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import fastapi_offline
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

import runtime
from runtime.serve.bodies import picture_request, read_body
from runtime.serve.gate import Gate
from runtime.serve.open_inference_routes import open_inference_router
from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import (
    ErrorBody,
    InferRequest,
    InferResponse,
    ModelInformation,
    ModelSummary,
)
from runtime.serve.scoring import remaining_s, results
from runtime.serve.settings import ServeSettings
from runtime.serve.state import ServerState, ServiceLoader

_PAGE = Path(__file__).parent / "page"
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"
_REFUSALS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        401: "no token, or another",
        408: "the body took too long",
        413: "too many bytes, pixels, pictures or values",
        415: "neither JSON nor a form, or no picture of a known format",
        422: "a body or a picture that cannot be read",
        429: "too much to do; Retry-After says when to try again",
        500: "an error of the server",
        503: "starting, stopping, out of time, or out of memory",
    }.items()
}


def create_app(settings: ServeSettings, load: ServiceLoader) -> FastAPI:
    """Application of a server; its state is at `app.state.server`.

    Args:
        settings: of the server.
        load: opens the model, in a thread, once the server runs.
    """
    state = ServerState(settings, load)
    app = FastAPI(
        title="NTF toolkit",
        description="Tells generated pictures from natural ones.",
        version=runtime.__version__,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        # A path with a slash too many is another one; an answer that leads elsewhere would take the client's Host.
        redirect_slashes=False,
    )
    app.state.server = state
    app.add_middleware(Gate, state=state)
    app.add_exception_handler(HTTPException, _no_such_thing)
    # The gate asks for the token; this lets the page at /docs ask a person for it.
    bearer = [] if settings.token is None else [Depends(HTTPBearer(auto_error=False))]
    for router in (_infer_router(state), _health_router(state), open_inference_router(state)):
        app.include_router(router, dependencies=bearer)
    app.include_router(_page_router())
    app.mount("/page", StaticFiles(directory=_PAGE))
    app.mount("/docs", StaticFiles(directory=_SWAGGER))
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    state.begin()
    yield
    await state.close()


def _infer_router(state: ServerState) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["detector"])
    body = {"requestBody": {"required": True, "content": _infer_content()}}

    @router.post("/infer", response_model=InferResponse, responses=_REFUSALS, openapi_extra=body)
    async def infer(request: Request) -> Response:
        """Verdicts on pictures, sent as data URLs in JSON or as files in a form."""
        limits = state.settings.limits
        content = await read_body(request, limits, request.scope["deadline_s"])
        take_apart = partial(picture_request, request.headers, content, limits, request.scope["deadline_s"])
        wanted = await state.workers.run(take_apart, timeout_s=remaining_s(request), size_bytes=len(content))
        data = await results(request, wanted, state)
        # Checked and written once; FastAPI would take the models apart and check them again.
        answer = InferResponse(data=data, model=_model_summary(state))
        return Response(answer.model_dump_json(), media_type="application/json")

    @router.get("/model", responses={status: _REFUSALS[status] for status in (401, 503)})
    async def model() -> ModelInformation:
        """The model that scores, and what one request may hold."""
        return _model_information(state)

    return router


def _infer_content() -> dict[str, object]:
    """Both forms of a request, for the OpenAPI page."""
    switch = {"type": "boolean", "default": False}
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "array", "items": file}, "evidence": switch, "stability": switch},
    }
    return {
        "application/json": {"schema": InferRequest.model_json_schema()},
        "multipart/form-data": {"schema": form},
    }


def _model_summary(state: ServerState) -> ModelSummary:
    info = state.service.info
    return ModelSummary(name=info.model, precision=info.precision, backend=info.backend)


def _model_information(state: ServerState) -> ModelInformation:
    service, limits = state.service, state.settings.limits
    info, manifest = service.info, service.manifest
    calibration = manifest.calibration[info.precision]
    return ModelInformation(
        name=info.model,
        precision=info.precision,
        backend=info.backend,
        backend_version=info.backend_version,
        device=info.device,
        input_height=manifest.preprocess.height,
        input_width=manifest.preprocess.width,
        real_below=float(calibration.fake_probability(calibration.real_threshold)),
        fake_above=float(calibration.fake_probability(calibration.fake_threshold)),
        natural_traces=state.natural_traces,
        limits={
            "request_bytes": limits.max_request_bytes,
            "pixels": limits.max_pixels,
            "pictures": limits.max_pictures,
            "timeout_s": limits.timeout_s,
        },
    )


def _health_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "alive"}

    @router.get("/readyz", responses={503: _REFUSALS[503]})
    async def readyz() -> dict[str, str]:
        """200 while the server takes work: not before its model is warm, nor once it was told to stop."""
        state.require_ready()
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse, responses={401: _REFUSALS[401]})
    async def metrics() -> Response:
        """Counters in the format of Prometheus."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _page_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    @router.get("/docs")
    async def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html")

    return router


async def _no_such_thing(request: Request, error: Exception) -> NoReturn:
    """What the router itself refuses, a path or a method that is not there, as the gate answers and counts it."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    raise RequestError(
        "request",
        got=f"{request.method[:20]} {request.scope['path'][:200]}",
        wanted="a path and method that are listed on /docs",
        remedy="correct the address",
        status=error.status_code,
        code=code,
    ) from error
