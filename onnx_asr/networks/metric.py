"""A measure of the user's own in place of the built-in divergence: a function of samples and outputs."""

from __future__ import annotations

import hashlib
import math
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, overload

import numpy as np
import onnx

from onnx_asr.arrays import Array, Integers
from onnx_asr.data import Dataset
from onnx_asr.errors import OptionError, is_interrupt
from onnx_asr.graph.index import GraphIndex
from onnx_asr.json_values import function_name
from onnx_asr.networks.fidelity import Fidelity, Outputs, compared_outputs

NamedOutputs = dict[str, Array]
"""Outputs on all samples, by the dense model's names, in its order."""


@dataclass(frozen=True)
class MetricSamples(Sequence[Mapping[str, Array]]):
    """The samples that a metric is asked about; the i-th belongs to the i-th entry of every output.

    ``samples[i]`` prepares one: an array per model input, without the batch axis.

    Attributes:
        dataset: All samples.
        indices: Those in question, as positions in it.
    """

    dataset: Dataset
    indices: Integers

    @property
    def names(self) -> tuple[str, ...]:
        """Their names: paths of image files in the folder, such as "cat/1.jpg", or "#17" for the 18th of an array."""
        return tuple(self.dataset.names[index] for index in self.indices)

    @property
    def labels(self) -> Integers | None:
        """Their class indices, where the data come with any."""
        return None if self.dataset.labels is None else self.dataset.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Array]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, Array] | list[dict[str, Array]]:
        if isinstance(place, slice):
            return [self.dataset.load(int(index)) for index in self.indices[place]]
        return self.dataset.load(int(self.indices[place]))


MetricFunction = Callable[[MetricSamples, NamedOutputs, NamedOutputs], float]
"""``metric(samples, dense_outputs, outputs)``: a number, lower for a better model."""
MetricSource = str | MetricFunction
"""Such a function, or where to import it from: "module:function"."""


@dataclass(frozen=True)
class Metric:
    """A function of the user's, and its name in messages.

    It is called over all samples at once, with the outputs as arrays that cannot be written to, by the dense model's
    names and with the samples along the first axis. It returns one number, lower for a better model; infinity is one.

    Attributes:
        name: "module:function".
        function: The function.
        source: File of the module that the function was imported from by name; None for a function that was given.
    """

    name: str
    function: MetricFunction
    source: Path | None = None

    @classmethod
    def of(cls, source: MetricSource) -> Metric:
        """The function that was given, or imported; modules are found in the current directory first.

        Raises:
            OptionError: When there is no such function, or its module cannot be imported.
        """
        if not isinstance(source, str):
            if not callable(source):
                raise OptionError(f"the metric is {source!r:.80}: give a function, or a text 'module:function'")
            return cls(function_name(source), source)
        module, colon, attribute = source.partition(":")
        if not (colon and attribute and all(map(str.isidentifier, module.split(".")))) or module.endswith(".py"):
            raise OptionError(
                f"metric '{source}' is not of the form module:function: give my_metric:score for the function 'score' "
                "in my_metric.py"
            )
        here = os.getcwd()
        if here not in sys.path:
            sys.path.insert(0, here)
        with _users_code(f"metric '{source}': importing '{module}' failed"):
            try:
                pkgutil.resolve_name(f"{module}:")
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise  # of something that the module imports
                raise OptionError(
                    f"metric '{source}': there is no module '{module}', neither in {here} nor installed: run the "
                    f"command where {module.replace('.', '/')}.py is, or add its folder to PYTHONPATH"
                ) from error
        try:
            function = pkgutil.resolve_name(source)
        except AttributeError as error:
            raise OptionError(f"metric '{source}': {error}: give the name of a function of that module") from error
        if not callable(function):
            raise OptionError(f"metric '{source}' is {function!r:.80}, not a function: give one of its module's")
        file = getattr(sys.modules.get(module), "__file__", None)
        return cls(source, function, None if file is None else Path(file))

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file that the function was imported from by name."""
        return None if self.source is None else hashlib.sha256(self.source.read_bytes()).hexdigest()

    def __call__(self, samples: MetricSamples, dense: NamedOutputs, outputs: Outputs) -> float:
        """The metric of outputs, which are in the order of the dense model's.

        Raises:
            OptionError: When the function raises an exception, or returns NaN or anything but a number.
        """
        others = dict(zip(dense, outputs, strict=True))
        given = ", ".join(f"{name} {value.shape}" for name, value in dense.items())
        with _users_code(f"metric '{self.name}' failed on {len(samples)} samples with outputs {given}"):
            value: Any = self.function(samples, _read_only(dense), _read_only(others))
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            raise OptionError(
                f"metric '{self.name}' returned {value!r:.80}: it has to return a number, lower is better"
            )
        if math.isnan(value) or value == -math.inf:
            raise OptionError(
                f"metric '{self.name}' returned {value}: it has to return a number, infinity where nothing is left of "
                "the model"
            )
        return float(value)

    def check_dense(self, value: float) -> None:
        """Refuse an infinite metric of the dense model itself.

        Raises:
            OptionError: Naming the function.
        """
        if math.isinf(value):
            raise OptionError(f"metric '{self.name}' of the dense model itself is infinite: it has to be a number")

    def added(self, fidelity: Fidelity, samples: MetricSamples, dense: NamedOutputs, outputs: Outputs) -> Fidelity:
        """A fidelity with the metric: infinite, without a call, where the outputs hold NaN or infinities."""
        value = self(samples, dense, outputs) if math.isfinite(fidelity.divergence) else math.inf
        return replace(fidelity, metric=value)


def named_outputs(model: onnx.ModelProto, outputs: Outputs) -> NamedOutputs:
    """Collected outputs of a model, by name."""
    return dict(zip(compared_outputs(GraphIndex.of(model)), outputs, strict=True))


def _read_only(outputs: NamedOutputs) -> NamedOutputs:
    views = {name: value.view() for name, value in outputs.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


@contextmanager
def _users_code(failure: str) -> Iterator[None]:
    """Run code of the user's: what it prints goes to stderr, and its exceptions become one error.

    Raises:
        OptionError: In place of any exception that the code raises.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except OptionError:
        raise
    except (Exception, SystemExit) as error:
        if is_interrupt(error):
            raise
        raise OptionError(f"{failure}: {_described(error)}") from error


def _described(error: BaseException) -> str:
    """Kind and text of an error, and the last line of code that is no library's."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    if isinstance(error, SyntaxError):
        return text  # which has the line
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<frozen", __file__))]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text
