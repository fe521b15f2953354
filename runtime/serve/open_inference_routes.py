"""The Open Inference Protocol (v2): the graph itself, and pictures as files, each as a model of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request, Response

import runtime
from runtime.backends.base import Outputs
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest
from runtime.serve.bodies import Picture, PictureRequest, picture_from_data_url, read_body, require_few
from runtime.serve.open_inference import (
    HEADER_LENGTH,
    VERSION,
    ParsedRequest,
    TensorSpec,
    Values,
    elements_of,
    parse_request,
    pixels_of,
    response_of,
)
from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import PictureResult
from runtime.serve.scoring import remaining_s, results, together, while_connected
from runtime.serve.state import ServerState

_PICTURES = TensorSpec("pictures", "BYTES", (-1,))
_PICTURE_OUTPUTS = (
    TensorSpec("verdict", "BYTES", (-1,)),
    TensorSpec("fake_probability", "FP32", (-1,)),
    TensorSpec("trace_similarity", "FP32", (-1,)),
)


@dataclass(frozen=True)
class _Model:
    """A model of the protocol: the graph takes pixels and gives raw outputs, the other files and gives verdicts."""

    name: str
    takes: TensorSpec
    gives: tuple[TensorSpec, ...]


def open_inference_router(state: ServerState) -> APIRouter:
    """Routes under /v2; a version in the path may be left out."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    binary: dict[str, object] = {"application/json": {}, "application/octet-stream": {}}

    @router.get("")
    async def server() -> dict[str, object]:
        """Metadata of the server."""
        return {"name": "ntf-toolkit", "version": runtime.__version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """200 as long as the process answers."""
        return {"live": True}

    @router.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """200 while the server takes work."""
        state.require_ready()
        return {"ready": True}

    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{version}", include_in_schema=False)
    async def metadata(request: Request) -> dict[str, object]:
        """Metadata of a model."""
        model = _model(request, state)
        return {
            "name": model.name,
            "versions": [VERSION],
            "platform": f"ntf-toolkit_{state.service.info.backend}",
            "inputs": [model.takes.to_json()],
            "outputs": [spec.to_json() for spec in model.gives],
        }

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(request: Request) -> dict[str, object]:
        """200 while the model takes work."""
        state.require_ready()
        return {"name": _model(request, state).name, "ready": True}

    @router.post("/models/{name}/infer", openapi_extra={"requestBody": {"required": True, "content": binary}})
    @router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request) -> Response:
        """Outputs for one batch."""
        model = _model(request, state)
        body = await read_body(request, state.settings.limits, request.scope["deadline_s"])
        parsed = parse_request(body, request.headers.get(HEADER_LENGTH))
        wishes = parsed.wishes(model.gives)
        tensor = parsed.only_input(model.takes)
        require_few(tensor.shape[0], state.settings.limits)
        of_files = model.takes is _PICTURES
        values = await (_verdicts if of_files else _graph_outputs)(request, parsed, model, state)
        outputs = [(spec, as_bytes, values[spec.name]) for spec, as_bytes in wishes]
        return _response(*response_of(model.name, parsed.request, outputs))

    return router


def _model(request: Request, state: ServerState) -> _Model:
    name, version = request.path_params["name"], request.path_params.get("version", VERSION)
    manifest = state.service.manifest
    models = {model.name: model for model in (_graph(manifest), _of_files(manifest))}
    if name not in models or version != VERSION:
        raise RequestError(
            "model",
            got=f"{name[:120]!r}, version {version[:20]!r}",
            wanted=f"{' or '.join(models)}, version {VERSION}",
            remedy="correct the address",
            status=404,
            code="unknown_model",
        )
    return models[name]


def _graph(manifest: ModelManifest) -> _Model:
    size = manifest.preprocess
    shapes: dict[str, tuple[int, ...]] = {
        "logits": (-1,),
        "trace_similarity": (-1,),
        "embeddings": (-1, manifest.embedding_dim),
        "evidence": (-1, *manifest.evidence_shape),
    }
    takes = TensorSpec(INPUT_NAME, "UINT8", (-1, size.height, size.width, 3))
    return _Model(manifest.name, takes, tuple(TensorSpec(name, "FP32", shapes[name]) for name in OUTPUTS))


def _of_files(manifest: ModelManifest) -> _Model:
    return _Model(f"{manifest.name}_pictures", _PICTURES, _PICTURE_OUTPUTS)


async def _graph_outputs(
    request: Request, parsed: ParsedRequest, model: _Model, state: ServerState
) -> dict[str, Values]:
    """Raw outputs of the graph for the pixels of a request."""
    images = pixels_of(parsed.only_input(model.takes), parsed.raw)
    service, timeout_s = state.service, remaining_s(request)
    with state.admission.admitted(len(images)):
        waiting = [asyncio.wrap_future(future) for future in service.submit_crops(images, timeout_s=timeout_s)]
        rows: list[Outputs] = await while_connected(request, together(waiting))
    return {name: np.concatenate([getattr(row, name) for row in rows]) for name in OUTPUTS}


async def _verdicts(request: Request, parsed: ParsedRequest, model: _Model, state: ServerState) -> dict[str, Values]:
    """Verdicts on the files of a request; a tensor has no place for an error, so all of them must be readable."""
    pictures = [
        Picture(element if isinstance(element, bytes) else picture_from_data_url(element, f"pictures.{index}"), None)
        for index, element in enumerate(elements_of(parsed.only_input(model.takes), parsed.raw))
    ]
    found = await results(request, PictureRequest(pictures, evidence=False, stability=False), state)
    for result in found:
        _require_scored(result)
    return {
        "verdict": [str(result.verdict).encode() for result in found],
        "fake_probability": np.array([result.fake_probability for result in found], np.float32),
        "trace_similarity": np.array([result.trace_similarity for result in found], np.float32),
    }


def _require_scored(result: PictureResult) -> None:
    if result.error is not None:
        raise RequestError(
            f"pictures.{result.index}",
            got=result.error.message,
            wanted="a picture that can be read",
            remedy="leave it out",
            status=422,
            code=result.error.code,
        )


def _response(body: bytes, header_length: int | None) -> Response:
    if header_length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header_length)})
