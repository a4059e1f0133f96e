"""What a matrix is asked for: models, samples, back ends and precisions."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onnxqt.data import Batch, Samples
from onnxqt.errors import ModelError, UsageError
from onnxqt.model import Model, input_specs
from onnxqt.profiles import Precision, Profile, parse_precision
from onnxqt.schemes import Scheme

Json = dict[str, Any]
Column = Precision | Scheme


@dataclass(frozen=True, eq=False)
class Subject:
    """A float model and how it is called."""

    name: str
    model: Model


@dataclass(frozen=True, eq=False)
class Task:
    """What a matrix is made of.

    Attributes:
        subjects: the models, the original first.
        calibration: samples whose ranges are recorded.
        evaluation: samples that the results are judged on.
        batches: makes batches of samples, as the models take them.
        calibration_batch: samples that are calibrated at once.
        profiles: the back ends.
        precisions: asked of every profile that has them; empty: see `columns_of`.
        schemes: ways to quantize without a compiler, run in the arithmetic of every profile.
    """

    subjects: tuple[Subject, ...]
    calibration: Samples
    evaluation: Samples
    batches: Callable[[Samples], Iterator[Batch]]
    calibration_batch: int
    profiles: tuple[Profile, ...]
    precisions: tuple[Precision, ...] = ()
    schemes: tuple[Scheme, ...] = ()

    @property
    def columns(self) -> tuple[tuple[Profile, Column], ...]:
        """Each profile with each of its columns."""
        return tuple((profile, column) for profile in self.profiles for column in self.columns_of(profile))

    @functools.cached_property
    def data(self) -> Json:
        """What the samples are."""
        both = {"calibration": self.calibration, "evaluation": self.evaluation}
        return {name: {"samples": samples.count, "sha256": samples.sha256()} for name, samples in both.items()}

    def columns_of(self, profile: Profile) -> tuple[Column, ...]:
        """What is asked of a profile; without a choice its default precision, the dynamic ones, and w4a8."""
        offered = tuple(map(parse_precision, profile.policy.precisions))
        if self.precisions:
            return (*(precision for precision in self.precisions if precision in offered), *self.schemes)
        if self.schemes:
            return self.schemes
        return tuple(p for p in offered if p == offered[0] or p.dynamic or p == Precision(4, 8))

    def check(self) -> None:
        """Make sure that there is something to do, and that the models can be compared.

        Raises:
            UsageError, ModelError: if not.
        """
        if not self.columns:
            names = ", ".join(map(str, self.precisions))
            raise UsageError(f"no profile has the precision {names}: see 'onnxqt profiles' for those that they have")
        original = self.subjects[0]
        wanted = [name for name in original.model.graph.outputs if original.model.graph.is_float(name)]
        if not wanted:
            raise ModelError(f"'{original.name}' has no float output, so nothing can be compared: give it one")
        for other in self.subjects[1:]:
            if input_specs(other.model) != input_specs(original.model):
                raise ModelError(
                    f"'{other.name}' has other inputs ({_shown(other.model.graph.inputs)}) than '{original.name}' "
                    f"({_shown(original.model.graph.inputs)}), or of other shapes: give models of the same network"
                )
            missing = set(wanted) - set(other.model.graph.outputs)
            if missing:
                raise ModelError(
                    f"'{other.name}' has no output {_shown(sorted(missing))}, which '{original.name}' has: "
                    "give models of the same network"
                )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
