"""New samples from those at hand: what they are made of, and where they are refused."""

import numpy as np
import pytest

from onnxqt.data import InputSpec
from onnxqt.errors import UsageError
from onnxqt.numerics import Array
from onnxqt.trim.augment import Augmentation, augmented, choose_augmentations, image_axes

NCHW = InputSpec("image", np.dtype("f4"), (None, 3, 16, 24))
NHWC = InputSpec("image", np.dtype("f4"), (None, 16, 24, 3))
TABLE = InputSpec("table", np.dtype("f4"), (None, 5))
TOKENS = InputSpec("ids", np.dtype("i8"), (None, 7))
ONE = InputSpec("x", np.dtype("f4"), (3, 16, 24))


def batch(spec: InputSpec, rows: int = 40) -> Array:
    shape = (rows, *(size or 1 for size in spec.shape[1:]))
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def made(kind: Augmentation, spec: InputSpec, x: Array, seed: int = 0) -> Array:
    return augmented({spec.name: x}, [kind], [spec], np.random.default_rng(seed))[spec.name]


def test_images_are_found_by_their_channels() -> None:
    assert image_axes(NCHW) == (2, 3)
    assert image_axes(NHWC) == (1, 2)
    for spec in (
        TABLE,
        TOKENS,
        InputSpec("x", np.dtype("f4"), (None, 16, 24, 24)),
        InputSpec("x", np.dtype("u1"), NCHW.shape),
    ):
        assert image_axes(spec) is None


@pytest.mark.parametrize("spec", [NCHW, NHWC])
def test_mixup_lies_between_two_samples(spec: InputSpec) -> None:
    x = batch(spec, rows=8)
    mixed = made("mixup", spec, x)
    assert mixed.dtype == np.float32
    assert mixed.shape == x.shape
    rows = x.reshape(8, -1).astype(np.float64)
    shares = []
    for row in mixed.reshape(8, -1):
        weights, *_ = np.linalg.lstsq(rows.T, row.astype(np.float64), rcond=None)
        used = weights[np.abs(weights) > 1e-5]  # float32 products, rows that are linearly independent
        assert len(used) <= 2
        assert used.sum() == pytest.approx(1, abs=1e-5)
        assert (used > 0).all()
        shares += used.tolist()
    assert np.std(shares) > 0.1


def test_mixup_blends_all_inputs_of_a_sample_alike() -> None:
    x, y = batch(TABLE), 3 * batch(TABLE)
    other = InputSpec("other", np.dtype("f4"), (None, 5))
    mixed = augmented({"table": x, "other": y}, ["mixup"], [TABLE, other], np.random.default_rng(0))
    np.testing.assert_allclose(mixed["other"], 3 * mixed["table"], rtol=1e-5, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize(("spec", "axis"), [(NCHW, 3), (NHWC, 2)])
def test_flip_mirrors_about_half_of_the_images_from_left_to_right(spec: InputSpec, axis: int) -> None:
    x = batch(spec)
    flipped = made("flip", spec, x)
    mirrored = np.flip(x, axis)
    same = np.array([np.array_equal(a, b) for a, b in zip(flipped, x, strict=True)])
    turned = np.array([np.array_equal(a, b) for a, b in zip(flipped, mirrored, strict=True)])
    assert (same ^ turned).all()
    assert 5 <= turned.sum() <= 35  # of 40 fair draws: outside once in 10^6


@pytest.mark.parametrize("spec", [NCHW, NHWC])
def test_shift_moves_by_up_to_an_eighth_and_repeats_the_edge(spec: InputSpec) -> None:
    x = batch(spec)
    shifted = made("shift", spec, x)
    (down, across), moves = image_axes(spec) or (0, 0), set()
    for before, after in zip(x, shifted, strict=True):
        fits = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-3, 4)
            if np.array_equal(
                after,
                np.take(
                    np.take(before, np.clip(np.arange(16) + dy, 0, 15), down - 1),
                    np.clip(np.arange(24) + dx, 0, 23),
                    across - 1,
                ),
            )
        ]
        assert len(fits) == 1
        moves.add(fits[0])
    assert {dy for dy, _ in moves} == set(range(-2, 3))
    assert {dx for _, dx in moves} == set(range(-3, 4))


def test_images_move_before_they_are_mixed_and_the_order_of_names_is_nothing() -> None:
    x = batch(NCHW)
    orders: tuple[tuple[Augmentation, ...], ...] = (("mixup", "flip"), ("flip", "mixup"))
    first, second = (augmented({"image": x}, kinds, [NCHW], np.random.default_rng(3))["image"] for kinds in orders)
    np.testing.assert_array_equal(first, second)


def test_samples_are_left_as_they_are() -> None:
    x = batch(NCHW)
    kept = x.copy()
    for kind in ("mixup", "flip", "shift"):
        assert not np.array_equal(made(kind, NCHW, x), x)
    np.testing.assert_array_equal(x, kept)


def test_what_is_chosen_where_nothing_is_asked_for() -> None:
    assert choose_augmentations(None, [NCHW], labelled=False) == ("mixup",)
    assert choose_augmentations(None, [NCHW], labelled=True) == ()
    assert choose_augmentations(None, [TABLE, TOKENS], labelled=False) == ()
    assert choose_augmentations((), [NCHW], labelled=False) == ()
    assert choose_augmentations(("flip",), [NCHW], labelled=True) == ("flip",)


@pytest.mark.parametrize(
    ("kinds", "specs", "labelled", "message"),
    [
        (("mixup",), [TOKENS], False, "the input 'ids' takes int64: leave mixup out"),
        (("mixup",), [TABLE], True, "the loss compares with labels"),
        (("flip",), [TABLE], False, "--augment flip moves images, but the model takes none"),
        (("shift",), [TOKENS], False, "--augment shift moves images"),
    ],
)
def test_what_cannot_be_augmented_is_refused(
    kinds: tuple[Augmentation, ...], specs: list[InputSpec], labelled: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_augmentations(kinds, specs, labelled)
