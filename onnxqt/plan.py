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
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from onnxqt.model import GraphIndex, Model, Node
from onnxqt.ops import ELEMENTWISE, Kind, lookup, weight_axis


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
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    output: str
    weight: WeightSite | None = None
    bias: str | None = None
    groups: int = 1
    followers: tuple[str, ...] = ()


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
    """

    activations: tuple[ActivationSite, ...]
    integer_nodes: tuple[IntegerNode, ...]
    float_nodes: tuple[FloatNode, ...]
    unbounded: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> tuple[WeightSite, ...]:
        """The quantized weights, each once."""
        return tuple(dict.fromkeys(node.weight for node in self.integer_nodes if node.weight))


def make_plan(model: Model, unbounded: Collection[str] = ()) -> QuantPlan:
    """Decide where the quantizers of `model` go.

    Args:
        model: the float model.
        unbounded: tensors that take NaN or infinite values, such as a mask of minus infinity; they stay float.
    """
    graph = model.graph
    candidates: dict[str, IntegerNode] = {}
    reasons: dict[str, str] = {}
    inner = _inside_activations(graph)
    for node in graph.nodes:
        verdict = _bounded(_candidate(graph, node), unbounded)
        if isinstance(verdict, IntegerNode):
            verdict = inner.get(node.name, verdict)
        if isinstance(verdict, str):
            reasons[node.name] = verdict
        else:
            candidates[node.name] = verdict
    chosen = _choose(graph, candidates)
    fused = {name for node in chosen for name in node.followers}
    integer = {node.name for node in chosen} | fused
    quantized = {tensor for node in chosen for tensor in (*node.inputs, node.output)}
    return QuantPlan(
        activations=_activation_sites(graph, chosen),
        integer_nodes=tuple(chosen),
        float_nodes=tuple(
            FloatNode(node.name, node.op_type, reasons.get(node.name) or _unpaid(node, quantized))
            for node in graph.nodes
            if node.name not in integer
        ),
        unbounded=tuple(unbounded),
    )


def _bounded(verdict: IntegerNode | str, unbounded: Collection[str]) -> IntegerNode | str:
    """The verdict on a node, unless a tensor of its integer form has no finite range."""
    if isinstance(verdict, IntegerNode):
        for tensor in (*verdict.inputs, verdict.output):
            if tensor in unbounded:
                return f"'{tensor}' takes NaN or infinite values on the samples"
    return verdict


def _unpaid(node: Node, quantized: set[str]) -> str:
    """Why a node that could be integer is not."""
    given = any(tensor in quantized for tensor in node.inputs)
    return "no integer node reads its result" if given else "stands between float nodes"


# --- one node: could it be integer? ---------------------------------------------------------------------


def _candidate(graph: GraphIndex, node: Node) -> IntegerNode | str:
    """The integer form of a node, or the reason why it has none."""
    kind = lookup(node.op_type, node.domain).kind
    if kind is Kind.FLOAT and not any(graph.is_float(t) or not graph.is_typed(t) for t in node.outputs if t):
        return "computes shapes or indices"
    if kind is Kind.FLOAT:
        return "no integer form" if not node.domain else f"operator of the domain '{node.domain}'"
    if kind is Kind.WEIGHTED:
        return _weighted(graph, node)
    operands = node.inputs if kind in (Kind.ADD, Kind.CONCAT) else node.inputs[:1]
    if any(tensor in graph.initializers for tensor in operands):
        return "an operand is constant"
    if not all(graph.is_float(tensor) for tensor in operands):
        return "moves values that are not float32"
    parameters = [tensor for tensor in node.inputs if tensor and tensor not in operands]
    if node.op_type != "Reshape" and any(tensor not in graph.initializers for tensor in parameters):
        return "a parameter is computed at run time"
    if node.op_type == "Pad" and not _pads_with_zero(graph, node):
        return "pads with something else than zero"
    if kind is Kind.SAME_GRID and len([tensor for tensor in node.outputs if tensor]) > 1:
        return "has a second output"
    followers, output = _clamps(graph, node.outputs[0]) if kind is Kind.ADD else ((), node.outputs[0])
    return IntegerNode(node.name, node.op_type, tuple(dict.fromkeys(operands)), output, followers=followers)


def _weighted(graph: GraphIndex, node: Node) -> IntegerNode | str:
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
        followers, bias, output = _bias_add(graph, output, channels)
    clamps, output = _clamps(graph, output)
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


def _bias_add(graph: GraphIndex, tensor: str, channels: int) -> tuple[tuple[str, ...], str | None, str]:
    """A constant Add along the last axis behind a MatMul: (its name, the bias, its output)."""
    reader = _only_reader(graph, tensor)
    if reader is None or lookup(reader.op_type, reader.domain).kind is not Kind.ADD:
        return (), None, tensor
    other = reader.inputs[0] if reader.inputs[1] == tensor else reader.inputs[1]
    *rows, columns = graph.shape(other) or (None,)
    if other not in graph.initializers or columns != channels or any(size != 1 for size in rows):
        return (), None, tensor
    if len(rows) >= len(graph.shape(tensor) or ()):  # a bias of higher rank gives the output its rank
        return (), None, tensor
    return (reader.name,), other, reader.outputs[0]


def _clamps(graph: GraphIndex, tensor: str) -> tuple[tuple[str, ...], str]:
    """A Relu or constant Clip behind `tensor`: (its name, its output)."""
    reader = _only_reader(graph, tensor)
    if reader is None or lookup(reader.op_type, reader.domain).kind is not Kind.CLAMP:
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
        is_add = lookup(node.op_type, node.domain).kind is Kind.ADD
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


# --- the whole graph: which candidates pay? -------------------------------------------------------------


def _choose(graph: GraphIndex, candidates: dict[str, IntegerNode]) -> list[IntegerNode]:
    """The candidates that become integer, in topological order.

    Starts from the weighted operators and spreads along quantized tensors until nothing changes.
    """
    chosen = {name: node for name, node in candidates.items() if lookup(node.op_type).kind is Kind.WEIGHTED}
    moved_inputs = _moved_inputs(graph, candidates)
    while True:
        fused = {name for node in chosen.values() for name in node.followers}
        quantized = {tensor for node in chosen.values() for tensor in (*node.inputs, node.output)}
        inputs = {tensor for node in chosen.values() for tensor in node.inputs}
        read = _moved(graph, candidates, inputs, (Kind.SAME_GRID, Kind.CONCAT))
        wanted = _moved(graph, candidates, {*read, *graph.outputs}, (Kind.SAME_GRID,))
        grown = {
            name: node
            for name, node in candidates.items()
            if name in chosen
            or (name not in fused and any(t in quantized for t in node.inputs) and _pays(graph, node, read, wanted))
            or (node.output in quantized and node.output in moved_inputs)
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
        return node.output in wanted
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
            moved.add(node.output)
    return moved


def _moved(
    graph: GraphIndex, candidates: dict[str, IntegerNode], tensors: set[str], kinds: tuple[Kind, ...]
) -> set[str]:
    """`tensors`, and those whose elements operators of these kinds move there."""
    moved = set(tensors)
    for node in reversed(graph.nodes):
        candidate = candidates.get(node.name)
        if candidate and lookup(candidate.op_type).kind in kinds and candidate.output in moved:
            moved.update(candidate.inputs)
    return moved


def _without_fused(chosen: dict[str, IntegerNode]) -> list[IntegerNode]:
    fused = {name for node in chosen.values() for name in node.followers}
    return [node for name, node in chosen.items() if name not in fused]


# --- shared grids ---------------------------------------------------------------------------------------


def _activation_sites(graph: GraphIndex, nodes: Iterable[IntegerNode]) -> tuple[ActivationSite, ...]:
    parent: dict[str, str] = {}

    def root(tensor: str) -> str:
        while parent.setdefault(tensor, tensor) != tensor:
            tensor = parent[tensor]
        return tensor

    order: dict[str, None] = {}
    for node in nodes:
        order.update(dict.fromkeys((*node.inputs, node.output)))
        if lookup(node.op_type).kind in (Kind.SAME_GRID, Kind.CONCAT):
            for tensor in node.inputs:
                parent[root(node.output)] = root(tensor)
    outside = {*graph.inputs, *graph.outputs}
    io_roots = {root(tensor) for tensor in order if tensor in outside}
    return tuple(ActivationSite(tensor, root(tensor), root(tensor) in io_roots) for tensor in order)


def tensors_of_group(plan: QuantPlan, group: str) -> Iterator[str]:
    """The activations that share the grid of `group`."""
    return (site.tensor for site in plan.activations if site.group == group)
