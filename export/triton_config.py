"""The `config.pbtxt` of one model in a Triton repository, as Triton's own protocol buffer.

Fields: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from export.errors import ExportError
from runtime.manifest import INPUT_NAME, OUTPUTS, ModelManifest

BackendName: TypeAlias = Literal["onnxruntime", "openvino", "tensorrt_plan"]
Device: TypeAlias = Literal["cpu", "gpu"]

CONFIG_FILE = "config.pbtxt"
# Parameters with this prefix are ours; backends read none of them, clients may.
PREFIX = "ntf_"
INSTALL = 'pip install "ntf-toolkit[train,export,cpu,triton]"'


@dataclass(frozen=True)
class BackendSpec:
    """What Triton has to know about a backend.

    Attributes:
        backend: Triton's name of it.
        platform: the older name of the same, where there is one.
        model_file: that it loads; further files lie beside it.
        batched: whether Triton joins requests to batches. Its OpenVINO backend would then fix the graph's batch at the
            largest size and pad every request to it, so there the batch is a dimension like any other.
        parameters: of the backend itself.
    """

    backend: str
    platform: str
    model_file: str
    batched: bool
    parameters: Mapping[str, str]


BACKENDS: Mapping[BackendName, BackendSpec] = {
    "onnxruntime": BackendSpec("onnxruntime", "onnxruntime_onnx", "model.onnx", True, {}),
    "openvino": BackendSpec("openvino", "", "model.xml", False, {"PERFORMANCE_HINT": "LATENCY"}),
    "tensorrt_plan": BackendSpec("tensorrt", "tensorrt_plan", "model.plan", True, {}),
}


@dataclass(frozen=True)
class Serving:
    """How one model is served.

    Attributes:
        max_batch_size: pictures that Triton joins at most; without effect where it does not join requests.
        preferred_batch_sizes: at which it does not wait for more.
        max_queue_delay_us: microseconds that a request waits for others.
        device: what instances run on.
        instances: how many, on each GPU or on the CPU.
    """

    max_batch_size: int
    preferred_batch_sizes: tuple[int, ...]
    max_queue_delay_us: int
    device: Device
    instances: int

    def __post_init__(self) -> None:
        _require("--max-batch-size", self.max_batch_size, 1)
        _require("--max-queue-delay-us", self.max_queue_delay_us, 0)
        _require("--instances", self.instances, 1)
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise ExportError(
                    "--preferred-batch-sizes",
                    got=str(size),
                    wanted=f"1 to {self.max_batch_size}, the largest batch",
                    remedy="leave it out, or raise --max-batch-size",
                )


def model_config(
    name: str, backend: BackendName, manifest: ModelManifest, serving: Serving, facts: Mapping[str, str]
) -> Any:
    """ModelConfig message of one model.

    Every backend takes `images` (N, H, W, 3) uint8 and gives (N, 1) for the graph's (N,) outputs, because Triton has no
    outputs of a batch dimension alone.

    Args:
        name: of the model, which is also its folder.
        backend: one of BACKENDS.
        manifest: of the bundle; shapes come from it.
        serving: batches, queue and instances.
        facts: written as parameters, with PREFIX before each name.

    Raises:
        ExportError: tritonclient, which has the schema, is not installed.
    """
    from google.protobuf import json_format

    spec = BACKENDS[backend]
    parameters = dict(spec.parameters) | {PREFIX + key: value for key, value in facts.items()}
    plain: dict[str, Any] = {
        "name": name,
        "platform": spec.platform,
        "backend": spec.backend,
        "default_model_filename": spec.model_file,
        "max_batch_size": serving.max_batch_size if spec.batched else 0,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [_input(manifest, batched=spec.batched)],
        "output": [_output(name, manifest, batched=spec.batched) for name in OUTPUTS],
        "instance_group": [{"count": serving.instances, "kind": f"KIND_{serving.device.upper()}"}],
        "model_warmup": [_warmup(size, manifest, batched=spec.batched) for size in _warmup_sizes(serving)],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    if spec.batched:
        plain["dynamic_batching"] = {
            "preferred_batch_size": list(serving.preferred_batch_sizes),
            "max_queue_delay_microseconds": serving.max_queue_delay_us,
        }
    return json_format.ParseDict(plain, _schema().ModelConfig())


def config_text(config: Any) -> str:
    """Text of `config.pbtxt`."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def parsed_config(text: str) -> Any:
    """ModelConfig message of a `config.pbtxt`.

    Raises:
        ExportError: it does not fit the schema, with line and column.
    """
    schema = _schema()
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise ExportError(
            CONFIG_FILE, got=f"a text outside the schema ({error})", wanted="a ModelConfig", remedy="write it again"
        ) from error


def _schema() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError) as error:  # its own RuntimeError says that grpc is missing
        raise ExportError(
            "Triton repository", got=f"no tritonclient ({error})", wanted="its schema", remedy=INSTALL
        ) from error
    return model_config_pb2


def _input(manifest: ModelManifest, *, batched: bool) -> dict[str, Any]:
    size = manifest.preprocess
    dims = [size.height, size.width, 3]
    tensor: dict[str, Any] = {"name": INPUT_NAME, "data_type": "TYPE_UINT8"}
    # Triton has a format for three dimensions only.
    return tensor | ({"format": "FORMAT_NHWC", "dims": dims} if batched else {"dims": [-1, *dims]})


def _output(name: str, manifest: ModelManifest, *, batched: bool) -> dict[str, Any]:
    inner: dict[str, tuple[int, ...]] = {
        "logits": (),
        "trace_similarity": (),
        "embeddings": (manifest.embedding_dim,),
        "evidence": manifest.evidence_shape,
    }
    batch = () if batched else (-1,)
    tensor: dict[str, Any] = {"name": name, "data_type": "TYPE_FP32", "dims": [*batch, *(inner[name] or (1,))]}
    return tensor if inner[name] else tensor | {"reshape": {"shape": list(batch)}}


def _warmup(pictures: int, manifest: ModelManifest, *, batched: bool) -> dict[str, Any]:
    """Noise that is inferred before the first request: allocations and kernel choices are made then."""
    size = manifest.preprocess
    batch = () if batched else (pictures,)
    images = {"data_type": "TYPE_UINT8", "dims": [*batch, size.height, size.width, 3], "random_data": True}
    return {"name": f"batch of {pictures}", "batch_size": pictures if batched else 1, "inputs": {INPUT_NAME: images}}


def _warmup_sizes(serving: Serving) -> list[int]:
    return sorted({1, *serving.preferred_batch_sizes})


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ExportError(name, got=str(value), wanted=f"at least {least}", remedy="leave it out for the default")
