"""New samples from those at hand, so that training fits what the network does and not the few samples it was given.

Training without labels compares with the original model, which answers for any sample; so a sample may be changed
freely, and the original is asked again (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and
consistent", section 3).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from onnxqt.data import InputSpec, has_batch_axis
from onnxqt.errors import UsageError
from onnxqt.numerics import Array

Augmentation = Literal["mixup", "flip", "shift"]
AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)
SHRINKING: tuple[Augmentation, ...] = ("mixup",)  # whose samples have smaller values than real ones
SHIFT = 8  # an image moves by up to one eighth of its side

_COLOURS = (1, 3, 4)  # sizes of a channel axis of images

Feeds = Mapping[str, Array]


def image_axes(spec: InputSpec) -> tuple[int, int] | None:
    """The axes of height and width of an input that holds images; None for any other input.

    Images are float32 of rank 4 with 1, 3 or 4 channels on axis 1 (NCHW) or, if not there, on axis 3 (NHWC).
    """
    if spec.dtype.kind != "f" or len(spec.shape) != 4:
        return None
    if spec.shape[1] in _COLOURS:
        return 2, 3
    return (1, 2) if spec.shape[3] in _COLOURS else None


def choose_augmentations(
    wanted: Sequence[Augmentation] | None, specs: Sequence[InputSpec], labelled: bool
) -> tuple[Augmentation, ...]:
    """What to do with the samples of a model with these inputs.

    Args:
        wanted: what is asked for; None for mixup where it is possible, else nothing.
        specs: of the inputs.
        labelled: whether the loss compares with labels.

    Raises:
        UsageError: naming the input that cannot be augmented so.
    """
    problem = _no_mixup(specs, labelled)
    if wanted is None:
        return () if problem else ("mixup",)
    for kind in wanted:
        if kind == "mixup" and problem:
            raise UsageError(f"--augment mixup blends samples, but {problem}: leave mixup out")
        if kind != "mixup" and not any(image_axes(spec) for spec in specs):
            raise UsageError(
                f"--augment {kind} moves images, but the model takes none (float, 4 axes, 1, 3 or 4 channels): "
                f"leave {kind} out"
            )
    return tuple(wanted)


def _no_mixup(specs: Sequence[InputSpec], labelled: bool) -> str | None:
    """Why samples cannot be blended; None if they can."""
    if labelled:
        return "the loss compares with labels (--loss distill does not)"
    if not has_batch_axis(specs):
        return "the model takes one sample at a time"
    other = next((spec for spec in specs if spec.dtype.kind != "f"), None)
    return None if other is None else f"the input '{other.name}' takes {other.dtype}"


def augmented(
    inputs: Feeds, kinds: Sequence[Augmentation], specs: Sequence[InputSpec], random: np.random.Generator
) -> dict[str, Array]:
    """A batch of new samples.

    flip:   an image x is mirrored from left to right with probability 1/2
    shift:  x is moved by whole pixels, up to 1/8 of its sides; what comes in repeats the edge
    mixup:  a x + (1 - a) x', with x' another sample of the batch and a uniform in [0, 1]
            (Zhang et al. 2018, eq. 1, whose Beta(alpha, alpha) is uniform at alpha = 1)

    Args:
        inputs: by name, the batch axis first.
        kinds: what to do, in any order.
        specs: of the inputs.
        random: draws everything.
    """
    made = dict(inputs)
    for kind in AUGMENTATIONS[::-1]:  # images move before they are mixed
        if kind in kinds:
            made = _APPLY[kind](made, specs, random)
    return made


def _mixup(inputs: Feeds, specs: Sequence[InputSpec], random: np.random.Generator) -> dict[str, Array]:
    rows = len(inputs[specs[0].name])
    other, share = random.permutation(rows), random.random(rows, np.float32)
    mixed = {}
    for name, x in inputs.items():
        a = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        mixed[name] = a * x + (1 - a) * x[other]
    return mixed


def _flip(inputs: Feeds, specs: Sequence[InputSpec], random: np.random.Generator) -> dict[str, Array]:
    flipped = dict(inputs)
    for spec in specs:
        if axes := image_axes(spec):
            x = inputs[spec.name]
            mirrored = random.random(len(x)) < 0.5
            flipped[spec.name] = np.where(mirrored[:, None, None, None], np.flip(x, axes[1]), x)
    return flipped


def _shift(inputs: Feeds, specs: Sequence[InputSpec], random: np.random.Generator) -> dict[str, Array]:
    shifted = dict(inputs)
    for spec in specs:
        if axes := image_axes(spec):
            x = shifted[spec.name] = inputs[spec.name].copy()
            for axis in axes:
                size = x.shape[axis]
                moves = random.integers(-(size // SHIFT), size // SHIFT + 1, len(x))
                for row, move in enumerate(moves):
                    places = np.clip(np.arange(size) + move, 0, size - 1)
                    x[row] = np.take(x[row], places, axis - 1)
    return shifted


_APPLY: Mapping[Augmentation, Callable[[Feeds, Sequence[InputSpec], np.random.Generator], dict[str, Array]]] = {
    "mixup": _mixup,
    "flip": _flip,
    "shift": _shift,
}
