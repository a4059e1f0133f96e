"""What formats cannot express, in one sentence each, and only where the table at hand has it."""

from collections.abc import Callable, Iterable, Sequence

from onnxqt.numerics import QParams
from onnxqt.table.form import Entry, Role, Table
from onnxqt.vendors.ranges import ACTIVATIONS, is_asymmetric

_SHOWN = 3


def named(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are: `'a', 'b', 'c' and 4 more`."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def where(
    table: Table, scheme: str, roles: Sequence[Role], test: Callable[[QParams], bool], sentence: str
) -> tuple[str, ...]:
    """`sentence` with the tensors of these roles whose parameters pass a test in place of {}; nothing if none does."""
    names = [entry.name for entry, params in table.quantized(scheme, *roles) if test(params)]
    return (sentence.format(named(names)),) if names else ()


def asymmetry(table: Table, scheme: str, roles: Sequence[Role] = ACTIVATIONS) -> tuple[str, ...]:
    """For formats that know a magnitude alone."""
    sentence = "the format is symmetric: the ranges of {} are widened to their largest magnitude"
    return where(table, scheme, roles, is_asymmetric, sentence)


def other_widths(table: Table, scheme: str, bits: int, roles: Sequence[Role] = ACTIVATIONS) -> tuple[str, ...]:
    """For formats that give ranges to a tool that lays codes of its own width over them."""
    sentence = f"the tool's codes have {bits} bits: {{}} keep their ranges with other steps"
    return where(table, scheme, roles, lambda params: params.grid.bits != bits, sentence)


def activations(table: Table) -> list[Entry]:
    """Its entries that are computed or fed, whether quantized or not; those that others absorb are left out."""
    return _existing(table, ACTIVATIONS)


def float_tensors(table: Table, scheme: str, roles: Sequence[Role] = ACTIVATIONS) -> dict[str, str]:
    """Why each tensor of these roles that a scheme leaves float stays so, by its name; absorbed ones are left out."""
    return {
        entry.name: entry.reason or f"stays float under {scheme}"
        for entry in _existing(table, roles)
        if entry.params(scheme) is None
    }


def float_nodes(table: Table, scheme: str) -> list[str]:
    """Names of the nodes that read or give out a tensor that a scheme leaves float, in the order of the table."""
    left = float_tensors(table, scheme)
    entries = [entry for entry in activations(table) if entry.name in left]
    nodes = [node.node for entry in entries for node in (entry.producer, *entry.consumers) if node is not None]
    return list(dict.fromkeys(nodes))


def _existing(table: Table, roles: Sequence[Role]) -> list[Entry]:
    fused = {name for entry in table.entries for name in entry.fused_from}
    return [entry for entry in table.entries if entry.role in roles and entry.name not in fused]
