"""The detectors that `train.run --method` trains: one table, and nothing else decides.

All leave the same run folder and go through the same export and runtime. A method without natural traces has a
`trace_similarity` of 0 for every picture, and its `embeddings` come from a projection that was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from train.errors import ConfigError

if TYPE_CHECKING:  # train.config has a method among its fields
    from train.config import RunConfig

Method = Literal["ntf", "bce", "probe", "nearest", "wang2020", "gragnaniello2021", "xception"]


@dataclass(frozen=True)
class MethodSpec:
    """What a method trains, and what it begins with.

    Attributes:
        natural_traces: stage 1, and the contrastive loss with its traces in stage 2; without, cross entropy alone.
        trains_encoder: stage 2 changes the encoder.
        neighbours: stage 2 trains nothing: it keeps the training pictures' embeddings, which a picture is compared to.
        model: fields of `ModelConfig` that the method sets.
        augment: fields of `AugmentConfig` that it sets.
    """

    natural_traces: bool = False
    trains_encoder: bool = False
    neighbours: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    augment: Mapping[str, Any] = field(default_factory=dict)


# The user names the file of ImageNet weights: no package has them.
_RESNET50 = {"encoder": "resnet50", "encoder_weights": ""}
# Each with a probability of 0.5, their "Blur+JPEG (0.5)".
_WANG2020 = {"blur_share": 0.5, "blur_sigma": (0.0, 3.0), "jpeg_share": 0.5, "jpeg_quality": (30, 100)}
# They name the kinds of change that they add to it, not how often and how strong: shares and ranges are ours.
_STRONG = _WANG2020 | {
    "rescale_share": 0.5,
    "rescale_factor": (0.5, 1.5),
    "noise_share": 0.5,
    "noise_std": (0.0, 10.0),
    "colour_jitter": 0.2,
}

METHODS: dict[Method, MethodSpec] = {
    # Liang et al. 2024 (arXiv:2403.16513), both stages
    "ntf": MethodSpec(natural_traces=True),
    # the whole network with cross entropy
    "bce": MethodSpec(trains_encoder=True),
    # a linear layer on the frozen encoder
    "probe": MethodSpec(),
    # the nearest neighbours on the frozen encoder: Ojha et al. 2023 (arXiv:2302.10174)
    "nearest": MethodSpec(neighbours=True),
    # bce on the encoder, and with the augmentation, of Wang et al. 2020 (arXiv:1912.11035)
    "wang2020": MethodSpec(trains_encoder=True, model=_RESNET50, augment=_WANG2020),
    # Gragnaniello et al. 2021 (arXiv:2104.02617): the same without early down-sampling, augmented more strongly
    "gragnaniello2021": MethodSpec(
        trains_encoder=True, model=_RESNET50 | {"early_downsampling": False}, augment=_STRONG
    ),
    # Roessler et al. 2019 (arXiv:1901.08971)
    "xception": MethodSpec(trains_encoder=True, model={"encoder": "legacy_xception", "encoder_weights": ""}),
}


def with_method(config: RunConfig, method: Method) -> RunConfig:
    """Starting values of a method: those of `config` with what the method sets. Options go on top, so they win."""
    spec = METHODS[method]
    model = dict(spec.model) if spec.natural_traces else {"classifier_input": "encoder", **spec.model}
    return replace(
        config,
        method=method,
        model=replace(config.model, **model),
        augment=replace(config.augment, **spec.augment),
    )


def encoder_stays_frozen(config: RunConfig) -> bool:
    """Whether no stage of the run changes the encoder."""
    method = METHODS[config.method]
    if method.natural_traces:
        return not config.stage1.train_encoder and config.stage2.train_encoder_blocks == 0
    return not method.trains_encoder


def check_method(config: RunConfig) -> None:
    """Refuse options that the method has no use for.

    Raises:
        ConfigError: naming the option.
    """
    method = METHODS[config.method]
    if not method.natural_traces and config.model.classifier_input != "encoder":
        raise ConfigError(
            f"--method {config.method}",
            got=f"--classifier-input {config.model.classifier_input}",
            wanted="encoder: there is no projection that was trained",
            remedy="pass --classifier-input encoder",
        )
    blocks = config.stage2.train_encoder_blocks
    if blocks and not method.natural_traces:
        raise ConfigError(
            f"--stage2.train-encoder-blocks {blocks}",
            got=f"--method {config.method}",
            wanted="ntf, whose stage 2 has a frozen encoder otherwise",
            remedy="leave it out, or take --method bce to train the whole encoder",
        )
    if config.cache.cache_features and (method.trains_encoder or blocks):
        trainer = f"--stage2.train-encoder-blocks {blocks}" if blocks else f"--method {config.method}"
        raise ConfigError(
            "--cache-features",
            got=f"{trainer}, which trains the encoder",
            wanted="a frozen encoder, whose embeddings stay as they are",
            remedy="leave it out",
        )
    trained_before = method.natural_traces and config.stage1.train_encoder
    if config.model.standardize and (method.trains_encoder or trained_before):
        trainer = "--stage1.train-encoder" if trained_before else f"--method {config.method}"
        raise ConfigError(
            "--standardize",
            got=f"{trainer}, which trains the encoder",
            wanted="a frozen encoder, whose embeddings stay as they are",
            remedy="pass --no-stage1.train-encoder" if trained_before else "leave it out",
        )
    if config.model.encoder_input == "both" and (method.trains_encoder or trained_before):
        raise ConfigError(
            "--encoder-input both",
            got="--stage1.train-encoder" if trained_before else f"--method {config.method}, which trains the encoder",
            wanted="a frozen encoder: batch norm cannot follow the statistics of pixels and of residuals at once",
            remedy="pass --no-stage1.train-encoder" if trained_before else "take --encoder-input residual, or rgb",
        )
    _check_neighbours(config, method)


def _check_neighbours(config: RunConfig, method: MethodSpec) -> None:
    """Each of these would otherwise change nothing without a word."""
    if not method.neighbours:
        unused = {"--nearest-k or --nearest-bank": config.nearest != type(config.nearest)()}
        wanted = "--method nearest, which has neighbours"
    else:
        unused = {
            "--cache-features": config.cache.cache_features,
            "an option of augmentation": config.augment != type(config.augment)(),
            "--precision bf16": config.compute.precision != "fp32",
            "--compile": config.compute.compile,
            "--standardize": config.model.standardize,
        }
        wanted = "one pass over centre crops with the float32 encoder that is shipped"
    for option, passed in unused.items():
        if passed:
            raise ConfigError(f"--method {config.method}", got=option, wanted=wanted, remedy="leave it out")
