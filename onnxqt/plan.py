"""Stage 2, plan: where quantizers go, what shares a grid, what stays float and why.

The plan looks at the graph alone: it holds no data and no scales. Its rules:

* Conv, ConvTranspose, Gemm and MatMul are integer wherever their operands allow it. What follows one of them
  alone - a constant bias Add after MatMul, then Relu or Clip - is fused into it: no quantizer in between.
* Add, Concat, pooling and free-standing Relu/Clip are integer where an operand is quantized anyway; operators
  that only move codes also need a reader of codes behind them. So no quantizer pair stands between float nodes.
  For Concat that reader is an integer node: nothing else is worth a grid that its operands share, be they as
  unlike as the boxes and the scores of a detector.
* What is only compared, such as the condition of an If, is not rounded for it.
* What moves codes between an input of the model and an integer node is integer: the model takes codes.
* An activation function that exporters write as several nodes (x * sigmoid(x), the tanh form of GELU) is one unit:
  no quantizer inside.
* A tensor has one quantizer, whoever reads it.
* Operators that move or select codes, and Concat, share one grid between inputs and output.

A vendor's compiler differs in what it runs on integers; `Rules` says how (see `onnxqt.compiler`). For such a plan:

* Codes reach computing nodes through any number of moves.
* Add, Sub, Mul and PRelu may have a constant operand, which is quantized as well, and Div a constant divisor.
* An activation function in several nodes is one integer node if the back end runs all of them, or the operator
  that they spell out; otherwise all of them stay float.
* Where an output grid is prescribed, Concat does not share it.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from onnxqt.model import GraphIndex, Model, Node
from onnxqt.ops import DEFAULT_OPERATORS, ELEMENTWISE, Kind, lookup, weight_axis


@dataclass(frozen=True)
class ActivationSite:
    """A quantized activation.

    Attributes:
        tensor: its name.
        group: the tensor whose grid it shares; its own name where it shares none.
        io: whether the group holds an input or output of the model, which keep at least 8 bits.
    """

    tensor: str
    group: str
    io: bool


@dataclass(frozen=True)
class WeightSite:
    """A quantized weight, per channel along `axis` where the scheme asks for it.

    Attributes:
        tensor: its name.
        axis: of its output channels.
        batched: a stack of matrices, for MatMul.
    """

    tensor: str
    axis: int
    batched: bool = False


@dataclass(frozen=True)
class IntegerNode:
    """A node that runs on integers, with the nodes fused into it.

    Attributes:
        name: of the node.
        op_type: of the node.
        inputs: its quantized activations.
        output: the quantized tensor that it, with `followers`, produces.
        weight: its quantized weight, if it has one.
        bias: its constant bias, quantized to INT32 with scale `s_input * s_weight`.
        groups: group count of a convolution.
        followers: names of the nodes fused behind it, in order.
        constant: its constant operand, quantized per tensor; for a Div the divisor, which is multiplied by inverted.
        others: its further outputs, which share the grid of `output`.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    output: str
    weight: WeightSite | None = None
    bias: str | None = None
    groups: int = 1
    followers: tuple[str, ...] = ()
    constant: str | None = None
    others: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """All its outputs."""
        return (self.output, *self.others)


@dataclass(frozen=True)
class FloatNode:
    """A node that stays float."""

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class QuantPlan:
    """Every decision about the graph; the nodes in topological order.

    Attributes:
        activations: the quantized activations.
        integer_nodes: the nodes that run on integers.
        float_nodes: the nodes that stay float, with reasons.
        unbounded: tensors that no grid can hold, which the plan was told of.
        floats: names of nodes that were to stay float, which the plan was told of.
    """

    activations: tuple[ActivationSite, ...]
    integer_nodes: tuple[IntegerNode, ...]
    float_nodes: tuple[FloatNode, ...]
    unbounded: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> tuple[WeightSite, ...]:
        """The quantized weights, each once."""
        return tuple(dict.fromkeys(node.weight for node in self.integer_nodes if node.weight))


@dataclass(frozen=True, slots=True)
class Rules:
    """What a back end runs on integers; by default what onnxqt's own schemes do.

    Attributes:
        operators: that it runs on integers.
        vendor: whether they are those of a vendor's compiler (see above).
        sharing: operators that keep their input's grid though they compute.
        fixed: operators whose output grid is prescribed.
        tail: whether everything behind the first node that it does not run stays float as well.
        absent: why an operator that is not among them stays float, after the operator's name.
        floats: names of nodes that stay float whatever they are.
    """

    operators: frozenset[str] = DEFAULT_OPERATORS
    vendor: bool = False
    sharing: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    tail: bool = False
    absent: str = ""
    floats: frozenset[str] = frozenset()


_OWN_RULES = Rules()

# What exporters write some activation functions as: the operators of which at least the first is there.
_SPELLED_OUT = (
    ("Gelu", ("Erf", "Add", "Div", "Mul")),
    ("Gelu", ("Tanh", "Add", "Mul", "Pow", "Sqrt")),
    ("HardSwish", ("HardSigmoid", "Mul")),
    ("Mish", ("Softplus", "Mul", "Tanh")),
)


def make_plan(model: Model, unbounded: Collection[str] = (), rules: Rules = _OWN_RULES) -> QuantPlan:
    """Decide where the quantizers of `model` go.

    Args:
        model: the float model.
        unbounded: tensors that take NaN or infinite values, such as a mask of minus infinity; they stay float.
        rules: what the back end runs on integers.
    """
    graph = model.graph
    units = _units(graph, rules)
    inner = {} if rules.vendor else _inside_activations(graph)
    verdicts: dict[str, IntegerNode | str] = {}
    for node in graph.nodes:
        own = None if node.name in rules.floats else units.get(node.name)
        verdict = _bounded(own or _candidate(graph, node, rules), unbounded)
        if isinstance(verdict, IntegerNode) and node.name not in units:
            verdict = inner.get(node.name, verdict)
        verdicts[node.name] = verdict
    if rules.tail:
        verdicts.update(_tail(graph, verdicts))
    candidates = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, IntegerNode)}
    reasons = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, str)}
    chosen = _choose(graph, candidates, rules)
    fused = {name for node in chosen for name in node.followers}
    integer = {node.name for node in chosen} | fused
    quantized = {tensor for node in chosen for tensor in (*node.inputs, *node.outputs)}
    return QuantPlan(
        activations=_activation_sites(graph, chosen, rules),
        integer_nodes=tuple(chosen),
        float_nodes=tuple(
            FloatNode(node.name, node.op_type, reasons.get(node.name) or _unpaid(node, quantized))
            for node in graph.nodes
            if node.name not in integer
        ),
        unbounded=tuple(unbounded),
        floats=tuple(sorted(rules.floats)),
    )


def _bounded(verdict: IntegerNode | str, unbounded: Collection[str]) -> IntegerNode | str:
    """The verdict on a node, unless a tensor of its integer form has no finite range."""
    if isinstance(verdict, IntegerNode):
        for tensor in (*verdict.inputs, *verdict.outputs):
            if tensor in unbounded:
                return f"'{tensor}' takes NaN or infinite values on the samples"
    return verdict


def _unpaid(node: Node, quantized: set[str]) -> str:
    """Why a node that could be integer is not."""
    given = any(tensor in quantized for tensor in node.inputs)
    return "no integer node reads its result" if given else "stands between float nodes"


def fixed_site(node: IntegerNode, fixed: Collection[str]) -> bool:
    """Whether the output grid of a node is prescribed; an operator inside an activation function has no say."""
    return node.op_type in fixed and not node.followers


def _tail(graph: GraphIndex, verdicts: dict[str, IntegerNode | str]) -> dict[str, str]:
    """Why nodes behind one that the back end does not run stay float, by name."""
    stops: dict[str, str] = {}  # the node at which the back end stops before a tensor exists, by the tensor
    reasons: dict[str, str] = {}
    fused = {name for verdict in verdicts.values() if isinstance(verdict, IntegerNode) for name in verdict.followers}
    for node in graph.nodes:
        before = next((stops[name] for name in (*node.inputs, *node.captured) if name in stops), None)
        stop = before
        if before is not None:
            reasons[node.name] = f"follows '{before}', where the back end stops"
        elif isinstance(verdicts[node.name], str) and node.name not in fused and _computes(graph, node):
            stop = node.name
        if stop is not None:
            stops.update(dict.fromkeys(node.outputs, stop))
    return reasons


def _computes(graph: GraphIndex, node: Node) -> bool:
    """Whether a node makes floats of other floats; what only spreads constants, such as a class token, does not."""
    read = [tensor for tensor in (*node.inputs, *node.captured) if tensor and tensor not in graph.initializers]
    made = [tensor for tensor in node.outputs if tensor]
    return all(any(graph.is_float(t) or not graph.is_typed(t) for t in tensors) for tensors in (read, made))


# --- one node: could it be integer? ---------------------------------------------------------------------


def _candidate(graph: GraphIndex, node: Node, rules: Rules) -> IntegerNode | str:
    """The integer form of a node, or the reason why it has none."""
    if node.name in rules.floats:
        return "an override keeps it float"
    kind = lookup(node.op_type, node.domain).kind
    absent = kind is Kind.FLOAT or not _runs(graph, node, rules)
    if absent and not any(graph.is_float(t) or not graph.is_typed(t) for t in node.outputs if t):
        return "computes shapes or indices"
    if node.domain not in ("", "ai.onnx"):
        return f"operator of the domain '{node.domain}'"
    if absent:
        return f"{node.op_type} {rules.absent}" if rules.absent else "no integer form"
    return _weighted(graph, node, rules) if kind is Kind.WEIGHTED else _unweighted(graph, node, rules)


def _unweighted(graph: GraphIndex, node: Node, rules: Rules) -> IntegerNode | str:
    """The integer form of a node that multiplies by no weight."""
    kind = lookup(node.op_type).kind
    several = kind in (Kind.ARITHMETIC, Kind.CONCAT) or node.op_type == "PRelu"
    operands = node.inputs if several else node.inputs[:1]
    constants = [tensor for tensor in operands if tensor in graph.initializers]
    if constants and not (rules.vendor and several and kind is not Kind.CONCAT):
        return "an operand is constant"
    if not all(graph.is_float(tensor) for tensor in operands):
        return "moves values that are not float32"
    if reason := _parameter_reason(graph, node, operands):
        return reason
    if node.op_type in ("Div", "PRelu") and node.inputs[1] not in constants:
        return "the divisor or slope is computed at run time"
    others = tuple(tensor for tensor in node.outputs[1:] if tensor)
    if others and node.op_type != "Split":
        return "has a second output"
    output = node.outputs[0]
    followers, output = _clamps(graph, output, rules) if kind is Kind.ARITHMETIC else ((), output)
    return IntegerNode(
        node.name,
        node.op_type,
        tuple(dict.fromkeys(tensor for tensor in operands if tensor not in constants)),
        output,
        followers=followers,
        constant=next(iter(constants), None),
        others=others,
    )


def _runs(graph: GraphIndex, node: Node, rules: Rules) -> bool:
    """Whether the back end runs an operator on integers.

    A MatMul with a constant matrix is the product of a Gemm, and a division by a constant a Mul.
    """
    if node.op_type == "MatMul" and node.inputs[1] in graph.initializers and "Gemm" in rules.operators:
        return True
    return ("Mul" if node.op_type == "Div" else node.op_type) in rules.operators


# Operators whose shapes, sizes or indices may be computed.
_COMPUTED = frozenset({"Expand", "Gather", "GatherElements", "GatherND", "Reshape", "Resize", "Tile"})


def _parameter_reason(graph: GraphIndex, node: Node, operands: Sequence[str]) -> str | None:
    """Why the parameters of a node keep it from running on integers."""
    parameters = [tensor for tensor in node.inputs if tensor and tensor not in operands]
    if node.op_type not in _COMPUTED and any(tensor not in graph.initializers for tensor in parameters):
        return "a parameter is computed at run time"
    if node.op_type == "Pad" and not _pads_with_zero(graph, node):
        return "pads with something else than zero"
    if node.op_type == "Resize" and node.attributes.get("mode", b"nearest") == b"cubic":
        return "cubic interpolation leaves the range of its input"
    if node.op_type == "Resize" and node.attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        return "crops while it resizes"
    return None


def _weighted(graph: GraphIndex, node: Node, rules: Rules) -> IntegerNode | str:
    data, weight, *rest = node.inputs
    if data in graph.initializers:
        return "the left operand is constant"
    if not graph.is_float(data) or not graph.is_float(weight):
        return "an operand is not float32"
    if weight not in graph.initializers:
        if node.op_type != "MatMul":
            return "the weight is computed at run time"
        return IntegerNode(node.name, node.op_type, tuple(dict.fromkeys((data, weight))), node.outputs[0])
    rank = len(graph.initializers[weight].dims)
    if rank < 2:
        return "the weight is a vector"
    if node.op_type == "Gemm" and (reason := _gemm_reason(graph, node)):
        return reason
    bias = rest[0] if rest and rest[0] else None
    if bias is not None and bias not in graph.initializers:
        return "the bias is computed at run time"
    axis = weight_axis(node.op_type, node.attributes, rank)
    followers: tuple[str, ...] = ()
    output = node.outputs[0]
    if node.op_type == "MatMul":
        channels = graph.initializers[weight].dims[axis]
        followers, bias, output = _bias_add(graph, output, channels, rules)
    clamps, output = _clamps(graph, output, rules)
    return IntegerNode(
        node.name,
        node.op_type,
        (data,),
        output,
        WeightSite(weight, axis, batched=node.op_type == "MatMul" and rank > 2),
        bias,
        node.attributes.get("group", 1),
        followers + clamps,
    )


def _gemm_reason(graph: GraphIndex, node: Node) -> str | None:
    if node.attributes.get("transA", 0):
        return "transA = 1"
    if node.attributes.get("alpha", 1.0) != 1.0 or node.attributes.get("beta", 1.0) != 1.0:
        return "alpha or beta scales a computed operand"
    if len(node.inputs) > 2 and node.inputs[2] in graph.initializers:
        dims = graph.initializers[node.inputs[2]].dims
        if any(size != 1 for size in dims[:-1]):
            return "the bias differs between rows"
    return None


def _pads_with_zero(graph: GraphIndex, node: Node) -> bool:
    if node.attributes.get("mode", b"constant") != b"constant":
        return True
    value = graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return value is None or not value.any()


def _only_reader(graph: GraphIndex, tensor: str) -> Node | None:
    """The single consumer of a tensor that nobody else sees."""
    readers = graph.consumers.get(tensor, ())
    return readers[0] if len(readers) == 1 and tensor not in graph.outputs else None


def _bias_add(graph: GraphIndex, tensor: str, channels: int, rules: Rules) -> tuple[tuple[str, ...], str | None, str]:
    """A constant Add along the last axis behind a MatMul: (its name, the bias, its output)."""
    reader = _only_reader(graph, tensor)
    if reader is None or reader.op_type != "Add" or reader.domain not in ("", "ai.onnx"):
        return (), None, tensor
    if reader.name in rules.floats:
        return (), None, tensor
    other = reader.inputs[0] if reader.inputs[1] == tensor else reader.inputs[1]
    *rows, columns = graph.shape(other) or (None,)
    if other not in graph.initializers or columns != channels or any(size != 1 for size in rows):
        return (), None, tensor
    if len(rows) >= len(graph.shape(tensor) or ()):  # a bias of higher rank gives the output its rank
        return (), None, tensor
    return (reader.name,), other, reader.outputs[0]


def _clamps(graph: GraphIndex, tensor: str, rules: Rules) -> tuple[tuple[str, ...], str]:
    """A Relu or constant Clip behind `tensor`: (its name, its output)."""
    reader = _only_reader(graph, tensor)
    if reader is None or lookup(reader.op_type, reader.domain).kind is not Kind.CLAMP:
        return (), tensor
    if reader.op_type not in rules.operators or reader.name in rules.floats:
        return (), tensor
    if any(bound and bound not in graph.initializers for bound in reader.inputs[1:]):
        return (), tensor
    return (reader.name,), reader.outputs[0]


def _inside_activations(graph: GraphIndex) -> dict[str, str]:
    """Why an Add in the middle of an activation function is not integer, by its name.

    All its operands are functions, value by value, of one tensor: x + 0.044715 x^3.
    """
    origin: dict[str, str] = {}  # the one tensor of which another is a function value by value
    reasons = {}
    for node in graph.nodes:
        is_add = node.op_type == "Add"
        if node.domain or not (is_add or node.op_type in ELEMENTWISE):
            continue
        operands = [tensor for tensor in node.inputs if tensor not in graph.initializers]
        origins = {origin.get(tensor, tensor) for tensor in operands}
        if len(origins) != 1 or not all(graph.is_float(tensor) for tensor in operands):
            continue
        if is_add and not any(tensor in origin for tensor in operands):
            continue  # a tensor plus itself or a constant
        origin[node.outputs[0]] = origins.pop()
        if is_add:
            reasons[node.name] = f"is part of an activation function of '{origin[node.outputs[0]]}'"
    return reasons


def _units(graph: GraphIndex, rules: Rules) -> dict[str, IntegerNode | str]:
    """What becomes of the nodes of activation functions, by name: functions of one tensor, value by value.

    The first node stands for the whole of an integer function, with the others as its followers; these are then
    among the candidates as well, and drop out as everything that is fused does.
    """
    verdicts: dict[str, IntegerNode | str] = {}
    if not rules.vendor:
        return verdicts
    for origin, nodes in _functions(graph):
        first, *rest = nodes
        if _runs_function(graph, nodes, rules) and rules.floats.isdisjoint(node.name for node in nodes):
            followers = tuple(node.name for node in rest)
            verdicts[first.name] = IntegerNode(
                first.name, first.op_type, (origin,), nodes[-1].outputs[0], followers=followers
            )
            verdicts.update(dict.fromkeys(followers, f"is part of the activation function '{first.name}'"))
            continue
        for node in nodes:
            if _runs(graph, node, rules):
                verdicts[node.name] = f"is part of an activation function of '{origin}'"
    return verdicts


def _runs_function(graph: GraphIndex, nodes: list[Node], rules: Rules) -> bool:
    """Whether a back end runs the nodes of an activation function, or the operator that they spell out."""
    names = {node.op_type for node in nodes}
    spelled_out = any(
        operator in rules.operators and parts[0] in names and names.issubset(parts) for operator, parts in _SPELLED_OUT
    )
    return spelled_out or all(_runs(graph, node, rules) for node in nodes)


def _functions(graph: GraphIndex) -> list[tuple[str, list[Node]]]:
    """Activation functions that are written as several nodes: the tensor that each reads, and its nodes in order.

    Nobody outside reads a value inside; where somebody does, one function ends and another begins. Nodes in a row,
    each of which reads the one before alone, are functions of their own.
    """
    ends: set[str] = set()  # values inside that are read outside as well, or by two functions
    while True:
        origin = _origins(graph, ends)
        last = _last_values(graph, origin, ends)
        fork = next((tensor for tensor, lasts in last.items() if len(lasts) > 1), None)
        if fork is None:
            break
        ends.add(fork)  # the last of them, for those before it may fork there alone
    members: dict[str, list[Node]] = {}  # by the last value of the function
    for node in graph.nodes:
        for value in last.get(node.outputs[0], ()) if node.outputs else ():
            members.setdefault(value, []).append(node)
    return [(origin[value], nodes) for value, nodes in members.items() if not _in_a_row(graph, nodes)]


def _last_values(graph: GraphIndex, origin: Mapping[str, str], ends: set[str]) -> dict[str, set[str]]:
    """For each value of a function, the last values that are made of it there: itself, where others read it."""
    last: dict[str, set[str]] = {}
    for node in reversed(graph.nodes):
        tensor = node.outputs[0] if node.outputs else ""
        if tensor not in origin:
            continue
        readers = graph.consumers.get(tensor, ())
        within = [reader.outputs[0] for reader in readers if origin.get(reader.outputs[0]) == origin[tensor]]
        if tensor in ends or not within:
            last[tensor] = {tensor}
            continue
        last[tensor] = set().union(*(last[result] for result in within))
        if len(within) < len(readers) or tensor in graph.outputs:
            last[tensor].add(tensor)
    return last


def _in_a_row(graph: GraphIndex, nodes: list[Node]) -> bool:
    """Whether each node reads one value, once, which no other of them reads."""
    read = [tensor for node in nodes for tensor in node.inputs if tensor not in graph.initializers]
    return len(nodes) == 1 or len(set(read)) == len(read)


def _origins(graph: GraphIndex, ends: set[str]) -> dict[str, str]:
    """The one tensor of which another is a function, value by value, at which `ends` start anew."""
    origin: dict[str, str] = {}
    for node in graph.nodes:
        if node.domain or not (node.op_type == "Add" or node.op_type in ELEMENTWISE):
            continue
        computed = [tensor for tensor in node.inputs if tensor not in graph.initializers]
        origins = {tensor if tensor in ends else origin.get(tensor, tensor) for tensor in computed}
        scalars = all(math.prod(graph.initializers[t].dims) == 1 for t in node.inputs if t in graph.initializers)
        if len(origins) == 1 and scalars and all(graph.is_float(tensor) for tensor in computed):
            origin[node.outputs[0]] = origins.pop()
    return origin


# --- the whole graph: which candidates pay? -------------------------------------------------------------


def _choose(graph: GraphIndex, candidates: dict[str, IntegerNode], rules: Rules) -> list[IntegerNode]:
    """The candidates that become integer, in topological order.

    Starts from the weighted operators and spreads along quantized tensors until nothing changes.
    """
    chosen = {name: node for name, node in candidates.items() if lookup(node.op_type).kind is Kind.WEIGHTED}
    moved_inputs = _moved_inputs(graph, candidates)
    while True:
        fused = {name for node in chosen.values() for name in node.followers}
        quantized = {tensor for node in chosen.values() for tensor in (*node.inputs, *node.outputs)}
        inputs = {tensor for node in chosen.values() for tensor in node.inputs}
        read = _moved(graph, candidates, inputs, (Kind.SAME_GRID, Kind.CONCAT))
        wanted = _moved(graph, candidates, {*read, *graph.outputs}, (Kind.SAME_GRID,))
        reached = _reached(graph, candidates, quantized) if rules.vendor else quantized
        grown = {
            name: node
            for name, node in candidates.items()
            if name in chosen
            or (name not in fused and any(t in reached for t in node.inputs) and _pays(graph, node, read, wanted))
            or (node.output in quantized and moved_inputs.issuperset(node.outputs))
        }
        if len(grown) == len(chosen):
            return _without_fused(grown)
        chosen = grown


def _pays(graph: GraphIndex, node: IntegerNode, read: set[str], wanted: set[str]) -> bool:
    """Whether a node behind quantized tensors should be integer.

    Args:
        graph: the graph around it.
        node: the candidate.
        read: tensors whose codes an integer node reads, directly or moved.
        wanted: these, and those that the user reads.
    """
    kind = lookup(node.op_type).kind
    if kind is Kind.CONCAT:
        return node.output in read
    if kind is Kind.SAME_GRID and node.op_type != "MaxPool":
        return not wanted.isdisjoint(node.outputs)
    return not _only_compared(graph, node.output)


def _only_compared(graph: GraphIndex, tensor: str) -> bool:
    """Whether nothing but conditions, indices and shapes is made of a tensor."""
    readers = graph.consumers.get(tensor, ())
    if tensor in graph.outputs or not readers:
        return False
    results = [result for node in readers for result in node.outputs if result]
    return all(graph.is_typed(result) and not graph.is_float(result) for result in results)


def _moved_inputs(graph: GraphIndex, candidates: dict[str, IntegerNode]) -> set[str]:
    """Tensors that hold nothing but the elements of an input of the model."""
    moved: set[str] = set()
    for node in candidates.values():
        same_grid = lookup(node.op_type).kind is Kind.SAME_GRID
        if same_grid and (node.inputs[0] in graph.inputs or node.inputs[0] in moved):
            moved.update(node.outputs)
    return moved


def _moved(
    graph: GraphIndex, candidates: dict[str, IntegerNode], tensors: set[str], kinds: tuple[Kind, ...]
) -> set[str]:
    """`tensors`, and those whose elements operators of these kinds move there."""
    moved = set(tensors)
    for node in reversed(graph.nodes):
        candidate = candidates.get(node.name)
        if candidate and lookup(candidate.op_type).kind in kinds and not moved.isdisjoint(candidate.outputs):
            moved.update(candidate.inputs)
    return moved


def _reached(graph: GraphIndex, candidates: dict[str, IntegerNode], tensors: set[str]) -> set[str]:
    """`tensors`, and those to which operators that only move elements bring theirs."""
    reached = set(tensors)
    for node in graph.nodes:
        candidate = candidates.get(node.name)
        moves = candidate and lookup(candidate.op_type).kind in (Kind.SAME_GRID, Kind.CONCAT)
        if candidate and moves and not reached.isdisjoint(candidate.inputs):
            reached.update(candidate.outputs)
    return reached


def _without_fused(chosen: dict[str, IntegerNode]) -> list[IntegerNode]:
    fused = {name for node in chosen.values() for name in node.followers}
    return [node for name, node in chosen.items() if name not in fused]


# --- shared grids ---------------------------------------------------------------------------------------


def _activation_sites(graph: GraphIndex, nodes: Iterable[IntegerNode], rules: Rules) -> tuple[ActivationSite, ...]:
    nodes = list(nodes)
    parent: dict[str, str] = {}

    def root(tensor: str) -> str:
        while parent.setdefault(tensor, tensor) != tensor:
            tensor = parent[tensor]
        return tensor

    order: dict[str, None] = {}
    for node in nodes:
        order.update(dict.fromkeys((*node.inputs, *node.outputs)))
        if lookup(node.op_type).kind is Kind.SAME_GRID or node.op_type in rules.sharing:
            for tensor in (*node.inputs, *node.others):
                parent[root(node.output)] = root(tensor)
    fixed = {root(node.output) for node in nodes if fixed_site(node, rules.fixed)}
    for node in nodes:
        if lookup(node.op_type).kind is Kind.CONCAT:
            for tensor in node.inputs:
                if root(tensor) not in fixed:
                    parent[root(node.output)] = root(tensor)
    outside = {*graph.inputs, *graph.outputs}
    io_roots = {root(tensor) for tensor in order if tensor in outside}
    return tuple(ActivationSite(tensor, root(tensor), root(tensor) in io_roots) for tensor in order)


def tensors_of_group(plan: QuantPlan, group: str) -> Iterator[str]:
    """The activations that share the grid of `group`."""
    return (site.tensor for site in plan.activations if site.group == group)
