"""How to fine-tune: every choice of a run, with its default."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace

from onnxqt.errors import UsageError
from onnxqt.trim.augment import Augmentation
from onnxqt.trim.job import OPTIMIZERS, Optimizer
from onnxqt.trim.losses import Losses
from onnxqt.trim.prune import PRUNE_MODES, PruneMode
from onnxqt.trim.schedule import Schedule

DEFAULT_RATES = {"adamw": 1.5e-3, "sgd": 1e-2}
GENTLE_RATES = {"adamw": 2e-4, "sgd": 1.5e-3}  # from weights that round well already
AT_ONCE = Schedule(warmup=0, bend=0, full=0)
HELD_FRACTION = 0.1
HELD_LIMIT = 512
REFRESH_EVERY = 40
EVALUATIONS = 10
OBSERVE_MEMORY = 0.99
PRUNE_MEMORY = 0.8


@dataclass(frozen=True)
class TrimSettings:
    """How to fine-tune.

    Attributes:
        steps: optimizer updates; 0 for none.
        batch_size: samples of a batch.
        accumulate: batches whose gradients make one update.
        optimizer: "adamw" or "sgd".
        learning_rate: its peak. A weight is trained in units of the root mean square of its output channel, so that
            AdamW moves it by at most about this fraction of its size in a step. None for the optimizer's default,
            see `settled`.
        schedule: of lambda and of the learning rate; None for the default, see `settled`.
        seed: of the order of samples and of the schemes drawn.
        losses: what is minimised; None for cross-entropy if the samples have labels, else distillation.
        prune: reverse pruning per "tensor", per "channel", or "none".
        average: the checkpoint is an exponential moving average of the weights that remembers this share of the run;
            0 for the last weights themselves.
        balance: how far the losses of easy and hard schemes are brought together, between 0 (each counts as it is) and
            1 (each counts relative to what the untrained model loses).
        augment: how new samples are made of those at hand, see `augment.augmented`; None for "mixup" where there are
            no labels and every input is float.
        freeze: patterns of weights and biases that stay as they are, with * and ?.
        patience: evaluations without a better one after which training ends; 0 for never.
        save_every: updates after which the state is saved, so that a run can go on from there; 0 for never.
        save_minutes: minutes after which it is saved; 0 for never.
        resume: go on from the state that an earlier run with the same settings saved.
        tensorboard: write TensorBoard's event files as well.

    Raises:
        UsageError: for a number out of its range.
    """

    steps: int = 2000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    learning_rate: float | None = None
    schedule: Schedule | None = None
    seed: int = 0
    losses: Losses | None = None
    prune: PruneMode = "tensor"
    average: float = 0.2
    balance: float = 0.3
    augment: tuple[Augmentation, ...] | None = None
    freeze: tuple[str, ...] = ()
    patience: int = 0
    save_every: int = 0
    save_minutes: float = 5.0
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        least = {
            "--steps": (self.steps, 0),
            "--batch-size": (self.batch_size, 1),
            "--accumulate": (self.accumulate, 1),
            "--seed": (self.seed, 0),
            "--patience": (self.patience, 0),
            "--save-every": (self.save_every, 0),
            "--save-minutes": (self.save_minutes, 0),
        }
        for name, (value, bound) in least.items():
            if not value >= bound:
                raise UsageError(f"{name} is {value}: give a number of at least {bound}")
        for name, known in (("optimizer", OPTIMIZERS), ("prune", PRUNE_MODES)):
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} is '{getattr(self, name)}': give one of {', '.join(known)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UsageError(f"--lr is {self.learning_rate:g}: give a number between 0 and 1, such as 1e-3")
        for name in ("average", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name} is {getattr(self, name):g}: give a number between 0 and 1")

    def loss(self, labelled: bool) -> Losses:
        """What is minimised, for samples with class numbers or without."""
        if self.losses is not None:
            return self.losses
        return Losses({"cross-entropy": 1.0}) if labelled else Losses()

    def settled(self, rounds_well: bool) -> "TrimSettings":
        """The same with a learning rate and a schedule.

        Weights that round well already (see `onnxqt.ptq.round_robustly`) would lose that where lambda begins at 0 or
        the learning rate is high: they are trained gently, and on the grid from the first step.
        """
        rates = GENTLE_RATES if rounds_well else DEFAULT_RATES
        rate = rates[self.optimizer] if self.learning_rate is None else self.learning_rate
        schedule = self.schedule or (AT_ONCE if rounds_well else Schedule())
        return replace(self, learning_rate=rate, schedule=schedule)

    def unfrozen(self, names: Iterable[str]) -> list[str]:
        """The names that no pattern of `freeze` matches.

        Raises:
            UsageError: for a pattern that matches nothing.
        """
        names = list(names)
        for pattern in self.freeze:
            if not fnmatch.filter(names, pattern):
                raise UsageError(f"--freeze {pattern} matches none of the weights and biases, such as {names[:3]}")
        return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.freeze)]
