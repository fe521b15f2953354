"""The manifest of a model bundle: everything that is to be known about a model besides its weights.

`manifest.json` is canonical JSON with the SHA-256 of itself in `manifest_sha256`. Reading refuses a file that
is not, byte for byte, what writing its content would give, so one changed character is found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.errors import BundleError
from runtime.preprocess import PreprocessSpec
from runtime.replacing import replacing
from runtime.strict_json import ADDED_LATER, canonical_json, from_jsonable, parse_json, to_jsonable

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8")
LABELS = ("real", "fake")
INPUT_NAME = "images"
OUTPUTS = ("logits", "trace_similarity", "embeddings", "evidence")
# Target of an engine that runs on every GPU from compute capability 8.0 on.
AMPERE_PLUS = "ampere-plus"

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Remainder: TypeAlias = Literal["fp32", "fp16"]
ThresholdRule: TypeAlias = Literal["empirical", "conformal"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
# A plain name on every file system: no separators, drives, streams, leading dots or trailing dots.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,126}[A-Za-z0-9_]|[A-Za-z0-9_]")


@dataclass(frozen=True)
class CalibrationSpec:
    """How the raw logits of one precision become probabilities and verdicts.

    Args:
        temperature: the calibrated logit is logit / temperature + bias.
        bias: see temperature.
        real_threshold: raw logit up to which, inclusive, a picture is called real.
        fake_threshold: raw logit above which a picture is called fake; between the two it is uncertain.
        real_flagged_rate: share of real pictures called fake that fake_threshold was fitted for, 0 to 1.
        fake_missed_rate: share of fakes called real that real_threshold was fitted for, 0 to 1.
        threshold_rule: "empirical" keeps the rates on the pictures that were fitted on, "conformal" keeps them in
            expectation on new, exchangeable ones.
    """

    temperature: float
    bias: float
    real_threshold: float
    fake_threshold: float
    real_flagged_rate: float
    fake_missed_rate: float
    threshold_rule: ThresholdRule = field(default="empirical", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            _refuse("calibration.temperature", str(self.temperature), "more than 0", "fit the calibration again")
        if not self.real_threshold <= self.fake_threshold:
            got = f"real_threshold {self.real_threshold} above fake_threshold {self.fake_threshold}"
            _refuse("calibration", got, "real_threshold <= fake_threshold", "fit the calibration again")
        for rate in (self.real_flagged_rate, self.fake_missed_rate):
            if not 0 <= rate <= 1:
                _refuse("calibration", f"a rate of {rate}", "a share, 0 to 1", "fit the calibration again")

    def calibrated(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Calibrated logits, float64, of the same shape."""
        return np.asarray(logits, dtype=np.float64) / self.temperature + self.bias

    def fake_probability(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Calibrated probability of being fake, float64 in 0..1, of the same shape."""
        # 0.5 (1 + tanh(x / 2)) is the sigmoid without an overflow at either end.
        return 0.5 * (1.0 + np.tanh(0.5 * self.calibrated(logits)))

    def verdicts(self, logits: ArrayLike) -> NDArray[np.str_]:
        """ "real", "uncertain" or "fake" for each raw logit, of the same shape."""
        values = np.asarray(logits, dtype=np.float64)
        decided = np.where(values <= self.real_threshold, "real", "uncertain")
        return np.where(values > self.fake_threshold, "fake", decided)


@dataclass(frozen=True)
class ProfileSpec:
    """Batch sizes that an engine was optimised for."""

    min_batch: int
    opt_batch: int
    max_batch: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            got = f"{self.min_batch}/{self.opt_batch}/{self.max_batch}"
            _refuse("profile", got, "1 <= min_batch <= opt_batch <= max_batch", "build the engine again")


@dataclass(frozen=True)
class ParitySpec:
    """One comparison of an artifact with a reference on the same pictures.

    Args:
        backend: what ran the artifact.
        reference: what it was compared with, for example "torch fp32".
        pictures: how many pictures were compared.
        logit_diff_max: largest absolute difference of a raw logit.
        logit_diff_mean: mean absolute difference of the raw logits.
        ap_change_points: change of the average precision in percentage points; None where it is undefined.
        accuracy_change_points: change of the accuracy in percentage points.
        verdict_flips: pictures whose verdict differs.
        opposite_verdicts: those of them that one calls real and the other fake.
        passed: whether the stated limits were kept.
    """

    backend: str
    reference: str
    pictures: int
    logit_diff_max: float
    logit_diff_mean: float
    ap_change_points: float | None
    accuracy_change_points: float
    verdict_flips: int
    opposite_verdicts: int
    passed: bool


@dataclass(frozen=True)
class EngineSpec:
    """How an engine was built, as far as `ArtifactSpec` does not say it.

    Args:
        source: file name of the ONNX graph it was built from.
        source_sha256: of that graph.
        cache_key: SHA-256 of the graph, the options and the builder; an engine with this key need not be built again.
        gpu: name of the GPU it was built on; None where the build used none.
        workspace_mib: limit of the memory that a layer may use beside its tensors, in MiB; None without a limit.
        version_compatible: whether newer versions of TensorRT run it.
        hardware_compatible: whether it runs on newer GPUs than the one it was built on.
        layers: how many layers there are of each kind and data types, for example {"correlation Half": 15}.
        tf32: whether products of FP32 tensors may keep 10 bits on Ampere and newer GPUs, as TensorRT has it by itself;
            true of engines from before this was recorded.
    """

    source: str
    source_sha256: str
    cache_key: str
    gpu: str | None
    workspace_mib: int | None
    version_compatible: bool
    hardware_compatible: bool
    layers: dict[str, int]
    tf32: bool = field(default=True, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        _check_sha256("engine.source_sha256", self.source_sha256)
        _check_sha256("engine.cache_key", self.cache_key)


@dataclass(frozen=True)
class ArtifactSpec:
    """One model file of a bundle: an ONNX graph or an engine.

    Args:
        file: plain file name inside the bundle.
        format: "onnx" or "engine".
        precision: "fp32", "fp16" or "int8".
        sha256: of the file, 64 hexadecimal digits.
        size_bytes: of the file.
        opset: of an ONNX graph; None for an engine.
        profile: of an engine; None for an ONNX graph, whose batch is free.
        flavour: "trt" or "rtx" for an engine; None for an ONNX graph.
        targets: what an engine runs on, for example ("sm89",); empty for an ONNX graph.
        builder: program and version that wrote the file.
        versions: further packages that shaped the file, with their versions.
        higher_precision_layers: nodes kept above `precision`, each with the reason.
        parity: comparisons made with this very file.
        engine: how an engine was built; None for an ONNX graph.
        remainder: what an INT8 file computes in between its integer layers; "fp32" for every other file.
    """

    file: str
    format: Literal["onnx", "engine"]
    precision: Precision
    sha256: str
    size_bytes: int
    opset: int | None
    profile: ProfileSpec | None
    flavour: Literal["trt", "rtx"] | None
    targets: tuple[str, ...]
    builder: str
    versions: dict[str, str]
    higher_precision_layers: dict[str, str]
    parity: tuple[ParitySpec, ...]
    engine: EngineSpec | None = field(default=None, metadata=ADDED_LATER)
    remainder: Remainder = field(default="fp32", metadata=ADDED_LATER)


@dataclass(frozen=True)
class PicturesSpec:
    """A file of the bundle that is about some pictures.

    Args:
        file: plain file name inside the bundle.
        sha256: of the file, 64 hexadecimal digits.
        size_bytes: of the file.
        pictures: how many it is about.
    """

    file: str
    sha256: str
    size_bytes: int
    pictures: int


@dataclass(frozen=True)
class GoldenSpec(PicturesSpec):
    """The file of golden inputs and outputs: NumPy arrays `images` and `<precision>.<output>`."""


@dataclass(frozen=True)
class CalibrationListSpec(PicturesSpec):
    """The list of the pictures that INT8 ranges were measured on: names, labels and hashes, no pixels."""


@dataclass(frozen=True)
class ModelManifest:
    """What a bundle says about its model; construction checks that the parts fit each other.

    Args:
        schema_version: of this layout.
        name: of the model, for people.
        encoder: timm name of the encoder.
        preprocess: what is done to a picture before the graph sees it.
        labels: meaning of label 0 and 1.
        outputs: of every graph, in order.
        embedding_dim: width of `embeddings`.
        evidence_shape: rows and columns of `evidence`.
        calibration: for each precision that has an artifact.
        mean_trace: mean natural trace, embedding_dim values.
        artifacts: the model files.
        golden: inputs with the outputs they must give, if there are any.
        checkpoint_sha256: of the weights that were exported.
        training_data_sha256: of the training pictures and labels.
        calibration_data_sha256: of the pictures that calibrated scores and INT8 ranges.
        calibration_pictures: how many those were.
        tool_version: version of the toolkit that wrote the bundle.
        tool_commit: its git commit, or "unknown".
        calibration_list: which pictures INT8 ranges were measured on; None where nothing was quantised.

    Raises:
        BundleError: the parts contradict each other.
    """

    schema_version: int
    name: str
    encoder: str
    preprocess: PreprocessSpec
    labels: tuple[str, ...]
    outputs: tuple[str, ...]
    embedding_dim: int
    evidence_shape: tuple[int, int]
    calibration: dict[str, CalibrationSpec]
    mean_trace: tuple[float, ...]
    artifacts: tuple[ArtifactSpec, ...]
    golden: GoldenSpec | None
    checkpoint_sha256: str
    training_data_sha256: str
    calibration_data_sha256: str
    calibration_pictures: int
    tool_version: str
    tool_commit: str
    calibration_list: CalibrationListSpec | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        _check_schema_version(self.schema_version)
        _check_graph_facts(self)
        _check_precisions(self)
        _check_files(self.files())
        for name in ("checkpoint_sha256", "training_data_sha256", "calibration_data_sha256"):
            _check_sha256(f"manifest.{name}", getattr(self, name))

    def files(self) -> tuple[ArtifactSpec | PicturesSpec, ...]:
        """Every file that the bundle must hold besides the manifest."""
        return self.artifacts + tuple(spec for spec in (self.golden, self.calibration_list) if spec is not None)

    def onnx_artifact(self, precision: str, remainder: Remainder = "fp32") -> ArtifactSpec | None:
        """The ONNX graph of a precision with that remainder, or None."""
        wanted = ("onnx", precision, remainder)
        return next((a for a in self.artifacts if (a.format, a.precision, a.remainder) == wanted), None)

    def onnx_precisions(self) -> tuple[str, ...]:
        """Precisions of which there is an ONNX graph, widest first."""
        return tuple(precision for precision in PRECISIONS if self.onnx_artifact(precision) is not None)


def manifest_to_json(manifest: ModelManifest) -> str:
    """Text of `manifest.json`, its own hash included; equal manifests give equal bytes.

    Raises:
        BundleError: a field holds a value of another type than it declares.
    """
    plain = to_jsonable(manifest)
    return canonical_json(plain | {"manifest_sha256": _text_sha256(canonical_json(plain))})


def manifest_from_json(text: str) -> ModelManifest:
    """Manifest of a text, which must be exactly what `manifest_to_json` would write.

    Raises:
        BundleError: no JSON, another schema, an unknown, missing or mistyped field, a hash that does not
            match, or any byte that writing would not produce.
    """
    plain = parse_json(text, subject=MANIFEST_FILE)
    if not isinstance(plain, dict):
        _refuse(MANIFEST_FILE, f"a {type(plain).__name__}", "a JSON object", "export the model again")
    _check_schema_version(plain.get("schema_version"))
    stated = plain.pop("manifest_sha256", None)
    manifest = from_jsonable(ModelManifest, plain)
    if not _is_canonical(text, plain, stated, manifest):
        _refuse(
            MANIFEST_FILE,
            "a text that does not match its own manifest_sha256",
            "the file as the export wrote it",
            "copy the bundle again, or export it again; manifests are not edited by hand",
        )
    return manifest


def save_manifest(manifest: ModelManifest, folder: Path) -> None:
    """Writes `manifest.json` into a folder: complete or not at all.

    Args:
        manifest: what to write.
        folder: the bundle; it must exist.

    Raises:
        BundleError: a field holds a value of another type than it declares.
    """
    data = manifest_to_json(manifest).encode()
    with replacing(Path(folder) / MANIFEST_FILE) as file:
        file.write(data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_canonical(text: str, plain: object, stated: object, manifest: ModelManifest) -> bool:
    try:
        return stated == _text_sha256(canonical_json(plain)) and text == manifest_to_json(manifest)
    except UnicodeEncodeError:  # JSON can escape what no text holds: half of a surrogate pair
        return False


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse(subject: str, got: str, wanted: str, remedy: str) -> NoReturn:
    raise BundleError(subject, got=got, wanted=wanted, remedy=remedy)


def _check_schema_version(version: object) -> None:
    if type(version) is not int or version != SCHEMA_VERSION:
        remedy = "install the version of the toolkit that wrote the bundle, or export the model with this one"
        _refuse("manifest.schema_version", repr(version), str(SCHEMA_VERSION), remedy)


def _check_graph_facts(manifest: ModelManifest) -> None:
    remedy = "export the model again"
    if not manifest.name.strip():
        _refuse("manifest.name", repr(manifest.name), "a name", remedy)
    if tuple(manifest.labels) != LABELS:
        _refuse("manifest.labels", repr(manifest.labels), repr(LABELS), remedy)
    if tuple(manifest.outputs) != OUTPUTS:
        _refuse("manifest.outputs", repr(manifest.outputs), repr(OUTPUTS), remedy)
    if manifest.embedding_dim < 1 or len(manifest.mean_trace) != manifest.embedding_dim:
        got = f"{len(manifest.mean_trace)} values"
        _refuse("manifest.mean_trace", got, f"embedding_dim = {manifest.embedding_dim} values", remedy)
    if min(manifest.evidence_shape) < 1:
        _refuse("manifest.evidence_shape", repr(manifest.evidence_shape), "at least (1, 1)", remedy)


def _check_precisions(manifest: ModelManifest) -> None:
    unknown = sorted(set(manifest.calibration) - set(PRECISIONS))
    if unknown:
        _refuse("manifest.calibration", repr(unknown[0]), f"one of {', '.join(PRECISIONS)}", "export again")
    for artifact in manifest.artifacts:
        if artifact.precision not in manifest.calibration:
            got = f"no calibration for {artifact.precision}, the precision of {artifact.file}"
            _refuse("manifest.calibration", got, "one for each precision", "export the model again")
    onnx = [(artifact.precision, artifact.remainder) for artifact in manifest.artifacts if artifact.format == "onnx"]
    if len(onnx) != len(set(onnx)):
        _refuse("manifest.artifacts", "two ONNX graphs of one precision", "at most one", "export the model again")


def _check_files(files: Iterable[ArtifactSpec | PicturesSpec]) -> None:
    seen: set[str] = {MANIFEST_FILE}
    for spec in files:
        if not _FILE_NAME.fullmatch(spec.file):
            wanted = "a plain file name (letters, digits, '.', '_', '+', '-') inside the bundle"
            _refuse(
                "manifest file name",
                repr(spec.file),
                wanted,
                "do not use this bundle; export the model again",
            )
        # Case is folded because two names that differ in case alone are one file on some systems.
        if spec.file.lower() in seen:
            _refuse("manifest file name", f"{spec.file!r} twice", "each name once", "export the model again")
        seen.add(spec.file.lower())
        _check_sha256(f"{spec.file}: sha256", spec.sha256)
        if spec.size_bytes < 1:
            _refuse(f"{spec.file}: size_bytes", str(spec.size_bytes), "at least 1", "export the model again")


def _check_sha256(subject: str, value: str) -> None:
    if not _SHA256.fullmatch(value):
        _refuse(subject, repr(value), "64 hexadecimal digits", "export the model again")
