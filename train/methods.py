"""The detectors that `train.run --method` trains: one table, and nothing else decides.

All leave the same run folder and go through the same export and runtime. A method without natural traces has a
`trace_similarity` of 0 for every picture, and its `embeddings` come from a projection that was not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from train.config import Method, RunConfig
from train.errors import ConfigError


@dataclass(frozen=True)
class MethodSpec:
    """What a method trains.

    Attributes:
        natural_traces: stage 1, and the contrastive loss with its traces in stage 2; without, cross entropy alone.
        trains_encoder: stage 2 changes the encoder.
    """

    natural_traces: bool
    trains_encoder: bool


METHODS: dict[Method, MethodSpec] = {
    "ntf": MethodSpec(natural_traces=True, trains_encoder=False),  # Liang et al. 2024, both stages
    "bce": MethodSpec(natural_traces=False, trains_encoder=True),  # the whole network with cross entropy
    "probe": MethodSpec(natural_traces=False, trains_encoder=False),  # a linear layer on the frozen encoder
}


def method_config(config: RunConfig) -> RunConfig:
    """The configuration with what its method fixes: without natural traces the classifier reads the encoder alone."""
    if METHODS[config.method].natural_traces:
        return config
    return replace(config, model=replace(config.model, classifier_input="encoder"))


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
