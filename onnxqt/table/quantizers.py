"""From a table back to the quantizers of a plan."""

from collections.abc import Mapping

from onnxqt.calibrate import Quantizers, unblocked
from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.plan import QuantPlan
from onnxqt.schemes import SCHEME_NAME, parse_scheme
from onnxqt.table.form import Entry, Table
from onnxqt.table.views import same_params


def table_quantizers(table: Table, plan: QuantPlan, scheme: str) -> Quantizers:
    """The parameters that a table has for every quantizer of a plan under one of its schemes.

    A scheme under which the table quantizes no activation is one of weights alone: its result has no activations.

    Args:
        table: perhaps edited or merged since it was built.
        plan: the sites of the model that the table describes.
        scheme: one of `table.schemes`.

    Raises:
        ExportError: if the table lacks the scheme or a tensor of the plan, or has two grids where the plan has one.
    """
    if scheme not in table.schemes:
        raise ExportError(f"the table has no scheme {scheme}: name one of {', '.join(table.schemes)}")
    inside = {entry.name: entry for entry in table.entries if entry.role not in ("weight", "bias")}
    weights = {entry.name: entry for entry in table.entries if entry.role == "weight"}
    activations = {}
    if any(entry.params(scheme) for entry in inside.values()):
        activations = {site.tensor: _params(inside, site.tensor, scheme) for site in plan.activations}
    for site in plan.activations if activations else ():
        if not same_params(activations[site.tensor], activations[site.group]):
            raise ExportError(
                f"'{site.tensor}' and '{site.group}' share one grid, but the table has two for them under {scheme}: "
                "give both the same scale and zero_point"
            )
    found = {site.tensor: _params(weights, site.tensor, scheme) for site in plan.weights}
    return Quantizers(
        activations,
        found,
        dynamic=not activations and scheme.endswith("-dyn"),
        unblocked=_unblocked(plan, weights, found, scheme),
        scheme=scheme,
        ranges=table.ranges if activations else "",
    )


def _unblocked(
    plan: QuantPlan, entries: Mapping[str, Entry], params: Mapping[str, QParams], scheme: str
) -> dict[str, str]:
    """Why weights have no blocks under a scheme with blocks, by tensor."""
    if SCHEME_NAME.fullmatch(scheme) is None:
        return {}
    shapes = {name: tuple(size or 0 for size in entries[name].shape or ()) for name in params}
    reasons = unblocked(plan, shapes, parse_scheme(scheme).grids) if all(shapes.values()) else {}
    return {name: reason for name, reason in reasons.items() if params[name].block_size is None}


def _params(entries: Mapping[str, Entry], tensor: str, scheme: str) -> QParams:
    entry = entries.get(tensor)
    if entry is None:
        raise ExportError(f"the table has no '{tensor}', which the model quantizes: give the table of this model")
    params = entry.params(scheme)
    if params is None:
        raise ExportError(f"the table does not quantize '{tensor}' under {scheme}: give it a view of this scheme")
    return params
