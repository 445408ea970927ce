"""What runtimes need to make use of zeros in weights: data, with sources, to be updated as these change.

A rule says what a layer has to be like, and what is wrong where it is not. Nothing here was measured by this project.
Numbers that users may want to look up stand in ``limit``, which the sentences repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from onnx_asr.graph.layers import LayerKind

RuntimeName = Literal["tensorrt", "openvino"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)

TargetName = Literal[RuntimeName, "file"]
"""Where zeros may be of use: a runtime, or the size of the file."""

Cure = Literal["zeros", "quantization"]
"""What would make a layer keep a rule that it breaks: other zeros, or quantization to integers."""


@dataclass(frozen=True)
class LayerForm:
    """What rules look at in a layer.

    Attributes:
        kind: Operator.
        groups: Groups of a convolution; 1 for a matrix.
        inputs: Input channels of a group.
        outputs: Output channels of all groups.
        taps: Places of the kernel; 1 for a matrix.
        sparsity: Share of its weights that are zero.
        most_of_four: The most weights that are not zero among four consecutive input channels, at one place of the
            kernel of one output channel.
        weight_first: Whether the weight is the left operand of a MatMul.
        quantized: Whether weight and input are integers behind DequantizeLinear.
        beside_quantizer: Whether its input or weight is made by DequantizeLinear, or its output goes to QuantizeLinear.
    """

    kind: LayerKind
    groups: int
    inputs: int
    outputs: int
    taps: int
    sparsity: float
    most_of_four: int
    weight_first: bool
    quantized: bool
    beside_quantizer: bool


@dataclass(frozen=True)
class Source:
    """Where a rule comes from.

    Attributes:
        title: What it is, with its version or date.
        url: Its address.
    """

    title: str
    url: str


@dataclass(frozen=True)
class Rule:
    """A condition of a layer.

    Attributes:
        code: Name for programs.
        holds: Whether a layer meets it, by its limit.
        text: What is wrong where it does not, with the ``{limit}``.
        sources: Who says so.
        limit: The number in it.
        certain: Whether zeros are useless where it does not hold; otherwise sources disagree, or it depends.
        cure: How the same layer can be made to keep it; None where it cannot.
    """

    code: str
    holds: Callable[[LayerForm, float], bool]
    text: str
    sources: tuple[Source, ...]
    limit: float = 0
    certain: bool = True
    cure: Cure | None = None

    @property
    def sentence(self) -> str:
        """What is wrong where it does not hold."""
        return self.text.format(limit=self.limit)

    def broken_by(self, form: LayerForm) -> bool:
        """Whether a layer does not keep it."""
        return not self.holds(form, self.limit)


@dataclass(frozen=True)
class Target:
    """A runtime, and the rules by which it makes use of zeros.

    Attributes:
        title: Its name.
        checked: The versions that the rules were checked against.
        pattern: The only pattern that helps; None where any zero does.
        rules: The conditions of a layer.
        needs: Conditions that no file can show: hardware and settings.
    """

    title: str
    checked: str
    pattern: str | None
    rules: tuple[Rule, ...]
    needs: tuple[tuple[str, Source], ...]


_TRT_GUIDE = Source(
    "NVIDIA TensorRT developer guide (8.x), Sparsity; a page of its own from 10 on",
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/io-formats-sparsity.html",
)
_TRT_TYPES = Source(
    "NVIDIA TensorRT 11.1.0 documentation, data formats and tensors",
    "https://docs.nvidia.com/deeplearning/tensorrt/11.1.0/inference-library/data-formats-tensors.html",
)
_TRT_CHANNELS = Source("NVIDIA TensorRT issue 4065 (2024)", "https://github.com/NVIDIA/TensorRT/issues/4065")
_TRT_KERNELS = Source("NVIDIA TensorRT issue 3849 (2024)", "https://github.com/NVIDIA/TensorRT/issues/3849")
_TRT_GROUPS = Source("NVIDIA TensorRT issue 4054 (2024)", "https://github.com/NVIDIA/TensorRT/issues/4054")
_TRT_MATMUL = Source("NVIDIA TensorRT issue 2271 (8.4, 2022)", "https://github.com/NVIDIA/TensorRT/issues/2271")
_TRT_MATMUL_LATER = Source("onnxsim pull request 1764 (10.3, 2026)", "https://github.com/onnxsim/onnxsim/pull/1764")
_TRT_QDQ = Source("NVIDIA TensorRT issue 4694 (8.6.1, 2026)", "https://github.com/NVIDIA/TensorRT/issues/4694")
_TRT_INT8 = Source(
    "NVIDIA, Sparsity in INT8 (2023)",
    "https://developer.nvidia.com/blog/sparsity-in-int8-training-workflow-and-best-practices-for-tensorrt-acceleration/",
)
_OV_CPU = Source(
    "OpenVINO documentation, CPU device (2024, 2025)",
    "https://docs.openvino.ai/2025/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html",
)
_OV_CODE = Source(
    "OpenVINO source, nodes/fullyconnected.cpp (2024, 2025)",
    "https://github.com/openvinotoolkit/openvino/blob/master/src/plugins/intel_cpu/src/nodes/fullyconnected.cpp",
)

TARGETS: dict[RuntimeName, Target] = {
    "tensorrt": Target(
        title="TensorRT",
        checked="developer guide 8.x, documentation of 11.1, issue threads up to February 2026",
        pattern="2:4",
        rules=(
            Rule(
                "operator-without-sparse-kernel",
                lambda form, _: form.kind in ("Conv", "Gemm", "MatMul"),
                "only convolutions and fully connected layers have sparse kernels",
                (_TRT_GUIDE,),
            ),
            Rule(
                "grouped-convolution",
                lambda form, limit: form.groups <= limit,
                "sparse kernels are not tried for grouped convolutions",
                (_TRT_GROUPS,),
                limit=1,
            ),
            Rule(
                "inputs-not-divisible",
                lambda form, limit: form.inputs % limit == 0,
                "the input channels do not divide into groups of {limit}",
                (_TRT_GUIDE,),
                limit=4,
            ),
            Rule(
                "few-inputs",
                lambda form, limit: form.inputs * form.taps >= limit,
                "input channels times places of the kernel are fewer than {limit}: the dense kernel is faster",
                (_TRT_KERNELS, _TRT_CHANNELS),
                limit=256,
            ),
            Rule(
                "few-outputs",
                lambda form, limit: form.outputs >= limit,
                "fewer than {limit} output channels: the dense kernel is faster",
                (_TRT_KERNELS, _TRT_CHANNELS),
                limit=256,
            ),
            Rule(
                "zeros-not-2-of-4",
                lambda form, limit: form.most_of_four <= limit,
                "more than {limit} of four consecutive input channels are not zero",
                (_TRT_GUIDE,),
                limit=2,
                cure="zeros",
            ),
            Rule(
                "matmul",
                lambda form, _: form.kind != "MatMul",
                "a MatMul was not accepted by version 8.4, but by 10.3; a Gemm was by both",
                (_TRT_MATMUL, _TRT_MATMUL_LATER),
                certain=False,
            ),
            Rule(
                "beside-quantizer",
                lambda form, _: not form.beside_quantizer,
                "next to QuantizeLinear or DequantizeLinear a user saw dense kernels; NVIDIA shows sparse ones",
                (_TRT_QDQ, _TRT_INT8),
                certain=False,
            ),
        ),
        needs=(
            ("an NVIDIA GPU with sparse tensor cores (Ampere or newer)", _TRT_GUIDE),
            ("the builder flag SPARSE_WEIGHTS (trtexec --sparsity=enable)", _TRT_GUIDE),
            ("FP16 or INT8: up to version 10 as a builder flag, from 11 on by the types in the file", _TRT_TYPES),
            ("and the sparse kernel has to win when the engine is built: TensorRT times both", _TRT_KERNELS),
        ),
    ),
    "openvino": Target(
        title="OpenVINO",
        checked="documentation and source of 2024 and 2025; the setting and its default in 2026.4.1",
        pattern=None,
        rules=(
            Rule(
                "operator-not-packed",
                lambda form, _: form.kind in ("Gemm", "MatMul"),
                "sparse weights are packed for matrix products only",
                (_OV_CPU,),
            ),
            Rule(
                "weight-is-left-operand",
                lambda form, _: not form.weight_first,
                "the weight is the left operand, so this is not a fully connected layer",
                (_OV_CODE,),
            ),
            Rule(
                "channels-not-divisible",
                lambda form, limit: form.inputs % limit == 0 and form.outputs % limit == 0,
                "input and output channels are not both multiples of {limit}",
                (_OV_CPU, _OV_CODE),
                limit=64,
            ),
            Rule(
                "not-quantized",
                lambda form, _: form.quantized,
                "weights and input have to be int8: quantize the model",
                (_OV_CPU, _OV_CODE),
                cure="quantization",
            ),
            Rule(
                "no-zeros",
                lambda form, limit: form.sparsity > limit,
                "no weight is zero",
                (_OV_CPU,),
                cure="zeros",
            ),
            Rule(
                "below-threshold",
                lambda form, limit: form.sparsity >= limit,
                "less sparse than {limit:.0%}, the threshold in the documentation's example; a lower one may pay",
                (_OV_CPU, _OV_CODE),
                limit=0.8,
                certain=False,
                cure="zeros",
            ),
        ),
        needs=(
            ("an Intel CPU with AMX (4th generation Xeon or newer)", _OV_CPU),
            (
                "a CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE of at most the layer's sparsity (the default, 1, switches the "
                "feature off)",
                _OV_CODE,
            ),
        ),
    ),
}
