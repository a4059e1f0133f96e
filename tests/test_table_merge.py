"""Two tables as one: whose scale each tensor has afterwards."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import normal
from table_cases import SCHEMES, entry, net, table

from onnxqt.calibrate import bias_scale, observe, range_params
from onnxqt.errors import ExportError
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.table import Entry, Table, View, merge_stats, merge_tables, table_quantizers
from onnxqt.table.stats import stats_of
from onnxqt.table.views import same_params

SIGNED, UNSIGNED = Grid(8, signed=True), Grid(8, signed=False)
SYM, ASYM = "w8a8-sym-pc", "w8a8-asym-pc"


def given(*names: str, high: float = 3.0, scheme: str = SYM, **changes: object) -> Table:
    """A table of a few activations alone, all with the range [-high, high]."""
    views = (View((scheme,), range_params(-high, high, SIGNED)),)
    entries = (Entry(name, "activation", views=views, source="imported") for name in names)
    return Table(tuple(replace(found, **changes) for found in entries), (scheme,))  # type: ignore[arg-type]


def params(of: Table, name: str, scheme: str = SYM) -> QParams:
    found = entry(name, of).params(scheme)
    assert found is not None
    return found


def test_the_other_table_counts_where_it_has_a_view() -> None:
    merged = merge_tables(table(), given("y", "x"))
    assert [found.name for found in merged.entries] == [found.name for found in table().entries]
    for name in "xy":
        assert params(merged, name).scale == np.float32(3 / 127)
        assert entry(name, merged).source == "imported"
        assert same_params(params(merged, name, ASYM), params(table(), name, ASYM))
    assert entry("z", merged) is entry("z")
    assert (merged.schemes, merged.model_sha256, merged.samples) == (SCHEMES, table().model_sha256, 64)


def test_schemes_that_shared_a_view_part_where_one_of_them_changes() -> None:
    merged = merge_tables(table(), given("y"))
    assert [view.schemes for view in entry("y").views] == [(SYM, "w4a8-sym-pc"), (ASYM, "w8a8-asym-pt", "w4a4-asym-pc")]
    assert [view.schemes for view in entry("y", merged).views] == [
        (SYM,),
        (ASYM, "w8a8-asym-pt", "w4a4-asym-pc"),
        ("w4a8-sym-pc",),
    ]


def test_prefer_base_takes_only_what_it_lacks() -> None:
    merged = merge_tables(table(), given("y", "x"), prefer="base")
    assert same_params(params(merged, "y"), params(table(), "y"))
    assert entry("y", merged).source == "observed"
    wide = merge_tables(table(), given("y", scheme="new"), prefer="base")
    assert wide.schemes == (*SCHEMES, "new")
    assert params(wide, "y", "new").scale == np.float32(3 / 127)
    assert entry("x", wide).params("new") is None


@pytest.mark.parametrize(("high", "wins"), [(0.5, False), (500.0, True)])
def test_prefer_wider_takes_the_wider_range(high: float, wins: bool) -> None:
    other = given("y", high=high)
    merged = merge_tables(table(), other, prefer="wider")
    assert same_params(params(merged, "y"), params(other if wins else table(), "y"))
    assert entry("y", merged).source == ("imported" if wins else "observed")


def test_statistics_come_from_the_preferred_table_or_from_both() -> None:
    seen = stats_of(observe(normal(50) * 3))
    ours = entry("y").stats
    assert ours is not None
    other = replace(given("y", stats=seen), samples=7)
    assert entry("y", merge_tables(table(), other)).stats is seen
    assert entry("y", merge_tables(table(), other, prefer="base")).stats is ours
    assert entry("y", merge_tables(table(), given("y"))).stats is ours  # it has none
    merged = merge_tables(table(), other, prefer="wider")
    both = entry("y", merged).stats
    assert both is not None
    assert both.quantiles == merge_stats(ours, seen).quantiles
    assert (both.count, merged.samples) == (ours.count + 50, 71)


def test_aliases_of_both_are_kept() -> None:
    base = merge_tables(table(), given("y", aliases={"mnn": "1", "rknn": "1"}))
    other = given("y", aliases={"mnn": "2", "trt": "2"})
    assert entry("y", merge_tables(base, other)).aliases == {"mnn": "2", "rknn": "1", "trt": "2"}
    assert entry("y", merge_tables(base, other, prefer="base")).aliases == {"mnn": "1", "rknn": "1", "trt": "2"}


def test_biases_follow() -> None:
    merged = merge_tables(table(), given("x"))
    expected = bias_scale(params(table(), "w"), np.asarray(np.float32(3 / 127)), 6)
    np.testing.assert_array_equal(params(merged, "b").scale, expected)
    assert same_params(params(merged, "d"), params(table(), "d"))


@pytest.mark.parametrize("names", ["r", "m", "rm"])
def test_tensors_that_share_a_grid_still_do(names: str) -> None:
    """What was given counts, though the range of the other member is wider."""
    merged = merge_tables(table(), given(*names))
    for name in "rm":
        assert params(merged, name).scale == np.float32(3 / 127)
    assert table_quantizers(merged, net().plan, SYM)


def test_of_two_ranges_for_one_grid_the_wider_counts() -> None:
    merged = merge_tables(table(), Table((*given("m", high=9.0).entries, *given("r").entries), (SYM,)))
    assert {float(params(merged, name).scale) for name in "rm"} == {float(np.float32(9 / 127))}


def test_what_stays_float_does_so() -> None:
    merged = merge_tables(table(), given("s", "e"))
    assert entry("s", merged).views == entry("e", merged).views == ()
    assert entry("s", merged).reason == "no integer form"


def test_entries_that_the_model_lacks_are_dropped() -> None:
    merged = merge_tables(table(), given("nowhere"))
    assert [found.name for found in merged.entries] == [found.name for found in table().entries]


def weight(scale: Array, sha256: str | None) -> Table:
    found = QParams(scale.astype(np.float32), np.zeros(scale.shape, np.int32), SIGNED, 1)
    return Table((Entry("u", "weight", views=(View((SYM,), found),), sha256=sha256),), (SYM,))


def test_a_weight_with_other_values_keeps_its_scales() -> None:
    scale = np.arange(1.0, 6.0)
    for sha256, taken in ((None, True), (entry("u").sha256, True), ("0" * 64, False)):
        merged = merge_tables(table(), weight(scale, sha256))
        assert np.array_equal(params(merged, "u").scale, scale) == taken
    assert same_params(params(merge_tables(table(), weight(scale, None), prefer="wider"), "u"), params(table(), "u"))


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ExportError, match=r"view of 'u' under w8a8-sym-pc does not fit: scale has the shape \[4\], but \[5"
    ):
        merge_tables(table(), weight(np.ones(4), None))


def test_merging_a_table_with_itself_changes_nothing() -> None:
    merged = merge_tables(table(), table())
    for ours, theirs in zip(table().entries, merged.entries, strict=True):
        assert [view.schemes for view in ours.views] == [view.schemes for view in theirs.views]
        assert all(same_params(a.params, b.params) for a, b in zip(ours.views, theirs.views, strict=True))
