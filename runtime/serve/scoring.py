"""Pictures of a request to results, while the client is there and the time allows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.requests import ClientDisconnect, Request

from runtime.changes import CHANGES
from runtime.decode import check_header
from runtime.detector import Detection
from runtime.errors import (
    BackendError,
    NTFError,
    PictureError,
    PictureFormatError,
    PictureMemoryError,
    PictureTooLargeError,
)
from runtime.serve.bodies import Picture, PictureRequest
from runtime.serve.request_errors import RequestError
from runtime.serve.schemas import PictureProblem, PictureResult, StabilityResult
from runtime.serve.state import ServerState
from runtime.serve.workers import deadline_error

_T = TypeVar("_T")


class PictureFault(NamedTuple):
    """Why a picture has no verdict, for programs, and the status of a request that has nothing else to tell."""

    code: str
    status: int


FAULTS: dict[type[NTFError], PictureFault] = {
    PictureTooLargeError: PictureFault("too_many_pixels", 413),
    PictureFormatError: PictureFault("unknown_format", 415),
    PictureError: PictureFault("unreadable_picture", 422),
    # These are faults of the server.
    BackendError: PictureFault("score_not_finite", 500),
    PictureMemoryError: PictureFault("out_of_memory", 503),
}
STATUSES = {fault.code: fault.status for fault in FAULTS.values()}


async def results(request: Request, wanted: PictureRequest, state: ServerState) -> list[PictureResult]:
    """A result for each picture, in order, at least one of them with a verdict.

    Raises:
        RequestError: 429 for a server with too much to do; 413, 415 or 422 where no picture can be scored.
        DeadlineError: the time of the request is over.
        ClientDisconnect: the client went away; its pictures have left the queue.
    """
    pictures, limits = wanted.pictures, state.settings.limits
    # Reading a header takes a fraction of a millisecond for most files, and a tenth of a second for a hostile one.
    problems = await state.workers.run(
        partial(_header_problems, pictures, limits.max_pixels), timeout_s=remaining_s(request)
    )
    readable = [picture for picture, problem in zip(pictures, problems, strict=True) if problem is None]
    detections = iter(await _detections(request, readable, wanted.stability, state) if readable else ())
    result = partial(_result, evidence=wanted.evidence, natural_traces=state.natural_traces)
    found = [
        _failed(index, picture, problem) if problem else result(index, picture, next(detections))
        for index, (picture, problem) in enumerate(zip(pictures, problems, strict=True))
    ]
    for one in found:
        if one.error is None:
            state.metrics.verdicts.labels(one.verdict).inc()
            continue
        state.metrics.errors.labels(one.error.code).inc()
        if STATUSES[one.error.code] >= 500:
            logging.getLogger(__name__).error("%s", one.error.message)
    if all(one.error is not None for one in found):
        raise _nothing_scored(found)
    return found


def remaining_s(request: Request) -> float:
    """Seconds that the request may still take.

    Raises:
        DeadlineError: none are left.
    """
    seconds = float(request.scope["deadline_s"] - time.monotonic())
    if seconds <= 0:
        raise deadline_error()
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
        return _problem_of(error)
    return None


def _problem_of(error: NTFError) -> PictureProblem:
    fault = next(FAULTS[kind] for kind in type(error).__mro__ if kind in FAULTS)
    return PictureProblem(code=fault.code, message=str(error))


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


def _result(
    index: int, picture: Picture, detection: Detection, *, evidence: bool, natural_traces: bool
) -> PictureResult:
    if detection.cause is not None:
        return _failed(index, picture, _problem_of(detection.cause))
    stability = detection.stability
    return PictureResult(
        index=index,
        name=picture.name,
        is_ai_generated=detection.fake_probability,
        possible_sources={},
        status="SUCCESS",
        verdict=detection.verdict,
        fake_probability=detection.fake_probability,
        trace_similarity=detection.trace_similarity if natural_traces else None,
        evidence=detection.to_json()["evidence"] if evidence else None,
        stability=None if stability is None else StabilityResult.model_validate(stability.to_json()),
        error=None,
    )


def _nothing_scored(found: Sequence[PictureResult]) -> RequestError:
    """The refusal of a request without one picture that can be scored; its status where all have the same fault."""
    problems = [(result.index, result.error) for result in found if result.error is not None]
    codes = {problem.code for _, problem in problems}
    # A fault of the server is told whatever else is wrong.
    faulty = sorted(code for code in codes if STATUSES[code] >= 500)
    code = faulty[0] if faulty else codes.pop() if len(codes) == 1 else "unreadable_picture"
    return RequestError(
        "request",
        got=problems[0][1].message if len(problems) == 1 else f"{len(problems)} pictures that cannot be scored",
        wanted="at least one that can",
        remedy="see what is wrong with each, under pictures",
        status=STATUSES[code],
        retry_after_s=1 if STATUSES[code] == 503 else None,
        code=code,
        pictures=[{"index": index, **problem.model_dump()} for index, problem in problems],
    )
