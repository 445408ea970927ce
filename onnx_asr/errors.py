"""The errors a user can meet; each says what was received, what was expected and what to do."""

from __future__ import annotations


class OnnxAsrError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line."""


class ModelError(OnnxAsrError):
    """A model file that cannot be read, or that holds something this package cannot work on."""


class StructureError(ModelError):
    """A dense and a pruned model that are not the same network."""


class DataError(OnnxAsrError):
    """Calibration or evaluation data that is missing, broken or does not fit the model."""


class OptionError(OnnxAsrError):
    """An option outside its range, or options that contradict each other."""


class OutputError(OnnxAsrError):
    """A result that cannot be written to the requested path."""


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is an interrupt, or what a library made of one."""
    if isinstance(error, KeyboardInterrupt):
        return True
    origin = error.__cause__ or error.__context__
    return origin is not None and is_interrupt(origin)
