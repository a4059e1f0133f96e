"""Names of quantization schemes, and the grids behind them."""

import itertools

import pytest

from onnxqt.errors import UsageError
from onnxqt.schemes import DEFAULT_SCHEMES, FLOAT_BITS, Granularity, Placement, Scheme, parse_granularity, parse_scheme

NAMES = [
    f"w{weight}a{activation}-{symmetry}-{granularity}{pow2}{narrow}{dyn}"
    for weight, activation, symmetry, granularity, pow2, narrow, dyn in itertools.product(
        range(2, 9),
        ("4", "8", "16", "f"),
        ("sym", "asym"),
        ("pt", "pc", "b16", "b32", "b64", "b128"),
        ("", "-pow2"),
        ("", "-narrow"),
        ("", "-dyn"),
    )
]


def has_meaning(name: str) -> bool:
    """Whether the parts of a name go together, by the reasons that messages give."""
    if "-narrow" in name and ("-sym-" not in name or "a16" in name or "af" in name):
        return False
    return "-dyn" not in name or ("a8-asym" in name and "-pow2" not in name)


VALID = [name for name in NAMES if has_meaning(name)]


def test_the_grammar_has_so_many_names() -> None:
    """7 weight widths, 6 granularities and pow2 or not: of a4 and a8 three forms, of a16 and af two; dyn 42 more."""
    assert len(VALID) == 7 * 6 * (2 * (3 + 3 + 2 + 2) + 1)
    assert len(set(map(parse_scheme, VALID))) == len(VALID)


@pytest.mark.parametrize("name", VALID[::7])  # each value of each part, in most combinations
def test_a_name_says_every_field(name: str) -> None:
    scheme = parse_scheme(name)
    bits = name[3 : name.index("-")]
    assert scheme.weight_bits == int(name[1])
    assert scheme.activation_bits == (FLOAT_BITS if bits == "f" else int(bits))
    assert scheme.weight_only == (bits == "f")
    assert scheme.symmetric == ("-sym-" in name)
    granularity = name.split("-")[2]
    assert scheme.per_channel == (granularity != "pt")
    assert scheme.block_size == (int(granularity[1:]) if granularity.startswith("b") else None)
    assert (scheme.power_of_two, scheme.narrow, scheme.dynamic) == tuple(
        flag in name for flag in ("-pow2", "-narrow", "-dyn")
    )
    assert str(scheme) == name


def test_every_name_reads_back() -> None:
    assert [str(parse_scheme(name)) for name in VALID] == VALID


def test_what_has_no_meaning_is_refused_in_one_line() -> None:
    for name in set(NAMES) - set(VALID):
        with pytest.raises(UsageError, match=rf"^scheme '{name}' cannot be: [^\n]+$"):
            parse_scheme(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("w4af-sym-pc-dyn", "float activations have no scale, leave out -dyn"),
        ("w4af-sym-pc-narrow", "float activations have no codes, leave out -narrow"),
        ("w8a8-sym-pc-dyn", "DynamicQuantizeLinear, which gives UINT8 codes, write a8-asym"),
        ("w8a4-asym-pc-dyn", "DynamicQuantizeLinear, which gives UINT8 codes, write a8-asym"),
        ("w8a8-asym-pc-pow2-dyn", "are no powers of two, leave out -pow2 or -dyn"),
        ("w8a8-asym-pc-narrow", "most negative code of signed activations, write sym"),
        ("w8a16-sym-pc-narrow", "has no Clip that would make 16-bit codes narrow, leave out -narrow"),
    ],
)
def test_a_refusal_says_why(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^scheme '{name}' cannot be: .*{reason}$"):
        parse_scheme(name)


def test_blocks_are_parts_of_channels() -> None:
    with pytest.raises(UsageError, match="blocks are parts of channels, set per_channel"):
        Scheme(4, 8, symmetric=True, per_channel=False, block_size=32)


@pytest.mark.parametrize("name", ["pt", "pc", "b16", "b32", "b64", "b128"])
def test_granularities_read_back(name: str) -> None:
    granularity = parse_granularity(name)
    assert str(granularity) == name
    assert granularity == Granularity(name != "pt", int(name[1:]) if name[0] == "b" else None)


def test_another_granularity_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^unknown granularity 'b8': expected one of pt, pc, b16, b32, b64, b128$"):
        parse_granularity("b8")


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
        "w8a12-sym-pt",
        "w8a32-sym-pt",
        "w8a8-sym-b8",
        "w8a8-sym-b256",
        "w8a8-sym-pc-narrow-pow2",
        "w8a8-asym-pc-dyn-dyn",
        "w8a8-sym-pc-",
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
        ("w4a16-sym-b32", (-7, 7), (-32768, 32767), (-32768, 32767)),
        ("w4a16-asym-pc", (-7, 7), (0, 65535), (0, 65535)),
        ("w8a8-sym-pc-narrow", (-127, 127), (-127, 127), (-127, 127)),
        ("w8a4-sym-pt-narrow", (-127, 127), (-7, 7), (-127, 127)),
        ("w8a8-asym-pc-dyn", (-127, 127), (0, 255), (0, 255)),
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


@pytest.mark.parametrize(
    ("name", "codes", "symmetric"), [("w4af-sym-b32", (-7, 7), True), ("w4af-asym-b32", (0, 15), False)]
)
def test_float_activations_leave_the_symmetry_to_the_weights(
    name: str, codes: tuple[int, int], symmetric: bool
) -> None:
    grids = parse_scheme(name).grids
    assert (grids.weight.qmin, grids.weight.qmax) == codes
    assert grids.weight_placement == Placement(symmetric)
    assert grids.weight_only


@pytest.mark.parametrize("name", VALID[::7])
def test_grids_say_what_the_scheme_says(name: str) -> None:
    scheme = parse_scheme(name)
    grids = scheme.grids
    assert (grids.weight, grids.activation, grids.io) == (scheme.weight_grid, scheme.activation_grid, scheme.io_grid)
    assert grids.activation_placement == Placement(scheme.symmetric, scheme.power_of_two)
    assert grids.weight_placement == Placement(scheme.symmetric or not scheme.weight_only, scheme.power_of_two)
    assert (grids.per_channel, grids.block_size, grids.search_clip) == (scheme.per_channel, scheme.block_size, True)
    assert (grids.name, grids.dynamic, grids.weight_only) == (name, scheme.dynamic, scheme.weight_only)
    assert not grids.fixed_outputs
