"""Every error that the toolkit raises on purpose.

    NTFError
      BundleError      a model bundle is missing, damaged or of an unknown schema
      BackendError     a back-end or precision that was asked for cannot run here
      PictureError     one picture cannot be read or is outside the stated limits
        PictureFormatError   it is of no known picture format
        PictureTooLargeError it has more pixels than are accepted
        PictureMemoryError   there was no memory to decode it
      CollectionError  a collection, or what an interrupted scoring left, is damaged or has changed
      UsageError       an argument does not make sense
      QueueFullError   as many requests wait as may wait
      DeadlineError    the time that a request was given passed before it was answered
      ClosedError      what was asked is closed, or was closed before it answered
      (train.errors and export.errors derive theirs from NTFError as well)

Each message has four parts: what it is about, what was given, what was wanted, and what to do.
"""

from __future__ import annotations


class NTFError(Exception):
    """Base of all errors of the toolkit; its text is one full sentence.

    Args:
        subject: what the error is about, for example a file name.
        got: what was given or found.
        wanted: what would have been accepted.
        remedy: what the reader can do about it.
    """

    def __init__(self, subject: str, *, got: str, wanted: str, remedy: str) -> None:
        self.subject = subject
        self.got = got
        self.wanted = wanted
        self.remedy = remedy
        super().__init__(f"{subject}: got {got}, wanted {wanted}: {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by positional args; worker processes send these back with keywords.
        return _rebuild, (type(self), self.subject, self.got, self.wanted, self.remedy)


def _rebuild(kind: type[NTFError], subject: str, got: str, wanted: str, remedy: str) -> NTFError:
    return kind(subject, got=got, wanted=wanted, remedy=remedy)


class BundleError(NTFError):
    """A model bundle is missing, damaged or of an unknown schema."""


class BackendError(NTFError):
    """A back-end, device or precision that was asked for cannot run here."""


class PictureError(NTFError):
    """One picture cannot be read or is outside the stated limits."""


class PictureFormatError(PictureError):
    """Data of no known picture format."""


class PictureTooLargeError(PictureError):
    """A picture has more pixels than are accepted."""


class PictureMemoryError(PictureError):
    """No memory was left to decode a picture; it says nothing of the picture."""


class CollectionError(NTFError):
    """A collection of pictures, or what an interrupted scoring of it left, is damaged or has changed."""


class UsageError(NTFError):
    """An argument or a combination of arguments does not make sense."""


class QueueFullError(NTFError):
    """As many requests wait as may wait; the one that was made now was not taken."""


class DeadlineError(NTFError):
    """The time that a request was given passed before it was answered."""


class ClosedError(NTFError):
    """What was asked is closed, or was closed before it answered."""
