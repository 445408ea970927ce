"""One onnxruntime session over a model held in memory, with outputs bound to the caller's buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

from onnx_asr.arrays import Array
from onnx_asr.errors import ModelError, OptionError
from onnx_asr.graph.tensors import detached, is_left, is_self_contained, location_of, point_to, value_of

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
Guard = Callable[[], AbstractContextManager[None]]
_FATAL_ONLY, _WARNINGS = 4, 2
_NUMPY_TYPES = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(code)) for code in "?bBhHiIqQefd"}  # others it refuses
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 1 << 20  # of glibc's malloc.h; bytes


@dataclass(frozen=True)
class Runtime:
    """How sessions run.

    Attributes:
        providers: Execution providers in order of preference.
        threads: Threads within an operator; 0 lets onnxruntime use every core.
        verbose: Let onnxruntime print its warnings.
        optimized: Let onnxruntime rewrite the graph for speed.
        lean: Return freed memory to the system before a session is made, and let sessions take no more than they use;
            that takes about a fifth of the run time of ``compress``.
        guard: Entered around every load and run, so that a supervisor can detect a call that hangs.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int = 0
    verbose: bool = False
    optimized: bool = True
    lean: bool = False
    guard: Guard = nullcontext

    def __post_init__(self) -> None:
        available = onnxruntime.get_available_providers()
        for provider in self.providers:
            if provider not in available:
                raise OptionError(
                    f"execution provider '{provider}' is not available in this onnxruntime: give one of "
                    f"{', '.join(available)}, or install a build that has it"
                )

    def options(self) -> onnxruntime.SessionOptions:
        """Session options: all optimisations or none, no busy waiting beside numpy's threads."""
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if self.optimized else levels.ORT_DISABLE_ALL
        options.log_severity_level = _WARNINGS if self.verbose else _FATAL_ONLY
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = not self.lean
        options.enable_mem_pattern = False  # from the second run on it would take one more block beside the first run's
        return options


class Session:
    """A loaded model.

    Args:
        model: The model, or its path.
        runtime: How to run.
        name: Its name in messages; None for the name of its graph or its path.

    Raises:
        ModelError: When onnxruntime cannot load or run the model.
    """

    def __init__(self, model: onnx.ModelProto | str, runtime: Runtime, name: str | None = None) -> None:
        self._name = name or f"the model '{model if isinstance(model, str) else model.graph.name}'"
        if runtime.lean:
            _release_free_memory()
        options = runtime.options()
        self._runtime = runtime
        try:
            source, weights = (model, {}) if isinstance(model, str) else _serialized(model, options, runtime.lean)
            with runtime.guard():
                self._session = onnxruntime.InferenceSession(source, options, providers=list(runtime.providers))
            weights.clear()  # onnxruntime has copied them by now, and held none of them before
        except Exception as error:  # onnxruntime raises a family of unrelated classes
            raise ModelError(
                f"onnxruntime cannot load {self._name}: {_first_line(error)}; export it with operators and an opset "
                "that this onnxruntime knows, or install a newer one"
            ) from error
        self.output_names = list(dict.fromkeys(output.name for output in self._session.get_outputs()))
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = {}
        self._data_dependent = False

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None, allocate: Allocate = np.empty
    ) -> dict[str, Array]:
        """Run once; outputs are written straight into what ``allocate`` gives once their shapes are known."""
        names = list(outputs or self.output_names)
        signature = tuple((name, value.shape) for name, value in feeds.items())
        known = self._shapes.get(signature)
        if known is None:
            try:
                with self._runtime.guard():
                    values = self._session.run(names, dict(feeds))
            except Exception as error:
                raise ModelError(
                    f"onnxruntime cannot run {self._name}: {_first_line(error)}; run the whole model in onnxruntime by "
                    "itself: if that fails too, check the shapes of its inputs, or export it again"
                ) from error
            results = {
                name: owned(self._tensor(name, value), allocate) for name, value in zip(names, values, strict=True)
            }
            if not self._data_dependent:
                self._shapes[signature] = {name: (array.shape, array.dtype) for name, array in results.items()}
            return results
        held = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        results = {name: allocate(*known[name]) for name in names}
        try:
            self._bound(held, results)
        except Exception:  # the output shapes follow from more than the input shapes (NonZero, NonMaxSuppression)
            self._data_dependent = True
            self._shapes.clear()
            return self.run(feeds, names, allocate)
        return results

    def _tensor(self, name: str, value: object) -> Array:
        if not isinstance(value, np.ndarray):
            raise ModelError(
                f"output '{name}' of {self._name} is a {type(value).__name__}, but only tensors can be compared: "
                "remove it from the outputs"
            )
        return value

    def _bound(self, feeds: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for name, value in results.items():
            binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        with self._runtime.guard():
            self._session.run_with_iobinding(binding)


def _serialized(
    model: onnx.ModelProto, options: onnxruntime.SessionOptions, lean: bool
) -> tuple[bytes, dict[str, onnxruntime.OrtValue]]:
    """A model as bytes, and the weights handed over separately, which have to be held until the session is made.

    These are weights still in their file, and large ones where that saves a copy.
    """
    if is_self_contained(model) and not lean:
        return bytes(model.SerializeToString()), {}
    light, large = detached(model)
    values = {}
    for position, tensor in large.items():
        bare = light.graph.initializer[position]
        if is_left(tensor):
            folder, place = location_of(tensor)
            point_to(bare, place)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        elif tensor.data_type in _NUMPY_TYPES:
            point_to(bare, {"location": "memory"})
            values[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(value_of(tensor))
        else:
            bare.CopyFrom(tensor)
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    return bytes(light.SerializeToString()), values


def _release_free_memory() -> None:
    """Have glibc give back to the system what is free, and from now on large blocks when they become so."""
    with suppress(OSError, TypeError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        library.malloc_trim(0)


def owned(value: Array, allocate: Allocate) -> Array:
    """A copy that does not pin the session's memory."""
    result = allocate(value.shape, value.dtype)
    np.copyto(result, value)
    return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
