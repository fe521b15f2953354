"""What a person chooses before training: frozen dataclasses, two presets, and JSON both ways.

Every choice that the paper leaves open is one named field; its default is stated beside it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cpp_ext.ops import Backend
from cpp_ext.reference import Denominator, Form
from runtime.errors import BundleError
from runtime.manifest import ThresholdRule
from runtime.strict_json import from_jsonable
from train.encoder import EncoderInput
from train.encoder_weights import PACKAGE_ENCODER, PACKAGE_WEIGHTS
from train.equalize import EqualizeConfig
from train.errors import ConfigError
from train.losses import HomReduction, Orthogonality
from train.methods import METHODS, Method, with_method
from train.model import ClassifierInput
from train.pictures import CorruptPolicy

Preset = Literal["demo", "paper", "edge", "server"]
OptimizerName = Literal["sgd", "adamw"]
DEMO_DATA = "demo"


@dataclass(frozen=True)
class ModelConfig:
    """The networks."""

    encoder: str = PACKAGE_ENCODER
    """timm model name."""
    encoder_weights: str = PACKAGE_WEIGHTS
    """A .safetensors or torch file; "package" (ImageNet weights of tf_efficientnet_lite0); "none" (random)."""
    embedding_dim: int = 128
    """C, width of the projected rows."""
    head_width: int = 0
    """Hidden width of the heads; 0 takes the encoder's, which --encoder-depths can make large."""
    classifier_input: ClassifierInput = "projection"
    """What the classifier reads: z, the encoder's embedding, or both."""
    early_downsampling: bool = True
    """False: stride 1 in the first convolution and its max-pool, where a ResNet or an EfficientNet has 2. The weights
    are the same; a ResNet then does 16 times the work."""
    encoder_depths: tuple[int, ...] = ()
    """Stages of a convolutional network, or blocks of a ViT, counted from 0, that join the embedding: class tokens of a
    ViT, mean and standard deviation of a map. Traces of synthesis are low-level."""
    encoder_input: EncoderInput = "rgb"
    """What the encoder reads: the picture, its high-frequency residual (each pixel without the mean of the 3 x 3 around
    it, amplified), or both, whose two embeddings are joined and cost two passes. The filter is part of the exported
    graph."""
    standardize: bool = False
    """Heads read the frozen encoder's embedding with mean 0 and standard deviation 1 in each dimension, taken over the
    training pictures' centre crops before anything is trained."""

    def encoder_options(self) -> dict[str, Any]:
        """Keyword arguments of `train.encoder.Encoder`: what makes the timm network another encoder."""
        return {
            "early_downsampling": self.early_downsampling,
            "depths": self.encoder_depths,
            "reads": self.encoder_input,
        }


@dataclass(frozen=True)
class LossConfig:
    """Both stages' losses."""

    temperature: float = 0.07
    """tau."""
    lambda_het: float = 1.0
    """Weight of Eq. (1) in Eq. (4); 0 leaves it out."""
    lambda_orth: float = 0.1
    """Weight of Eq. (3) in Eq. (4)."""
    hom_reduction: HomReduction = "max"
    """How Eq. (2) sums up the distances of a batch."""
    hom_topk: int = 16
    """Pairs taken with --hom-reduction topk."""
    orth: Orthogonality = "square"
    """Eq. (3): cos^2, the cosine as printed, or its absolute value."""
    eta: float = 0.5
    """Weight of the natural traces in Eq. (5)."""
    gamma: float = 0.5
    """Weight of the cross entropy in Eq. (7)."""
    scl_weight: float = 1.0
    """Weight of Eq. (5) in Eq. (7); 0 leaves it out, so that cross entropy alone trains projection and classifier."""
    scl_form: Form = "log_sum"
    """Reading of Eq. (5)."""
    scl_denominator: Denominator = "all"
    """K(i) in Eq. (5): all other rows, or the rows of the other label."""
    loss_backend: Backend = "auto"
    """Implementation of Eq. (5): the compiled one, plain PyTorch, or the compiled one where it is built."""


@dataclass(frozen=True)
class AugmentConfig:
    """What a training view shows of a picture, and what happens to it; alike on real and fake pictures.

    Each view draws for itself. Blur and JPEG are those of Wang et al. 2020 (arXiv:1912.11035), with wider qualities.
    """

    crop: int = 0
    """Side in pixels of the random crops that stage 1 and the classifier are trained on; 0 takes the encoder's input
    size, which scores are always taken at. Smaller ones train faster."""
    flip: bool = True
    """Horizontal flip, half of the time."""
    colour_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation, in [0, 1)."""
    grey: float = 0.0
    """Share of the pictures turned grey, in [0, 1]."""
    blur_share: float = 0.0
    """Share of the views that are blurred by a Gaussian."""
    blur_sigma: tuple[float, float] = (0.0, 3.0)
    """Smallest and largest standard deviation of the Gaussian, in pixels."""
    jpeg_share: float = 0.0
    """Share of the views that are stored as JPEG, the last thing that happens to them."""
    jpeg_quality: tuple[int, int] = (30, 100)
    """Smallest and largest JPEG quality."""
    rescale_share: float = 0.0
    """Share of the views that are cropped from a resampled picture."""
    rescale_factor: tuple[float, float] = (0.5, 1.5)
    """Smallest and largest factor of the picture's sides."""
    noise_share: float = 0.0
    """Share of the views with Gaussian noise."""
    noise_std: tuple[float, float] = (0.0, 10.0)
    """Smallest and largest standard deviation of the noise, in grey levels of 255."""


@dataclass(frozen=True)
class Stage1Config:
    """Natural traces, from real pictures alone."""

    epochs: int = 200
    batch_size: int = 256
    """Source images in a batch; each gives two views."""
    optimizer: OptimizerName = "sgd"
    """AdamW has decoupled weight decay, and --stage1.momentum as its beta 1."""
    lr: float = 0.1
    """Largest learning rate; falls to 0 along a cosine."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises to --stage1.lr, before the cosine."""
    momentum: float = 0.9
    weight_decay: float = 1e-3
    train_encoder: bool = True
    """False trains the two heads alone, on an encoder that stays as it was loaded."""


@dataclass(frozen=True)
class Stage2Config:
    """Real against fake, on the frozen encoder."""

    epochs: int = 10
    batch_size: int = 256
    optimizer: OptimizerName = "sgd"
    """As in stage 1."""
    lr: float = 0.1
    warmup_epochs: int = 0
    """As in stage 1."""
    momentum: float = 0.9
    weight_decay: float = 1e-3
    class_balance: bool = False
    """Both classes come alike: real and fake pictures take turns in each batch, those of the rarer class come again
    within an epoch, and the cross entropy weighs the classes of a batch alike."""
    train_encoder_blocks: int = 0
    """Last blocks of the encoder that stage 2 trains as well, with what follows them; batch-norm statistics stay.
    Natural traces are those of the encoder as stage 1 left it: a copy, and a second pass over the real pictures."""
    encoder_lr_factor: float = 0.1
    """Learning rate of these blocks, as a share of --stage2.lr."""
    scl_crop: int = 32
    """Side in pixels of the random crops whose rows enter Eq. (5); the input size takes the classifier's rows."""
    trace_crop: Literal["input", "scl"] = "input"
    """The crop of a real picture from which its natural trace h is taken."""


@dataclass(frozen=True)
class ComputeConfig:
    """How training computes; scores and the shipped model are float32 whatever it says."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs convolutions and linear layers under autocast; rows, losses and parameters stay float32."""
    channels_last: bool = False
    """Keep the weights of convolutions in channels-last order."""
    compile: bool = False
    """Run the encoder through torch.compile: slow to start, one graph for each batch size."""
    sync_batch_norm: bool = False
    """Batch-norm statistics over all processes; GPUs only. Without it each process takes those of its own rows."""


@dataclass(frozen=True)
class CacheConfig:
    """Embeddings of the frozen encoder that need not be computed again."""

    cached_views: int = 0
    """Different views of a picture that a stage on the frozen encoder goes through, epoch by epoch, with or without
    --cache-features; 0 draws new ones in each epoch."""
    cache_features: bool = False
    """Keep the frozen encoder's embeddings on disk: of stage 2, and of stage 1 with --no-stage1.train-encoder. Results
    are those without. It pays with --cached-views below the epochs."""
    cache_dir: str = ""
    """Folder in which runs share what a frozen encoder has computed: embeddings by the pixels that it saw, and the
    files of --cache-features, which by default are in the run folder. train.evaluate takes the same folder."""
    view_seed: int | None = None
    """Seed of the training views; default: --seed. Runs of other seeds with this --view-seed and --cache-dir need not
    encode again: the seeds then share their views, and differ in initial weights and in the order of the batches."""


@dataclass(frozen=True)
class NearestConfig:
    """The neighbours of --method nearest."""

    nearest_k: int = 1
    """Nearest pictures of each class whose mean cosine counts."""
    nearest_bank: int = 10_000
    """Most training pictures of each class to keep as neighbours, drawn by the seed; 0 keeps all."""


@dataclass(frozen=True)
class AdaptConfig:
    """A finished run that goes on with a user's own real pictures."""

    adapt_real: str = ""
    """Folder of your own real pictures, no labels needed: stage 1 goes on with them, stage 2 and thresholds follow."""
    run: str = ""
    """The finished run to adapt, which stays as it is; by default the newest below runs/. Only with --adapt-real."""


@dataclass(frozen=True)
class DecisionConfig:
    """How the verdict's thresholds are fitted on validation pictures."""

    real_flagged_rate: float = 0.01
    """Wanted share of real pictures called fake."""
    fake_missed_rate: float = 0.05
    """Wanted share of fake pictures called real; between the two thresholds the verdict is uncertain."""
    threshold_rule: ThresholdRule = "empirical"
    """Keep the rates on the validation pictures themselves, or (conformal) in expectation on new pictures like them."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    preset: Annotated[Preset, tyro.conf.Suppress] = "paper"
    method: Method = "ntf"
    """ntf: both stages of the paper; bce: the whole network with cross entropy; probe: a linear layer on the frozen
    encoder; nearest: nearest neighbours on the frozen encoder. wang2020, gragnaniello2021 and xception are bce with
    the encoder and augmentation of their papers as starting values, which options beside --method replace. All but
    ntf have no stage 1 and read the encoder alone."""
    data: str = ""
    """Folder, tar shards, CSV or JSON list with a train and a val split; "demo" builds the demo data in data/demo."""
    corrupt: CorruptPolicy = "refuse"
    """Pictures that cannot be decoded: refuse to train, or leave them out and list them in the run's corrupt.json."""
    train_generators: tuple[str, ...] = ()
    """Train on these generators' pictures alone, real ones included; sets of real pictures alone may be named as well.
    Empty takes all."""
    val_generators: tuple[str, ...] = ()
    """The same for the validation pictures, which give thresholds and calibration."""
    train_share: float = 1.0
    """Share of the originals of each generator to train on, drawn by the seed; a smaller share lies in a larger one."""
    equalize: Annotated[EqualizeConfig, tyro.conf.arg(name="")] = field(default_factory=EqualizeConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    loss: Annotated[LossConfig, tyro.conf.arg(name="")] = field(default_factory=LossConfig)
    augment: Annotated[AugmentConfig, tyro.conf.arg(name="")] = field(default_factory=AugmentConfig)
    decision: Annotated[DecisionConfig, tyro.conf.arg(name="")] = field(default_factory=DecisionConfig)
    compute: Annotated[ComputeConfig, tyro.conf.arg(name="")] = field(default_factory=ComputeConfig)
    nearest: Annotated[NearestConfig, tyro.conf.arg(name="")] = field(default_factory=NearestConfig)
    adapt: Annotated[AdaptConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptConfig)
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = field(default_factory=CacheConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    seed: int = 0
    device: str = "auto"
    """torch device; "auto" is the first CUDA device, or the CPU where there is none."""
    workers: int = 0
    """Processes that decode pictures; 0 decodes in the training process."""
    checkpoint_steps: int = 0
    """Write a checkpoint every so many batches; 0 writes one at the end of each epoch."""
    checkpoint_epochs: int = 1
    """Write one at the end of every so many epochs, and of each stage; more than 1 pays where epochs are short and the
    frozen encoder is large, since each checkpoint holds all of it."""


def preset_config(preset: Preset) -> RunConfig:
    """The paper's settings; the demo's, which two cores train in minutes; or what was best on held-out generators.

    "edge" and "server" are what was best on held-out generators in docs/results.md: heads on a frozen encoder that read
    several depths of it. "edge" is EfficientNet-lite0 on the picture and on its residual, with little of the natural
    traces in the contrastive loss; "server" is a CLIP ViT-B/16, whose weights are in no package, without that loss.
    """
    if preset == "edge":
        return _heads_on(
            ModelConfig(encoder_depths=(0, 1, 2, 3, 4), encoder_input="both"), LossConfig(eta=0.02), preset
        )
    if preset == "server":
        clip = "vit_base_patch16_clip_quickgelu_224"
        model = ModelConfig(encoder=clip, encoder_weights="", encoder_depths=(5, 7, 9))
        # With so few fakes the contrastive loss separates the training pictures alone.
        return _heads_on(model, LossConfig(scl_weight=0.0), preset)
    if preset == "paper":
        model = ModelConfig(encoder="resnet50", encoder_weights="")
        return RunConfig(preset="paper", model=model, workers=8)
    return RunConfig(
        preset="demo",
        data=DEMO_DATA,
        # Two photographs cannot improve an ImageNet encoder, and so few steps hardly move a classifier on unit rows:
        # stage 1 trains its heads alone, and the classifier reads the embedding beside z.
        model=ModelConfig(classifier_input="both"),
        stage1=Stage1Config(epochs=2, batch_size=24, lr=0.01, train_encoder=False),
        stage2=Stage2Config(epochs=4, batch_size=48, lr=0.1),
    )


def _heads_on(model: ModelConfig, loss: LossConfig, preset: Preset) -> RunConfig:
    """Heads on several depths of a frozen encoder."""
    return RunConfig(
        preset=preset,
        model=replace(model, standardize=True, head_width=512),
        loss=loss,
        augment=AugmentConfig(flip=False),
        stage1=Stage1Config(epochs=10, lr=1e-3, weight_decay=1e-2, optimizer="adamw", train_encoder=False),
        stage2=Stage2Config(epochs=12, lr=1e-3, weight_decay=1e-2, optimizer="adamw", class_balance=True, scl_crop=224),
        cache=CacheConfig(cached_views=4, cache_features=True),
        workers=2,
    )


def config_from_dict(values: object, *, source: str, defaults: RunConfig | None = None) -> RunConfig:
    """Configuration from plain JSON types.

    Args:
        values: as `dataclasses.asdict` makes it; fields may be left out.
        source: named in errors.
        defaults: has the fields that are left out, with what the method fixes; the paper preset by default.

    Raises:
        ConfigError: an unknown field, or a value of the wrong type.
    """
    base = defaults or preset_config("paper")
    method = values.get("method") if isinstance(values, dict) else None
    if isinstance(method, str) and method in METHODS and method != base.method:  # any other is refused below
        base = with_method(base, method)
    complete = _merged(dataclasses.asdict(base), values)
    try:
        # Through JSON, which knows no tuples.
        return from_jsonable(RunConfig, json.loads(json.dumps(complete)), subject=source)
    except BundleError as error:
        raise ConfigError(
            error.subject,
            got=error.got,
            wanted=error.wanted,
            remedy="correct it, or compare a run's config.json",
        ) from error


def config_from_file(path: Path) -> RunConfig:
    """Configuration in a JSON file: a run's `config.json`, or its `config` part alone.

    Raises:
        ConfigError: no such file, not JSON, or not a configuration.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            str(path), got=str(error), wanted="a JSON file", remedy="pass the config.json of a run"
        ) from error
    if isinstance(values, dict):
        values = values.get("config", values)
    return config_from_dict(values, source=str(path))


def _merged(defaults: dict[str, Any], values: object) -> object:
    """`values` with what it leaves out taken from `defaults`, field by field."""
    if not isinstance(values, dict):
        return values
    kept = {
        key: _merged(defaults[key], value) if isinstance(defaults.get(key), dict) else value
        for key, value in values.items()
    }
    return defaults | kept
