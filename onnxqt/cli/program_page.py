"""An integer program for people: a paragraph per node, a line per fact."""

from collections.abc import Iterator, Mapping
from typing import Any

import click
import numpy as np

from onnxqt.emulate import Program
from onnxqt.profiles import Profile


def print_program(program: Program, profile: Profile) -> None:
    """The integer program for people: a paragraph per node, a line per fact."""
    click.echo(
        f"{len(program.integer_nodes)} nodes on integers, {len(program.float_nodes)} in float: "
        f"{profile.title} ({profile.evidence})"
    )
    listing, arrays = program.listing()
    for node in listing["nodes"]:
        if node["kind"] != "shape":
            click.echo(f"\n{node['name']}: {node['op_type']}, {node['kind']}")
            for label, fact in (*_operands(node, listing["values"], arrays), *_manner(node)):
                click.echo(f"    {label:<12}{fact}")


def _operands(
    node: dict[str, Any], values: dict[str, dict[str, Any]], arrays: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What a node reads and gives out: types, scales and zero points."""
    name = node["name"]
    for value in node["inputs"]:
        yield "input", f"{_grid(values.get(value))}  {value}"
    if f"weights:{name}" in arrays and f"weight_scale:{name}" in arrays:
        yield "weights", f"int{node['weight_bits'] or 8}, scale {_span(arrays[f'weight_scale:{name}'])}"
    for key, kind in (("bias", "int32"), ("float_bias", "float32")):
        if f"{key}:{name}" in arrays:
            yield "bias", f"{kind}, {_span(arrays[f'{key}:{name}'])}"
    for value in node["outputs"]:
        yield "output", f"{_grid(values.get(value))}  {value}"


def _grid(codes: dict[str, Any] | None) -> str:
    if codes is None:
        return "float"
    kind = f"{'' if codes['signed'] else 'u'}int{codes['bits']}"
    return f"{kind}, scale {codes['scale']:.6g}, zero point {codes['zero_point']}"


def _manner(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How a node computes."""
    how = node["requantize"]
    if node["reason"]:
        yield "reason", node["reason"]
    if node["accumulator"]:
        yield (
            "accumulator",
            node["accumulator"] + ("" if node["bound"] is None else f", at most {node['bound']:,} here"),
        )
    if node["rule"]:
        yield "rule", node["rule"]
    if how and how["mantissa"]:
        yield "multiplier", f"mantissa {_span(how['mantissa'])}, exponent {_span(how['exponent'])}"
    elif how:
        yield "multiplier", _span(how["multiplier"])
    if node["clamp"]:
        yield "clamp", "{} to {}".format(*node["clamp"])
    if node["implementation"]:
        yield "computed by", node["implementation"]
    if node["note"]:
        yield "note", node["note"]


def _span(values: Any) -> str:
    """One value, or the ends of those of the channels."""
    values = np.asarray(values)
    form = "{}" if np.issubdtype(values.dtype, np.integer) else "{:.6g}"
    low, high = form.format(values.min()), form.format(values.max())
    return (low if low == high else f"{low} to {high}") + (f" ({values.size} channels)" if values.size > 1 else "")


def everything(program: Program) -> dict[str, Any]:
    """The integer program for machines, its arrays as lists."""
    listing, arrays = program.listing()
    return {**listing, "arrays": {name: array.tolist() for name, array in arrays.items()}}
