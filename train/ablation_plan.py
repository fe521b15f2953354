"""The variants that a study compares: the paper's ablations, or a plan of one's own in a JSON file.

A plan is `{"base": {...}, "variants": {"name": {...}, ...}, "chosen_on": ["generator", ...]}`. Base and variants are
changes of a configuration, nested as in a run's config.json; a variant's come on top of the base's. `chosen_on` names
the generators of the validation split over which the best variant is chosen; left out, all of them count.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cpp_ext.reference import Denominator, Form
from runtime.errors import BundleError
from runtime.strict_json import from_jsonable, parse_json
from train.config import RunConfig, config_from_dict
from train.config_check import check_config
from train.data import require_both_classes, scan_pictures
from train.encoder import Encoder
from train.errors import CheckpointError, ConfigError, DataError
from train.integrity import data_source
from train.losses import HomReduction, Orthogonality
from train.methods import METHODS, check_method
from train.model import ClassifierInput
from train.pictures import PictureSet
from train.selection import selection_of
from train.session import flat

STUDIES = ("architecture", "options", "data")
PLAN_FILE = "plan.json"
# A variant's name is a folder's as well.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
# What a variant may not change: seeds are the study's, and only pictures of one collection can be compared.
FIXED = ("seed", "data", "preset", "adapt")
PAPER_SCL_CROP = 32


@dataclass(frozen=True)
class Plan:
    """What a study trains.

    Attributes:
        study: its name.
        base: configuration that variants are described by what they change of.
        variants: configurations by name, in the order of the tables; their seed is not yet the study's.
        chosen_on: generators of the validation split that decide; empty for all.
    """

    study: str
    base: RunConfig
    variants: dict[str, RunConfig]
    chosen_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class _PlanFile:
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    chosen_on: tuple[str, ...]


def load_plan(study: str, base: RunConfig, *, data: str = "") -> Plan:
    """The variants of a study, every one of them checked.

    Args:
        study: "architecture", "options", "data", or the path of a plan.
        base: configuration that the variants change.
        data: collection of all variants; by default the base's.

    Raises:
        ConfigError: no such study, a plan with unknown fields, or a variant that makes no sense.
        DataError: the collection cannot be read.
    """
    chosen_on: tuple[str, ...] = ()
    if study in STUDIES:
        base = dataclasses.replace(base, data=data or base.data)
        changes = _own_study(study, base)
    else:
        read = _read_plan(Path(study))
        base = config_from_dict(
            _allowed(read.base, f"{study}: base", ("seed", "preset", "adapt")), source=study, defaults=base
        )
        base = dataclasses.replace(base, data=data or base.data)
        changes = {name: _allowed(value, f"{study}: variant {name!r}", FIXED) for name, value in read.variants.items()}
        chosen_on = read.chosen_on
    variants = {name: _variant(name, base, values) for name, values in changes.items()}
    return Plan(Path(study).stem, base, variants, chosen_on)


def check_plan(plan: Plan) -> None:
    """Refuse, before anything is trained, a plan that its collection has no pictures for.

    Raises:
        ConfigError: a generator that is not there, or validation pictures over which nothing can be compared.
        DataError: the collection, or what a variant takes of it, cannot be used.
    """
    found = scan_pictures(data_source(plan.base.data))
    for name, config in plan.variants.items():
        with _naming(name):
            for split in ("train", "val"):
                chosen = selection_of(config, split).of(found.split(split))
                require_both_classes(chosen, f"its part of split {split!r}")
    comparable = generators_with_both_classes(found.split("val"))
    unfit = sorted(set(plan.chosen_on) - comparable)
    if unfit or not comparable:
        raise ConfigError(
            "chosen_on" if unfit else f"validation pictures of {plan.base.data}",
            got=", ".join(unfit) or "no generator with real and fake pictures",
            wanted="generators with both classes in the validation split, over whose AP variants are compared"
            + (f": {', '.join(sorted(comparable))}" if comparable else ""),
            remedy="name some of these" if comparable else "put real pictures beside the fakes of a generator",
        )


def generators_with_both_classes(pictures: PictureSet) -> set[str]:
    """Generators whose set has real and fake pictures, so that it has an AP."""
    real, fake = ({r.generator for r in pictures.records if r.label == label} for label in (0, 1))
    return real & fake


def settle_plan(plan: Plan, folder: Path) -> dict[str, Any]:
    """The plan as plain JSON types, with variants of earlier starts that this one leaves out.

    Raises:
        ConfigError: a variant's configuration, or what decides, is no longer what the study began with.
        CheckpointError: the folder's plan is damaged.
    """
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(plan)))
    path = folder / PLAN_FILE
    if not path.is_file():
        return now
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        begun = {name: config_from_dict(values, source=f"{path}: {name}") for name, values in kept["variants"].items()}
        chosen_on = tuple(kept["chosen_on"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(path),
            got=f"{type(error).__name__}: {error}",
            wanted="what train.ablate wrote",
            remedy="choose another --out",
        ) from error
    for name in begun.keys() & plan.variants.keys():
        _refuse_change(f"variant {name!r} of {folder}", _plain(begun[name]), _plain(plan.variants[name]))
    _refuse_change(f"{folder}", {"chosen_on": chosen_on}, {"chosen_on": plan.chosen_on})
    return now | {"variants": kept["variants"] | now["variants"]}


def changes_of(base: RunConfig, variant: RunConfig) -> dict[str, Any]:
    """Options in which a variant differs from the base, by their dotted names, as JSON types."""
    before, after = _plain(base), _plain(variant)
    return {name: value for name, value in after.items() if value != before[name]}


def _plain(config: RunConfig) -> dict[str, Any]:
    return flat(json.loads(json.dumps(dataclasses.asdict(config))))


def _refuse_change(subject: str, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in now if now[name] != begun[name]][:3]
    if changed:
        raise ConfigError(
            subject,
            got=", ".join(f"{name} = {now[name]}" for name in changed),
            wanted="what the study began with, " + ", ".join(f"{name} = {begun[name]}" for name in changed),
            remedy="give the variant another name, or choose another --out",
        )


def _read_plan(path: Path) -> _PlanFile:
    try:
        values = parse_json(path.read_text(encoding="utf-8"), subject=str(path))
        if isinstance(values, dict):
            values = {"base": {}, "chosen_on": []} | values
        read = from_jsonable(_PlanFile, values, subject=str(path))
    except OSError as error:
        raise ConfigError(
            f"--study {path}",
            got=error.strerror or str(error),
            wanted=f"{', '.join(STUDIES)}, or a plan in a JSON file",
            remedy="check the name",
        ) from error
    except BundleError as error:
        remedy = 'write {"base": {...}, "variants": {"name": {...}}, "chosen_on": [...]}'
        raise ConfigError(error.subject, got=error.got, wanted=error.wanted, remedy=remedy) from error
    if not read.variants:
        raise ConfigError(str(path), got="no variant", wanted="one or more", remedy="add them below variants")
    return read


def _allowed(values: dict[str, Any], subject: str, fixed: tuple[str, ...]) -> dict[str, Any]:
    for name in fixed:
        if name in values:
            raise ConfigError(
                subject,
                got=f"the field {name!r}",
                wanted="fields that variants of one study may differ in",
                remedy="use --seeds, --data, --preset or --config, which hold for the whole study",
            )
    return values


def _variant(name: str, base: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    with _naming(name):
        if not NAME.fullmatch(name):
            raise ConfigError(
                "name", got=repr(name), wanted="letters, digits and . _ + = -, as it names a folder", remedy="rename it"
            )
        config = config_from_dict(dict(changes), source="changes", defaults=base)
        check_config(config)
        check_method(config)
    return config


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors inside say which variant they are about."""
    try:
        yield
    except (ConfigError, DataError) as error:
        subject = f"variant {name!r}: {error.subject}"
        raise type(error)(subject, got=error.got, wanted=error.wanted, remedy=error.remedy) from error


def _own_study(study: str, base: RunConfig) -> dict[str, dict[str, Any]]:
    check_config(base)
    if study != "data" and not METHODS[base.method].natural_traces:
        raise ConfigError(
            f"--study {study}",
            got=f"--method {base.method}",
            wanted="a method with natural traces, whose parts it leaves out",
            remedy="take --method ntf, or write a plan",
        )
    if study == "architecture":
        return ARCHITECTURE
    return dict(_option_variants(base) if study == "options" else _data_variants(base))


# Fig. 3 of the paper.
ARCHITECTURE: dict[str, dict[str, Any]] = {
    "full": {},
    "no-orth": {"loss": {"lambda_orth": 0.0}},
    "no-het-no-orth": {"loss": {"lambda_het": 0.0, "lambda_orth": 0.0}},
    "no-scl": {"loss": {"scl_weight": 0.0}},
}


def _option_variants(base: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every other value of every option that the paper leaves open, one at a time."""
    encoder = Encoder(base.model.encoder)
    side = encoder.input_size[0]
    choices: dict[tuple[str, str], tuple[Any, ...]] = {
        ("loss", "hom_reduction"): get_args(HomReduction),
        ("loss", "orth"): get_args(Orthogonality),
        ("loss", "scl_form"): get_args(Form),
        ("loss", "scl_denominator"): get_args(Denominator),
        ("model", "classifier_input"): get_args(ClassifierInput),
        ("stage1", "train_encoder"): (True, False),
        ("stage2", "scl_crop"): (side,) if encoder.fixed_input_size else (PAPER_SCL_CROP, side),
        ("stage2", "trace_crop"): ("input", "scl"),
    }
    yield "default", {}
    for (part, option), values in choices.items():
        for value in values:
            if value != getattr(getattr(base, part), option):
                yield f"{option.replace('_', '-')}={str(value).lower()}", {part: {option: value}}


def _data_variants(base: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other training sources and fewer originals (Fig. 4 of the paper); sets of real pictures alone always stay.

    None is there twice: of one generator nothing can be left out, of two, one left out is the other alone, and so few
    originals may be left that half of a half takes no fewer.
    """
    split = scan_pictures(data_source(base.data)).split("train")
    train = selection_of(base, "train").of(split)
    names = sorted({record.generator for record in train.records})
    fakes = sorted({record.generator for record in train.records if record.label == 1})
    yield "all", {}
    for generator in fakes if len(fakes) > 2 else ():
        kept = [name for name in names if name != generator]
        yield f"without-{_in_a_name(generator)}", {"train_generators": kept}
    for generator in fakes if len(fakes) > 1 else ():
        kept = [name for name in names if name == generator or name not in fakes]
        yield f"only-{_in_a_name(generator)}", {"train_generators": kept}
    before = len(train)
    for name, share in (("half", 0.5), ("quarter", 0.25)):
        fewer = dataclasses.replace(base, train_share=share * base.train_share)
        taken = len(selection_of(fewer, "train").of(split))
        if taken < before:
            yield f"{name}-of-originals", {"train_share": fewer.train_share}
        before = taken


def _in_a_name(generator: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]", "_", generator)
