"""Layer by layer: the inner tensors of two ONNX graphs on the same pictures, and the first that is too far off.

Both graphs run in plain onnxruntime with its optimisations off, so that every tensor exists under its own name. Integer
layers are then computed as their Q/DQ nodes say, in floating point: what is found is in the graph, not in the kernels
of a back-end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from export.calibration import BATCH_SIZE, Batches
from export.errors import ExportError
from export.graph import producers, remove_unused, with_outputs
from export.session import open_session
from runtime.manifest import INPUT_NAME

# They hand on the tensor that they read, in another type.
PASSING_OPS = ("Cast", "QuantizeLinear", "DequantizeLinear")
VALUE_BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}
# Values of both graphs that are held at once; one tensor more is held in double precision.
MEMORY_BYTES = 256 << 20
# SQNR that no tensor may fall below by default: noise of 3 % and of 32 %. The worst tensors of a trained
# EfficientNet-lite0 had 37 dB and 14 dB.
BOUNDS_DB: Mapping[str, float] = {"fp16": 30.0, "int8": 10.0}
# The ends stand for "not finite" and "equal".
WORST_DB, EQUAL_DB = -200.0, 200.0

Values: TypeAlias = "NDArray[np.floating]"
Run: TypeAlias = Callable[[NDArray[np.uint8]], Mapping[str, Values]]


@dataclass(frozen=True)
class TensorPair:
    """A tensor of the FP32 graph and one of the other graph that stands for it."""

    reference: str
    other: str


@dataclass(frozen=True)
class MatchedTensors:
    """Which tensors of two graphs are the same.

    Attributes:
        pairs: in the order of the other graph; a tensor and its quantised or cast copy are a pair each.
        reference_only: float tensors of the FP32 graph without a counterpart.
        other_only: float tensors of the other graph without one.
    """

    pairs: tuple[TensorPair, ...]
    reference_only: tuple[str, ...]
    other_only: tuple[str, ...]


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from its counterpart, over all pictures.

    Attributes:
        tensor: its name in the FP32 graph.
        compared: its name in the other graph.
        node: that makes it there.
        op_type: of that node.
        sqnr_db: signal to quantisation noise, 10 log10(sum a^2 / sum (a - b)^2), kept to WORST_DB..EQUAL_DB.
        own_sqnr_db: the same with the noise of the worst tensor that the node reads taken off: what the node adds.
        max_relative_error: largest difference over the largest magnitude of the FP32 tensor.
        mean_relative_error: mean difference over its mean magnitude.
    """

    tensor: str
    compared: str
    node: str
    op_type: str
    sqnr_db: float
    own_sqnr_db: float
    max_relative_error: float
    mean_relative_error: float


@dataclass(frozen=True)
class LayerComparison:
    """All tensors of a graph against those of its FP32 graph.

    Attributes:
        precision: of the graph.
        pictures: how many were run.
        bound_db: SQNR below which a tensor is too far off.
        layers: in the order of the graph.
        reference_only: tensors of the FP32 graph without a counterpart.
        graph_only: tensors of the graph without one.
    """

    precision: str
    pictures: int
    bound_db: float
    layers: tuple[TensorError, ...]
    reference_only: tuple[str, ...]
    graph_only: tuple[str, ...]

    @property
    def culprit(self) -> TensorError | None:
        """The first tensor, in the order of the graph, whose error passes the bound."""
        return next((layer for layer in self.layers if layer.sqnr_db < self.bound_db), None)

    def broken(self) -> list[str]:
        """The culprit in words; empty where there is none."""
        if (layer := self.culprit) is None:
            return []
        name = layer.tensor if layer.tensor == layer.compared else f"{layer.tensor}, as {layer.compared},"
        return [
            f"tensor {name} of node {layer.node} ({layer.op_type}) is the first with too much noise: SQNR "
            f"{layer.sqnr_db:.1f} dB, at least {self.bound_db:g} dB"
        ]


def compare_layers(
    reference: ModelProto, graph: ModelProto, batches: Batches, *, precision: str, bound_db: float
) -> LayerComparison:
    """Every inner float tensor of a graph against its counterpart in the FP32 graph.

    Args:
        reference: FP32 graph.
        graph: rewritten from it, with or without Q/DQ nodes and casts.
        batches: gives the pictures, at most BATCH_SIZE at once, afresh at each call.
        precision: name of the graph, for the record.
        bound_db: SQNR that no tensor may fall below.

    Raises:
        ExportError: the graphs have no tensor in common.

    Note:
        Runs both graphs over all pictures once for each MEMORY_BYTES of tensors.
    """
    matched = match_tensors(reference, graph)
    if not matched.pairs:
        raise ExportError(
            f"layers of the {precision} graph",
            got="no tensor that the FP32 graph has as well",
            wanted="a graph that was rewritten from it",
            remedy="export both again",
        )
    ours, theirs = float_activations(reference), float_activations(graph)
    sums: dict[TensorPair, _Sums] = {}
    for group in _groups(matched.pairs, ours, theirs):
        run_reference = _opened(reference, {pair.reference: ours[pair.reference] for pair in group})
        run_graph = _opened(graph, {pair.other: theirs[pair.other] for pair in group})
        sums |= _sums_of_group(run_reference, run_graph, group, batches)
    pictures = next(iter(sums.values())).pictures
    layers = tuple(_layer_errors(graph, sums))
    return LayerComparison(precision, pictures, bound_db, layers, matched.reference_only, matched.other_only)


@dataclass(frozen=True)
class Activation:
    """Type and size of a tensor that depends on the pictures.

    Attributes:
        elem_type: ONNX element type, float32 or float16.
        elements: for one picture.
    """

    elem_type: int
    elements: int

    @property
    def size_bytes(self) -> int:
        """Bytes for one picture."""
        return self.elements * VALUE_BYTES[self.elem_type]


def float_activations(model: ModelProto) -> dict[str, Activation]:
    """The float32 and float16 tensors that depend on the pictures, by name, in the order of the graph."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    depending = {value.name for value in model.graph.input}
    found: dict[str, Activation] = {}
    for node in model.graph.node:
        if not depending.intersection(node.input):
            continue
        depending.update(node.output)
        for name in node.output:
            if name in types and types[name].elem_type in VALUE_BYTES:
                sizes = [max(1, d.dim_value) for d in types[name].shape.dim]  # the batch is 0, as every free size
                found[name] = Activation(types[name].elem_type, int(np.prod(sizes)))
    return found


def match_tensors(reference: ModelProto, other: ModelProto) -> MatchedTensors:
    """Pairs of tensors with the same name, and of those that only Q/DQ nodes and casts separate from such a name.

    Args:
        reference: FP32 graph.
        other: graph whose tensors are looked up in it.
    """
    wanted, present = float_activations(reference), float_activations(other)
    origins = _origins(other)
    named: dict[str, str] = {}
    for name, origin in origins.items():
        if name in wanted:
            named.setdefault(origin, name)
    twins = {name: name if name in wanted else named.get(origins[name]) for name in present}
    pairs = tuple(TensorPair(twin, name) for name, twin in twins.items() if twin is not None)
    matched = {pair.reference for pair in pairs}
    return MatchedTensors(
        pairs,
        tuple(name for name in wanted if name not in matched),
        tuple(name for name, twin in twins.items() if twin is None),
    )


def _origins(model: ModelProto) -> dict[str, str]:
    """The tensor that each tensor is a quantised or cast copy of, itself where it is none."""
    origins = {value.name: value.name for value in model.graph.input}
    for node in model.graph.node:
        for name in node.output:
            origins[name] = origins.get(node.input[0], name) if node.op_type in PASSING_OPS else name
    return origins


def _groups(
    pairs: Iterable[TensorPair], ours: Mapping[str, Activation], theirs: Mapping[str, Activation]
) -> Iterator[list[TensorPair]]:
    """Consecutive pairs of which a batch fits into MEMORY_BYTES, at least one each."""
    group: list[TensorPair] = []
    held = 0
    for pair in pairs:
        size_bytes = BATCH_SIZE * (ours[pair.reference].size_bytes + theirs[pair.other].size_bytes)
        if group and held + size_bytes > MEMORY_BYTES:
            yield group
            group, held = [], 0
        group.append(pair)
        held += size_bytes
    yield group


def _sums_of_group(
    run_reference: Run, run_graph: Run, group: Sequence[TensorPair], batches: Batches
) -> dict[TensorPair, _Sums]:
    sums = {pair: _Sums() for pair in group}
    for images in batches():
        ours, theirs = run_reference(images), run_graph(images)
        for pair in group:
            sums[pair].add(ours[pair.reference], theirs[pair.other], pictures=len(images))
    return sums


def _opened(model: ModelProto, tensors: Mapping[str, Activation]) -> Run:
    """The graph up to some of its tensors, which are its outputs now, in onnxruntime without optimisations."""
    asked = list(tensors)
    probe = with_outputs(model, asked)
    for output in probe.graph.output:
        output.type.tensor_type.elem_type = tensors[output.name].elem_type
    remove_unused(probe)
    session = open_session(probe, optimize=False)
    return lambda images: dict(zip(asked, session.run(asked, {INPUT_NAME: images}), strict=True))


@dataclass
class _Sums:
    """Signal and noise of one pair, added up over the pictures."""

    pictures: int = 0
    signal: float = 0.0
    noise: float = 0.0
    magnitude: float = 0.0
    difference: float = 0.0
    largest_magnitude: float = 0.0
    largest_difference: float = 0.0

    def add(self, ours: Values, theirs: Values, *, pictures: int) -> None:
        reference = ours.astype(np.float64)
        difference = np.abs(theirs.astype(np.float64) - reference)
        # A value that is not finite is infinitely far off: NaN would be lost in a maximum.
        difference[~np.isfinite(difference)] = np.inf
        magnitude = np.abs(reference)
        self.pictures += pictures
        self.signal += float((magnitude**2).sum())
        self.noise += float((difference**2).sum())
        self.magnitude += float(magnitude.sum())
        self.difference += float(difference.sum())
        self.largest_magnitude = max(self.largest_magnitude, float(magnitude.max(initial=0.0)))
        self.largest_difference = max(self.largest_difference, float(difference.max(initial=0.0)))

    @property
    def noise_ratio(self) -> float:
        """Noise power over signal power; infinite where there is noise alone."""
        return _ratio(self.noise, self.signal)


def _layer_errors(graph: ModelProto, sums: Mapping[TensorPair, _Sums]) -> Iterator[TensorError]:
    makers = producers(graph)
    ratios = {pair.other: found.noise_ratio for pair, found in sums.items()}
    for pair, found in sums.items():
        node = makers[pair.other]
        inherited = max((ratios.get(name, 0.0) for name in node.input), default=0.0)
        added = found.noise_ratio - inherited if np.isfinite(inherited) else 0.0
        yield TensorError(
            tensor=pair.reference,
            compared=pair.other,
            node=node.name or pair.other,
            op_type=node.op_type,
            sqnr_db=_decibel(found.noise_ratio),
            own_sqnr_db=_decibel(max(0.0, added)),
            max_relative_error=_ratio(found.largest_difference, found.largest_magnitude),
            mean_relative_error=_ratio(found.difference, found.magnitude),
        )


def _ratio(part: float, whole: float) -> float:
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0.0 else float("inf")


def _decibel(noise_ratio: float) -> float:
    if noise_ratio == 0.0:
        return EQUAL_DB
    if not np.isfinite(noise_ratio):
        return WORST_DB
    return float(np.clip(-10.0 * np.log10(noise_ratio), WORST_DB, EQUAL_DB))
