"""What goes in and out as JSON; FastAPI writes the OpenAPI page from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

# Of an object in a request; more would cost a message about each.
_MOST_KEYS = 64


class StrictModel(BaseModel):
    """An object in a request: no other keys than these, and no work for one that has very many."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, values: object) -> object:
        if isinstance(values, dict) and len(values) > _MOST_KEYS:
            raise ValueError(f"{len(values)} keys, at most {_MOST_KEYS}")
        return values


class InferRequest(StrictModel):
    """Pictures to be looked at; the payload of NVIDIA's NIM for the same task, with two options of ours."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["data:image/png;base64,..."]}]})

    input: Annotated[list[str], FailFast()] = Field(min_length=1, description="data URLs: `data:image/png;base64,...`")
    evidence: bool = Field(False, description="also give the calibrated logit of each cell of the crop")
    stability: bool = Field(False, description="also score re-encoded and rescaled copies of each picture")


class PictureProblem(BaseModel):
    """Why there is no verdict on a picture."""

    code: str = Field(
        description="too_many_pixels, unknown_format, unreadable_picture, score_not_finite or out_of_memory"
    )
    message: str


class StabilityResult(BaseModel):
    """What becomes of the verdict when the picture is re-encoded and rescaled."""

    spread: float = Field(description="largest less smallest fake probability")
    flips: bool = Field(description="whether a changed copy has another verdict; the picture is uncertain then")
    verdict: Literal["real", "uncertain", "fake"] = Field(description="of the picture as it is")
    fake_probabilities: dict[str, float] = Field(description="by what was done to the picture")


class PictureResult(BaseModel):
    """What the detector says about one picture."""

    index: int = Field(description="place in the request, from 0")
    name: str | None = Field(description="file name that came with an upload")
    is_ai_generated: float | None = Field(description="the same as fake_probability")
    possible_sources: dict[str, float] = Field(description="always empty: the detector does not name generators")
    status: Literal["SUCCESS", "ERROR"]
    verdict: Literal["real", "uncertain", "fake"] | None
    fake_probability: float | None = Field(description="calibrated probability of being generated, 0 to 1")
    trace_similarity: float | None = Field(
        description="cosine with the mean natural trace, -1 to 1; null for a model without natural traces"
    )
    evidence: list[list[float]] | None = Field(description="rows of calibrated logits, above 0 is fake; on request")
    stability: StabilityResult | None = Field(description="on request")
    error: PictureProblem | None


class ModelSummary(BaseModel):
    """The model that scored."""

    name: str
    precision: str
    backend: str


class InferResponse(BaseModel):
    """One result for each picture, in order; at least one of them is a verdict."""

    data: list[PictureResult]
    model: ModelSummary


class ModelInformation(ModelSummary):
    """What a client may want to know before it sends pictures."""

    backend_version: str
    device: str
    input_height: int = Field(description="rows of the centre crop that is looked at")
    input_width: int = Field(description="columns of the centre crop that is looked at")
    real_below: float = Field(description="fake probability up to which a picture is called real")
    fake_above: float = Field(description="fake probability above which a picture is called fake")
    natural_traces: bool = Field(description="whether there is a trace similarity")
    limits: dict[str, Any] = Field(description="what one request may hold")


class Problem(BaseModel):
    """An error: a code for programs, a sentence for people."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class ErrorBody(BaseModel):
    """Every response of 400 and above outside /v2."""

    error: Problem
