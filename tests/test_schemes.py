"""Names of quantization schemes, and the grids behind them."""

import itertools

import pytest

from onnxqt.errors import UsageError
from onnxqt.schemes import DEFAULT_SCHEMES, Placement, Scheme, parse_scheme

NAMES = [
    f"w{weight}a{activation}-{symmetry}-{granularity}"
    for weight, activation, symmetry, granularity in itertools.product(
        range(2, 9), (4, 8), ("sym", "asym"), ("pt", "pc")
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_every_field(name: str) -> None:
    scheme = parse_scheme(name)
    assert (scheme.weight_bits, scheme.activation_bits) == (int(name[1]), int(name[3]))
    assert scheme.symmetric == ("-sym-" in name)
    assert scheme.per_channel == name.endswith("-pc")
    assert str(scheme) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w1a8-sym-pc",
        "w9a8-sym-pc",
        "w4a6-sym-pc",
        "w4a8",
        "w4a8-sym",
        "W4A8-sym-pc",
        "w4a8-sym-pc ",
        "w8a16-sym-pt",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^unknown scheme '.*': expected .*, such as w4a8-sym-pc$") as refused:
        parse_scheme(name)
    assert f"'{name}'" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "weight", "activation", "io"),
    [
        ("w8a8-sym-pc", (-127, 127), (-128, 127), (-128, 127)),
        ("w8a8-asym-pt", (-127, 127), (0, 255), (0, 255)),
        ("w4a8-asym-pc", (-7, 7), (0, 255), (0, 255)),
        ("w4a4-sym-pc", (-7, 7), (-8, 7), (-128, 127)),
        ("w2a4-asym-pc", (-1, 1), (0, 15), (0, 255)),
    ],
)
def test_weights_are_narrow_and_inputs_and_outputs_keep_8_bits(
    name: str, weight: tuple[int, int], activation: tuple[int, int], io: tuple[int, int]
) -> None:
    scheme = parse_scheme(name)
    grids = (scheme.weight_grid, scheme.activation_grid, scheme.io_grid)
    assert [(grid.qmin, grid.qmax) for grid in grids] == [weight, activation, io]


def test_default_schemes_are_int8_and_int4_weights_in_every_form() -> None:
    expected = {Scheme(bits, 8, *form) for bits in (8, 4) for form in itertools.product((True, False), repeat=2)}
    assert set(DEFAULT_SCHEMES) == expected
    assert len(DEFAULT_SCHEMES) == len(expected)


@pytest.mark.parametrize("name", NAMES)
def test_grids_say_what_the_scheme_says(name: str) -> None:
    scheme = parse_scheme(name)
    grids = scheme.grids
    assert (grids.weight, grids.activation, grids.io) == (scheme.weight_grid, scheme.activation_grid, scheme.io_grid)
    assert (grids.weight_placement, grids.activation_placement) == (Placement(True), Placement(scheme.symmetric))
    assert (grids.per_channel, grids.search_clip) == (scheme.per_channel, True)
    assert not grids.fixed_outputs
