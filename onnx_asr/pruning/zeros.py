"""The pruning pipeline: scores to masks to zeros in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import onnx

from onnx_asr.data import Preprocessing
from onnx_asr.data.sources import DataSource
from onnx_asr.engine.loading import load
from onnx_asr.errors import OptionError
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.model_io import ModelSource, check_finite
from onnx_asr.graph.points import survey
from onnx_asr.graph.shapes import InputShapes
from onnx_asr.graph.skips import Skip
from onnx_asr.json_values import key
from onnx_asr.networks.cost import Cost, compressed_size, cost
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.operations import Operations, Probe
from onnx_asr.networks.pair import Network
from onnx_asr.networks.samples import Calibration
from onnx_asr.networks.sparsity import LayerSparsity, collapse_note, share_of_zeros
from onnx_asr.numerics.patterns import Pattern
from onnx_asr.pruning.allocation import (
    LayerCosts,
    ScopeTrial,
    ScopeTrials,
    chosen_scope,
    layer_costs,
    scope_note,
    trial_verifier,
    unit_flops,
)
from onnx_asr.pruning.budget import smallest_share
from onnx_asr.pruning.masks import (
    PrunableWeight,
    apply_masks,
    make_masks,
    prunable_weights,
    split_narrow,
    split_useless,
)
from onnx_asr.pruning.options import MEASURED, SENSITIVITY_SPARSITIES, Budget, PruneOptions, Scope
from onnx_asr.pruning.scores import Values, data_free_scores, weight_scores
from onnx_asr.pruning.sensitivity import fidelity_by_weight
from onnx_asr.repairing.options import RepairOptions, chosen
from onnx_asr.repairing.verification import Samples, Verifier

_FOLDED = (
    "no BatchNormalization follows these layers; where it was folded into them, the magnitudes of different channels "
    "do not compare: --score variance with --data, or --score row, chooses better"
)


@dataclass(frozen=True)
class PruneResult:
    """A pruned copy of a model, its cost before and after, and what was pruned.

    Attributes:
        layers: Weights that took part, in file order.
        skips: Nodes with weights that took no part, and why.
        scope: How zeros were shared out between the layers.
        scopes: What was tried for it, with scope "auto".
    """

    derived: ClassVar = ("sparsity", "helps", "modified")

    model: onnx.ModelProto = field(repr=False)
    options: PruneOptions
    before: Cost
    after: Cost
    layers: tuple[LayerSparsity, ...]
    skips: tuple[Skip, ...] = field(metadata=key("skipped"))
    notes: tuple[str, ...]
    scope: Scope
    scopes: tuple[ScopeTrial, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros over all weights that took part."""
        return share_of_zeros(self.layers)

    @property
    def modified(self) -> bool:
        """Whether any weight became zero that was not."""
        return any(layer.zeros != layer.zeros_before for layer in self.layers)

    @property
    def helps(self) -> str:
        """Where zeros in this pattern save time or space."""
        return Pattern.parse(self.options.pattern).helps


def prune(
    model: ModelSource,
    data: DataSource | None = None,
    options: PruneOptions | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    input_shapes: InputShapes | None = None,
    execution: Execution | None = None,
) -> PruneResult:
    """Zero the weights of smallest score.

    Unstructured: the number of zeros is exactly ``round(sparsity n)`` over all weights together (scopes "global",
    "erk" and "sensitivity") or in each ("layer"), except where there are already more: existing zeros are kept. N:M:
    the ``n`` largest of every ``m`` consecutive input channels stay; a weight with fewer than ``m`` input channels per
    group stays dense. Blocks (Nx1): ``N`` consecutive output channels of a group share their zeros, a last block may
    have fewer; a block's score is the mean of its members', and ``round(sparsity n)`` of the blocks go, by the same
    scopes. Ties are spread over the layers, in an order that the seed gives. With a target, it is the smallest sparsity
    that keeps within it; scope "sensitivity" with ``target_flops`` allocates operations instead of weights. Layers that
    were never trained (the mean of a distribution in YOLO's heads, blur kernels and the like) are left alone unless
    ``include`` names them.

    Args:
        model: The dense model: a path, or an object of onnx, onnx-graphsurgeon or onnx-ir, which is not changed.
        data: Calibration samples for scores and scopes that need them, as for :func:`onnx_asr.repair`; else None.
            Scope "sensitivity" uses them as :func:`onnx_asr.sensitivity` does, "auto" as :func:`onnx_asr.compress`.
        options: Weights to zero, and how many; at least a sparsity, a target or an N:M pattern.
        preprocessing: Of images.
        input_shapes: Shapes of inputs with open sizes, for FLOPs; by default those of a sample or, without data, a
            batch of 1 and other sizes of 224.
        execution: Execution providers, memory limit, progress.

    Raises:
        OptionError: Options that do not fit together, a target that cannot be reached, or nothing left to prune.
        ModelError: Not an ONNX model, quantized, weights not finite, or without weights.
        DataError: Missing, broken or unfitting data.
    """
    options, execution = chosen(options, PruneOptions, data), execution or Execution()
    if options.needs_data and data is None:
        raise OptionError(f"{options.needs_data} needs calibration samples: give them (--data)")
    if data is not None and not options.needs_data:
        raise OptionError(
            f"score '{options.score}' does not use calibration data: drop --data, or choose activation, variance or "
            "gram"
        )
    dense = load(model)
    index = GraphIndex.of(dense)
    check_finite(index, "dense")
    pattern = Pattern.parse(options.pattern)
    weights, skips = prunable_weights(index, survey(index), options.include, options.exclude)
    weights, narrow = split_narrow(weights, pattern)
    weights, useless = split_useless(index, weights, options.target)
    probe = Probe(input_shapes or {}, execution.runtime)
    scope, trials = options.scope, tuple[ScopeTrial, ...]()
    if data is None:
        scores, costs = (
            data_free_scores(index, [weight.points[0] for weight in weights], options.score, options.seed),
            None,
        )
    else:
        held_out = RepairOptions.verify_samples if options.scope in MEASURED else 0
        settings = RepairOptions("refit", samples=options.samples, verify_samples=held_out, seed=options.seed)
        network = Network.of(dense, "dense", compared=True)
        drawn = Samples.of(data, network, settings, preprocessing, execution, verify=True)
        probe = replace(probe, shapes={**drawn.shapes, **probe.shapes})
        calibration = drawn.load()
        scores, costs = _measured(network, drawn, calibration, weights, options, probe, execution)
        if scope == "auto":
            assert options.sparsity is not None
            verifier = trial_verifier(Verifier(dense, drawn, execution), calibration)
            if verifier is None:
                raise OptionError(
                    f"scope 'auto' refits on one batch of samples and measures on others, but there are "
                    f"{calibration.count}, and {calibration.batch_size} make a batch: give more samples"
                )
            verifier.check_reference()
            trials = ScopeTrials(
                network, weights, scores, pattern, options.sparsity, calibration, verifier, execution
            ).run()
            scope = chosen_scope(trials)

    def pruned_to(sparsity: float | None) -> tuple[onnx.ModelProto, tuple[LayerSparsity, ...]]:
        counts = None if costs is None or sparsity is None else costs.keep(sparsity)
        return apply_masks(
            index, weights, make_masks(weights, scores, pattern, sparsity, scope, counts, seed=options.seed)
        )

    budget, share = options.budget, options.sparsity
    if budget is not None:
        share = smallest_share(
            budget,
            _cost(budget, index, probe),
            lambda tried: _cost(budget, GraphIndex.of(pruned_to(tried)[0]), probe),
            execution.progress,
        )
    pruned, layers = pruned_to(share)
    ranked = options.score == "magnitude" and scope == "global" and pattern.n is None and len(weights) > 1
    folded = ranked and all(weight.points[0].batchnorm is None for weight in weights)
    return PruneResult(
        model=pruned,
        options=options,
        before=cost(index, probe),
        after=cost(GraphIndex.of(pruned), probe),
        layers=layers,
        skips=(*skips, *narrow, *useless),
        notes=(*scope_note(trials), *((_FOLDED,) if folded else ()), *collapse_note(layers)),
        scope=scope,
        scopes=trials,
    )


def _measured(
    dense: Network,
    samples: Samples,
    calibration: Calibration,
    weights: Sequence[PrunableWeight],
    options: PruneOptions,
    probe: Probe,
    execution: Execution,
) -> tuple[Values, LayerCosts | None]:
    """Scores, and for scope "sensitivity" costs of zeros, measured on samples.

    The highest sparsity that is tried leaves a quarter of the requested density: no weight ends up with less than that,
    or 0.05. For a target, the density is taken to be about the share that it allows.
    """
    budget, sparsity = options.budget, options.sparsity
    if options.scope != "sensitivity":
        points = [weight.points[0] for weight in weights]
        return weight_scores(dense, points, options.score, calibration, execution, options.seed), None
    if budget is not None:
        whole = _cost(budget, dense.index, probe)
        sparsity = 1 - budget.of(whole) / whole
    assert sparsity is not None
    pattern, tried = Pattern.parse(options.pattern), sorted({*SENSITIVITY_SPARSITIES, 1 - (1 - sparsity) / 4})
    scores, found = fidelity_by_weight(dense, weights, options.score, pattern, tried, samples, calibration, execution)
    costs = layer_costs(weights, scores, pattern, tried, found)
    if budget is not None and budget.measure == "flops":
        costs = replace(costs, prices=unit_flops(Operations.of(dense.index, probe), weights, costs.sizes))
    return scores, costs


def _cost(budget: Budget, index: GraphIndex, probe: Probe) -> int:
    """The cost that the budget limits: zeros count as far as compression, or a sparse kernel, makes use of them."""
    return compressed_size(index.model) if budget.measure == "size" else Operations.of(index, probe).nonzero
