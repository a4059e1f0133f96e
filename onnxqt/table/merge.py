"""Two tables of one model as one: which of them the scale of each tensor is taken from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.table.form import Entry, Stats, Table
from onnxqt.table.stats import merge_stats
from onnxqt.table.views import by_scheme, key_of, merged_views, misfit, with_biases

Prefer = Literal["other", "base", "wider"]
_Key = tuple[str, str, str]


def merge_tables(base: Table, other: Table, prefer: Prefer = "other") -> Table:
    """The entries of `base`, with views of `other` for the tensors and schemes that it has views for.

    Tensors that share a grid get one: of those that the preferred table gave a view, the one with the widest range.
    A constant keeps its views where `other` was made for other values of it. Biases follow from their operands.
    What `base` keeps float under a scheme stays so. Entries that it lacks are dropped; a scheme that only `other`
    knows is added.

    Args:
        base: a table of the model at hand, as `build_table` makes it.
        other: a table with the same names, perhaps of a few tensors alone.
        prefer: whose views count where both have one; "wider" takes the wider range of each activation, and puts
            the statistics of both together, as of two calibrations.

    Raises:
        ExportError: if a view of `other` does not fit the shape that `base` knows.
    """
    schemes = tuple(dict.fromkeys((*base.schemes, *other.schemes)))
    theirs = {key_of(entry): entry for entry in other.entries}
    merged: list[Entry] = []
    given: set[tuple[_Key, str]] = set()  # entries and schemes whose view was taken from `other`
    for entry in base.entries:
        found = theirs.get(key_of(entry))
        if found is None or entry.role == "bias":
            merged.append(entry)
            continue
        views, taken = _chosen(entry, found, base.schemes, prefer)
        given |= {(key_of(entry), scheme) for scheme in taken}
        merged.append(
            replace(
                entry,
                views=merged_views({scheme: views[scheme] for scheme in schemes if scheme in views}),
                reason=None if views else entry.reason,
                source=found.source if taken else entry.source,
                aliases={**entry.aliases, **found.aliases} if prefer == "other" else {**found.aliases, **entry.aliases},
                stats=_stats(entry.stats, found.stats, prefer),
            )
        )
    samples = base.samples + other.samples if prefer == "wider" else base.samples
    return replace(base, entries=with_biases(_shared(merged, given)), schemes=schemes, samples=samples)


def _chosen(
    entry: Entry, other: Entry, schemes: tuple[str, ...], prefer: Prefer
) -> tuple[dict[str, QParams], set[str]]:
    """The parameters of an entry by scheme, and the schemes whose are the other's."""
    views = by_scheme(entry)
    taken: set[str] = set()
    if entry.sha256 and other.sha256 and entry.sha256 != other.sha256:
        return views, taken
    for scheme, params in by_scheme(other).items():
        ours = views.get(scheme)
        if ours is None and scheme in schemes:  # stays float
            continue
        if problem := misfit(params, entry):
            raise ExportError(f"the view of '{entry.name}' under {scheme} does not fit: {problem}: correct the table")
        wider = prefer == "wider" and entry.role != "weight" and ours is not None and width(params) > width(ours)
        if ours is None or wider or prefer == "other":
            views[scheme] = params
            taken.add(scheme)
    return views, taken


def width(params: QParams) -> float:
    """The largest magnitude that a grid reaches."""
    low, high = params.range
    return float(max(np.max(-low), np.max(high)))


def _stats(ours: Stats | None, theirs: Stats | None, prefer: Prefer) -> Stats | None:
    if ours is None or theirs is None:
        return ours or theirs
    if prefer == "wider":
        return merge_stats(ours, theirs)
    return theirs if prefer == "other" else ours


def _shared(entries: Iterable[Entry], given: set[tuple[_Key, str]]) -> list[Entry]:
    """The entries, with one grid for those that share it."""
    entries = list(entries)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.group is not None:
            groups.setdefault(entry.group, []).append(entry)
    agreed = {group: _agreed(members, given) for group, members in groups.items()}
    return [entry if entry.group is None else _with_views(entry, agreed[entry.group]) for entry in entries]


def _agreed(members: list[Entry], given: set[tuple[_Key, str]]) -> Mapping[str, QParams]:
    """What the members of a group share, by scheme."""
    found: dict[str, QParams] = {}
    for scheme in dict.fromkeys(scheme for member in members for scheme in by_scheme(member)):
        new = [member for member in members if (key_of(member), scheme) in given]
        offered = [params for member in new or members if (params := member.params(scheme)) is not None]
        found[scheme] = max(offered, key=width)
    return found


def _with_views(entry: Entry, shared: Mapping[str, QParams]) -> Entry:
    views = {scheme: shared[scheme] for scheme in by_scheme(entry)}
    return replace(entry, views=merged_views(views))
