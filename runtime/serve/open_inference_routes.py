"""The Open Inference Protocol (v2): the graph itself, and pictures as files, each as a model of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

import runtime
from runtime.backends.base import Outputs
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest
from runtime.serve.bodies import Picture, PictureRequest, picture_from_data_url, read_body, require_few
from runtime.serve.open_inference import (
    HEADER_LENGTH,
    VERSION,
    TensorSpec,
    Values,
    elements_of,
    parse_request,
    pixels_of,
    response_of,
)
from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import PictureResult
from runtime.serve.scoring import STATUSES, remaining_s, results, together, while_connected
from runtime.serve.settings import ServeLimits
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


@dataclass(frozen=True)
class _Wanted:
    """What a request comes down to: pixels or pictures, and each output with whether it goes as bytes."""

    request_id: str | None
    content: NDArray[np.uint8] | list[Picture]
    outputs: list[tuple[TensorSpec, bool]]


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
        model, limits = _model(request, state), state.settings.limits
        body = await read_body(request, limits, request.scope["deadline_s"])
        take_apart = partial(_taken_apart, body, request.headers.get(HEADER_LENGTH), model, limits)
        wanted = await state.workers.run(take_apart, timeout_s=remaining_s(request), size_bytes=len(body))
        if isinstance(wanted.content, list):
            values = await _verdicts(request, wanted.content, state)
        else:
            values = await _graph_outputs(request, wanted.content, state)
        outputs = [(spec, as_bytes, values[spec.name]) for spec, as_bytes in wanted.outputs]
        return _response(*response_of(model.name, wanted.request_id, outputs))

    return router


def _model(request: Request, state: ServerState) -> _Model:
    name, version = request.path_params["name"], request.path_params.get("version", VERSION)
    manifest = state.service.manifest
    models = {model.name: model for model in (_graph(manifest), _of_files(manifest, state.natural_traces))}
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


def _of_files(manifest: ModelManifest, natural_traces: bool) -> _Model:
    # A tensor has no place for "there is none" either.
    gives = _PICTURE_OUTPUTS if natural_traces else _PICTURE_OUTPUTS[:-1]
    return _Model(f"{manifest.name}_pictures", _PICTURES, gives)


def _taken_apart(body: bytes, header_length: str | None, model: _Model, limits: ServeLimits) -> _Wanted:
    """What a body asks of a model; nothing of the body itself is kept but pixels and pictures."""
    parsed = parse_request(body, header_length, model.takes.json_bounds(limits.max_pictures))
    outputs = parsed.wishes(model.gives)
    tensor = parsed.only_input(model.takes)
    require_few(tensor.shape[0], limits)
    content: NDArray[np.uint8] | list[Picture]
    if model.takes is _PICTURES:
        content = [_picture(element, index) for index, element in enumerate(elements_of(tensor, parsed.raw))]
    else:
        content = pixels_of(tensor, parsed.raw)
    return _Wanted(parsed.request.id, content, outputs)


def _picture(element: bytes | str, index: int) -> Picture:
    return Picture(element if isinstance(element, bytes) else picture_from_data_url(element, f"pictures.{index}"), None)


async def _graph_outputs(request: Request, images: NDArray[np.uint8], state: ServerState) -> dict[str, Values]:
    """Raw outputs of the graph for pixels."""
    service, timeout_s = state.service, remaining_s(request)
    with state.admission.admitted(len(images)):
        waiting = [asyncio.wrap_future(future) for future in service.submit_crops(images, timeout_s=timeout_s)]
        rows: list[Outputs] = await while_connected(request, together(waiting))
    return {name: np.concatenate([getattr(row, name) for row in rows]) for name in OUTPUTS}


async def _verdicts(request: Request, pictures: list[Picture], state: ServerState) -> dict[str, Values]:
    """Verdicts on pictures; a tensor has no place for an error, so all of them must be readable."""
    found = await results(request, PictureRequest(pictures, evidence=False, stability=False), state)
    for result in found:
        _require_scored(result)
    return {
        "verdict": [str(result.verdict).encode() for result in found],
        "fake_probability": _column([result.fake_probability for result in found]),
        "trace_similarity": _column([result.trace_similarity for result in found]),
    }


def _column(values: Sequence[float | None]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def _require_scored(result: PictureResult) -> None:
    if result.error is not None:
        raise RequestError(
            f"pictures.{result.index}",
            got=result.error.message,
            wanted="a picture that can be read",
            remedy="leave it out",
            status=max(422, STATUSES[result.error.code]),  # 422 unless it is the server's fault
            code=result.error.code,
        )


def _response(body: bytes, header_length: int | None) -> Response:
    if header_length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header_length)})
