"""Pictures of a request to results, while the client is there and the time allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from runtime.changes import CHANGES
from runtime.decode import check_header
from runtime.detector import Detection
from runtime.errors import DeadlineError, PictureError, PictureFormatError, PictureTooLargeError
from runtime.serve.bodies import Picture, PictureRequest
from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import PictureProblem, PictureResult, StabilityResult
from runtime.serve.state import ServerState

_T = TypeVar("_T")

_CODES: dict[type[PictureError], str] = {
    PictureTooLargeError: "too_many_pixels",
    PictureFormatError: "unknown_format",
    PictureError: "unreadable_picture",
}
_STATUSES = {"too_many_pixels": 413, "unknown_format": 415, "unreadable_picture": 422}


async def results(request: Request, wanted: PictureRequest, state: ServerState) -> list[PictureResult]:
    """A result for each picture, in order, at least one of them with a verdict.

    Raises:
        RequestError: 429 for a server with too much to do; 413, 415 or 422 where no picture can be scored.
        DeadlineError: the time of the request is over.
        ClientDisconnect: the client went away; its pictures have left the queue.
    """
    pictures, limits = wanted.pictures, state.settings.limits
    # Reading a header takes a fraction of a millisecond for most formats, but a hostile file chooses how long.
    problems = await asyncio.to_thread(_header_problems, pictures, limits.max_pixels)
    readable = [picture for picture, problem in zip(pictures, problems, strict=True) if problem is None]
    detections = iter(await _detections(request, readable, wanted.stability, state) if readable else ())
    found = [
        _failed(index, picture, problem) if problem else _result(index, picture, next(detections), wanted.evidence)
        for index, (picture, problem) in enumerate(zip(pictures, problems, strict=True))
    ]
    for result in found:
        if result.error is not None:
            state.metrics.errors.labels(result.error.code).inc()
        else:
            state.metrics.verdicts.labels(result.verdict).inc()
    if all(result.error is not None for result in found):
        raise _nothing_scored(found)
    return found


def remaining_s(request: Request) -> float:
    """Seconds that the request may still take.

    Raises:
        DeadlineError: none are left.
    """
    seconds = float(request.scope["deadline_s"] - time.monotonic())
    if seconds <= 0:
        raise DeadlineError(
            "request", got="no time left", wanted="an answer by then", remedy="send fewer pictures at once"
        )
    return seconds


async def _detections(
    request: Request, pictures: Sequence[Picture], stability: bool, state: ServerState
) -> list[Detection]:
    service, timeout_s = state.service, remaining_s(request)
    # A picture that is scored under every change takes as long as so many pictures.
    weight = len(CHANGES) if stability else 1
    with state.admission.admitted(weight * len(pictures)):
        work = [service.detect(picture.data, timeout_s=timeout_s, stability=stability) for picture in pictures]
        return await while_connected(request, together(work))


async def together(work: Sequence[Awaitable[_T]]) -> list[_T]:
    """Results of all, in order; where one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result, unless the client goes away first: nobody waits for its pictures then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _header_problems(pictures: Sequence[Picture], max_pixels: int) -> list[PictureProblem | None]:
    return [_header_problem(picture, max_pixels) for picture in pictures]


def _header_problem(picture: Picture, max_pixels: int) -> PictureProblem | None:
    try:
        check_header(picture.data, max_pixels=max_pixels)
    except PictureError as error:
        return PictureProblem(code=_CODES[type(error)], message=str(error))
    return None


def _failed(index: int, picture: Picture, problem: PictureProblem) -> PictureResult:
    return PictureResult(
        index=index,
        name=picture.name,
        is_ai_generated=None,
        possible_sources={},
        status="ERROR",
        verdict=None,
        fake_probability=None,
        trace_similarity=None,
        evidence=None,
        stability=None,
        error=problem,
    )


def _result(index: int, picture: Picture, detection: Detection, evidence: bool) -> PictureResult:
    if detection.error is not None:
        return _failed(index, picture, PictureProblem(code="unreadable_picture", message=detection.error))
    stability = detection.stability
    return PictureResult(
        index=index,
        name=picture.name,
        is_ai_generated=detection.fake_probability,
        possible_sources={},
        status="SUCCESS",
        verdict=detection.verdict,
        fake_probability=detection.fake_probability,
        trace_similarity=detection.trace_similarity,
        evidence=detection.to_json()["evidence"] if evidence else None,
        stability=None if stability is None else StabilityResult.model_validate(stability.to_json()),
        error=None,
    )


def _nothing_scored(found: Sequence[PictureResult]) -> RequestError:
    """The refusal of a request without one picture that can be scored; its status where all have the same fault."""
    problems = [(result.index, result.error) for result in found if result.error is not None]
    codes = {problem.code for _, problem in problems}
    code = codes.pop() if len(codes) == 1 else "unreadable_picture"
    return RequestError(
        "request",
        got=problems[0][1].message if len(problems) == 1 else f"{len(problems)} pictures that cannot be scored",
        wanted="at least one that can",
        remedy="see what is wrong with each, under pictures",
        status=_STATUSES[code],
        code=code,
        pictures=[{"index": index, **problem.model_dump()} for index, problem in problems],
    )
