"""What runs in float: where codes become floats and back, and which way through float costs most."""

import math
from collections.abc import Collection, Mapping, Sequence

from onnxqt.matrix.advice import advice_for
from onnxqt.matrix.run import Floats
from onnxqt.matrix.task import Json
from onnxqt.model import GraphIndex, Node
from onnxqt.ops import Kind, lookup
from onnxqt.profiles import Policy

Ends = Mapping[str, Sequence[tuple[str, bool]]]  # (tensor, whether it becomes floats) by the name of a float node


def ends_of(graph: GraphIndex, floats: Floats, quantized: Collection[str]) -> Ends:
    """Where codes become floats and back.

    Args:
        graph: the float model.
        floats: its float nodes.
        quantized: the tensors that are on a grid.
    """
    ends = {}
    for node in graph.nodes:
        if node.name in floats:
            read = [t for t in node.inputs if t in quantized and graph.producer.get(t, node).name not in floats]
            written = [
                t
                for t in node.outputs
                if t in quantized and any(reader.name not in floats for reader in graph.consumers.get(t, ()))
            ]
            ends[node.name] = [*((tensor, True) for tensor in read), *((tensor, False) for tensor in written)]
    return ends


def costliest(graph: GraphIndex, floats: Floats, ends: Ends, policy: Policy) -> Json | None:
    """The island of float nodes across whose ends most values go between codes and floats, and what to change.

    Of its nodes the first one is named for which there is advice, or else the first that computes something. Where
    the back end stops at an operator that it does not run, only the nodes at which it stops are to be changed.
    """
    best, most = None, 0
    for island in _islands(graph, floats):
        crossing = {end for node in island for end in ends[node.name]}
        values = sum(math.prod(size or 1 for size in graph.shape(tensor) or ()) for tensor, _ in crossing)
        if values > most:
            best, most = island, values
    if best is None:
        return None
    if policy.fallback == "float_tail":
        best = [node for node in best if not any(_is_float(graph, floats, tensor) for tensor in node.inputs)]
    advice = {node.name: advice_for(node, graph, policy) for node in best}
    computes = [node for node in best if lookup(node.op_type, node.domain).kind is not Kind.SAME_GRID]
    node = next((node for node in best if advice[node.name]), (computes or best)[0])
    op_type, reason = floats[node.name]
    return {
        **{"node": node.name, "op_type": op_type, "reason": reason},
        **{"values_per_sample": most, "advice": advice[node.name]},
    }


def _is_float(graph: GraphIndex, floats: Floats, tensor: str) -> bool:
    """Whether a float node gives out a tensor."""
    return tensor in graph.producer and graph.producer[tensor].name in floats


def _islands(graph: GraphIndex, floats: Collection[str]) -> list[list[Node]]:
    """Groups of float nodes that hand each other their results, each in topological order."""
    island_of: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.name not in floats:
            continue
        before = [island_of[p.name] for t in node.inputs if (p := graph.producer.get(t)) and p.name in island_of]
        merged = list({member.name: member for island in before for member in island}.values())
        merged.append(node)
        island_of.update((member.name, merged) for member in merged)
    return list({id(island): island for island in island_of.values()}.values())
