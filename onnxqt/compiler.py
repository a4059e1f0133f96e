"""What a vendor's compiler makes of a float model: its plan, its grids and its file, as a policy says.

`onnxqt.profiles` describes each compiler as data; nothing here knows one by its name. The file is a QDQ model as for
onnxqt's own schemes, so that the emulator and ONNX Runtime read it.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import onnx

from onnxqt.calibrate import RangeTable, make_quantizers, weight_quantizers
from onnxqt.errors import UsageError
from onnxqt.export import quantized_model
from onnxqt.model import Model
from onnxqt.numerics import Grid
from onnxqt.ops import MOVES
from onnxqt.plan import QuantPlan, Rules, make_plan
from onnxqt.profiles import Policy, Precision, Profile, parse_precision
from onnxqt.schemes import Grids, Placement
from onnxqt.trim import Regime

ABSENT = "is not among the operators that the back end runs on integers"

# TensorFlow Lite, operator_property.cc: AVERAGE_POOL_2D keeps its input's grid, MEAN has one of its own.
_POOLS = frozenset({"AveragePool"})
# The same file: LOGISTIC, TANH and SOFTMAX at 16 bits.
_FIXED_16_BITS = (2.0**-15, 0)


def compile_model(
    model: Model, ranges: RangeTable, plan: QuantPlan, policy: Policy, precision: Precision
) -> onnx.ModelProto:
    """The quantized file that a compiler makes of a float model.

    With a dynamic precision the file holds integer weights alone: scales of the activations are found at run time.

    ONNX Runtime 1.19 turns a Conv with an asymmetric weight per channel into an integer kernel that refuses it; such
    files run with `Session(..., optimize=False)`, and in the emulator.

    Args:
        model: the float model.
        ranges: its calibrated ranges, of all tensors of `plan` at least; not used by a dynamic precision.
        plan: what `compiler_plan` made of the model.
        policy: the compiler's.
        precision: what it is asked for.

    Raises:
        CalibrationError: if `ranges` lacks a tensor of the plan.
    """
    grids = grids_of(policy, precision)
    if precision.dynamic:
        plan = _weights_only(plan)
        return quantized_model(model, plan, weight_quantizers(model, plan, grids))
    if policy.weights_float:
        plan = _activations_only(plan)
    return quantized_model(model, plan, make_quantizers(model, plan, ranges, grids, policy.ranges))


def compiler_plan(model: Model, policy: Policy, unbounded: Collection[str] = ()) -> QuantPlan:
    """Where a compiler puts quantizers into a float model: one plan for all its precisions.

    Args:
        model: the float model.
        policy: the compiler's.
        unbounded: tensors that take NaN or infinite values; they stay float.
    """
    rules = Rules(
        operators=MOVES.union(policy.operators),
        vendor=True,
        sharing=_POOLS if policy.pools_share_grid else frozenset(),
        fixed=frozenset(policy.fixed_outputs),
        tail=policy.fallback == "float_tail",
        absent=ABSENT,
    )
    return make_plan(model, unbounded, rules)


def profile_regimes(profile: Profile) -> tuple[Regime, ...]:
    """What a checkpoint meets on a back end: one regime for each of its precisions.

    The grids and their ranges are the compiler's; where quantizers stand is this package's own plan.

    Raises:
        UsageError: if the back end has logarithmic levels, which training cannot round to.
    """
    if profile.arithmetic.levels != "uniform":
        raise UsageError(
            f"--robust-to {profile.name}: training cannot round to its logarithmic levels: name another back end"
        )
    policy = profile.policy
    return tuple(
        Regime(f"{profile.name}/{name}", _trained_grids(profile, precision), policy.ranges, precision.dynamic)
        for name in policy.precisions
        for precision in (parse_precision(name),)
    )


def _trained_grids(profile: Profile, precision: Precision) -> Grids:
    """The grids of a precision; those found at run time per row are symmetric, whatever the calibrated ones are."""
    grids = grids_of(profile.policy, precision)
    if precision.dynamic and profile.arithmetic.dynamic == "row":
        return replace(grids, activation_placement=Placement(symmetric=True))
    return grids


def grids_of(policy: Policy, precision: Precision) -> Grids:
    """The grids on which a compiler puts weights and activations.

    Signed activations of 16 bits are symmetric, as the 64-bit accumulators of such kernels leave no room for zero
    points (TensorFlow Lite 16x8 quantization), and never narrow, as ONNX Runtime 1.19 has no Clip for them.
    """
    bits = precision.activation_bits
    narrow = policy.narrow and bits <= 8
    symmetric = policy.symmetric or (policy.signed and bits > 8)
    fixed: Mapping[str, tuple[float, int]] = {}
    if bits == 8:
        fixed = policy.fixed_outputs
    elif bits == 16 and policy.signed:
        fixed = dict.fromkeys(policy.fixed_outputs, _FIXED_16_BITS)
    return Grids(
        weight=Grid(precision.weight_bits, signed=True, narrow=policy.weights_narrow),
        weight_placement=Placement(policy.weights_symmetric, policy.power_of_two == "all"),
        per_channel=policy.per_channel,
        search_clip=False,
        activation=Grid(bits, policy.signed, narrow),
        io=Grid(max(8, bits), policy.signed, narrow),
        activation_placement=Placement(symmetric, policy.power_of_two != "none"),
        fixed_outputs=fixed,
    )


def _activations_only(plan: QuantPlan) -> QuantPlan:
    """The plan without weights and biases."""
    bare = tuple(replace(node, weight=None, bias=None) for node in plan.integer_nodes)
    return replace(plan, integer_nodes=bare)


def _weights_only(plan: QuantPlan) -> QuantPlan:
    """The plan without what a file of integer weights alone does not hold."""
    weighted = tuple(replace(node, bias=None) for node in plan.integer_nodes if node.weight)
    return replace(plan, activations=(), integer_nodes=weighted)
