"""Errors of training and evaluation; all derive from `runtime.errors.NTFError`."""

from __future__ import annotations

from runtime.errors import NTFError


class DataError(NTFError):
    """A data set is missing, empty, one-sided, damaged or laid out in an unknown way."""


class ConfigError(NTFError):
    """A configuration value, or a combination of values, does not make sense."""


class CheckpointError(NTFError):
    """A checkpoint or weight file is missing, damaged or does not fit the model."""


class TrainingError(NTFError):
    """Training cannot go on, for example because the loss is not a number any more."""


class ReportError(NTFError):
    """A report refers to a picture that is not there, or a figure cannot be made of what was scored."""
