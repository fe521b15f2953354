"""Frozen dataclasses to canonical JSON and back, refusing everything that is not exactly the schema.

Used for the manifest of a model bundle and for the calibration file of a training run. Reading is strict on
purpose: an unknown field, a missing one or a value of another type is an error that names the place.

A field that joins a schema later has a default, what files from before it mean, and `ADDED_LATER` as its metadata. It
is left out of the JSON where it has its default, so that such files are read, and written again to the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from runtime.errors import BundleError, UsageError

T = TypeVar("T")

ADDED_LATER: Mapping[str, bool] = types.MappingProxyType({"added_later": True})
_REMEDY = "use the version of the toolkit that wrote the file, or write it again with this one"


def canonical_json(value: object) -> str:
    """JSON text with sorted keys, indent 1 and a newline at the end; equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_jsonable(spec: object, *, subject: str = "manifest") -> dict[str, Any]:
    """Plain dictionary of a spec dataclass, checked against its own annotations.

    Args:
        spec: a dataclass of this package; NumPy scalars are accepted where numbers are wanted.
        subject: what an error message calls the thing, for example "manifest".

    Raises:
        BundleError: a field holds a value of another type, or a number that is not finite.
    """
    plain = _encode(spec)
    from_jsonable(type(spec), plain, subject=subject)
    return typing.cast(dict[str, Any], plain)


def from_jsonable(kind: type[T], value: object, *, subject: str = "manifest") -> T:
    """Instance of the dataclass `kind` from a decoded JSON value.

    Args:
        kind: the dataclass to build; nested dataclasses, tuples, dictionaries, optionals and literals are
            followed.
        value: what `json.loads` gave.
        subject: what an error message calls the value.

    Raises:
        BundleError: an unknown or missing field, or a value of another type, with its place.
    """
    return typing.cast(T, _decode(kind, value, subject))


def parse_json(text: str, *, subject: str) -> object:
    """Decoded JSON value of a text.

    Raises:
        BundleError: the text is not JSON, or holds NaN or an infinity.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            subject, got=f"text that is not JSON ({error})", wanted="a JSON object", remedy=_REMEDY
        ) from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in _stated_fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return value


def _stated_fields(value: Any) -> list[dataclasses.Field[Any]]:
    """Fields that JSON holds: all but the added ones that say what older files mean anyway."""
    return [f for f in dataclasses.fields(value) if not _is_added(f) or getattr(value, f.name) != f.default]


def _is_added(field: dataclasses.Field[Any]) -> bool:
    return "added_later" in field.metadata


def _decode(kind: Any, value: object, where: str) -> Any:
    """`value` as `kind`; `where` is the path of fields that an error names."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_optional(kind, value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(kind) or isinstance(value, bool):
            _refuse(where, repr(value), f"one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), value, where)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            _refuse(where, repr(value), "an object with text keys")
        return {key: _decode(typing.get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    return _decode_scalar(kind, value, where)


def _decode_dataclass(kind: type, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse(where, repr(value), "an object")
    hints = typing.get_type_hints(kind)
    declared = dataclasses.fields(kind)
    names = [field.name for field in declared]
    unknown = sorted(set(value) - set(names))
    missing = sorted({field.name for field in declared if not _is_added(field)} - set(value))
    if unknown:
        _refuse_fields(where, f"the unknown field {unknown[0]!r}", names)
    if missing:
        _refuse_fields(where, f"no field {missing[0]!r}", names)
    fields = {name: _decode(hints[name], value[name], f"{where}.{name}") for name in names if name in value}
    try:
        return kind(**fields)
    except UsageError as error:  # of a class that is made by people as well; here it is the file that is wrong
        raise BundleError(where, got=error.got, wanted=error.wanted, remedy=_REMEDY) from error


def _decode_optional(kind: Any, value: object, where: str) -> Any:
    if value is None:
        return None
    (inner,) = (option for option in typing.get_args(kind) if option is not type(None))
    return _decode(inner, value, where)


def _decode_tuple(options: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _refuse(where, repr(value), "a list")
    if options[-1] is Ellipsis:
        options = (options[0],) * len(value)
    if len(options) != len(value):
        _refuse(where, f"{len(value)} values", f"{len(options)} values")
    return tuple(
        _decode(option, item, f"{where}[{index}]")
        for index, (option, item) in enumerate(zip(options, value, strict=True))
    )


def _decode_scalar(kind: Any, value: object, where: str) -> Any:
    # bool is an int to Python, and 1 is a float to nobody here: only the exact JSON type passes.
    if type(value) is not kind:
        _refuse(where, repr(value), f"a value of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(where, repr(value), "a finite number")
    return value


def _refuse(where: str, got: str, wanted: str) -> typing.NoReturn:
    raise BundleError(where, got=got[:80], wanted=wanted, remedy=_REMEDY)


def _refuse_fields(where: str, got: str, names: list[str]) -> typing.NoReturn:
    raise BundleError(where, got=got, wanted=f"exactly {', '.join(sorted(names))}", remedy=_REMEDY)
