"""The options of training, and what their values mean."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from onnxqt.calibrate import RangeMethod
from onnxqt.cli.options import MODEL, Command, profile_named
from onnxqt.compiler import profile_regimes
from onnxqt.errors import UsageError
from onnxqt.profiles import PROFILES
from onnxqt.schemes import SCHEME_NAME, parse_scheme
from onnxqt.trim import Regime, TrimSettings, scheme_regime
from onnxqt.trim.augment import AUGMENTATIONS, Augmentation
from onnxqt.trim.job import OPTIMIZERS
from onnxqt.trim.losses import Losses, parse_losses
from onnxqt.trim.prune import PRUNE_MODES
from onnxqt.trim.schedule import Schedule

_DEFAULT = TrimSettings()
_SCHEDULE = Schedule()


def _number(flag: str, kind: type, default: object, text: str) -> Callable[[Command], Command]:
    return click.option(flag, type=kind, default=default, show_default=True, help=text)


def _share(flag: str, text: str, default: float) -> Callable[[Command], Command]:
    return click.option(
        flag,
        type=float,
        help=f"Schedule: {text}, as a share.  [default: {default:g}; lambda is 1 from the start after robust rounding]",
    )


ROBUST_TO = click.option(
    "--robust-to",
    multiple=True,
    metavar="NAME",
    help="Also become robust to this scheme, back end (see `onnxqt profiles`) or profile file; repeatable.",
)
TRAINING: tuple[Callable[[Any], Any], ...] = (
    _number("--steps", int, _DEFAULT.steps, "Updates; 0 for none."),
    _number("--batch-size", int, _DEFAULT.batch_size, "Samples of a batch."),
    _number("--accumulate", int, _DEFAULT.accumulate, "Batches of an update."),
    click.option("--optimizer", type=click.Choice(OPTIMIZERS), default=_DEFAULT.optimizer, show_default=True,
                 help="How weights follow their gradients."),
    click.option(
        "--lr",
        type=float,
        help="Peak learning rate, as a fraction of each weight's size.  [default: 1.5e-3 for adamw, 1e-2 for sgd; "
        "after robust rounding 2e-4 and 1.5e-3]",
    ),
    _number("--seed", int, _DEFAULT.seed, "Order of samples and schemes."),
    click.option(
        "--loss",
        metavar="NAME[=WEIGHT],...",
        help="distill, features, cross-entropy, bce, mse, l1, each with NAME:OUTPUT for one output.  "
        "[default: cross-entropy if --data has labels, else distill, from the model itself]",
    ),
    click.option("--loss-graph", type=MODEL, help="ONNX file of a loss; its inputs are matched by name."),
    _number("--temperature", float, 1.0, "Of the class scores in distillation."),
    click.option("--feature", "features", multiple=True, metavar="TENSOR", help="Inner tensor for 'features'."),
    click.option("--prune", type=click.Choice(PRUNE_MODES), default=_DEFAULT.prune, show_default=True,
                 help="How reverse pruning clips extreme weights."),
    _number("--balance", float, _DEFAULT.balance, "How far easy and hard schemes count alike, 0 to 1."),
    click.option(
        "--augment",
        metavar="NAME,...",
        help="New samples of those at hand: none, mixup, flip, shift.  [default: mixup where there are no labels]",
    ),
    click.option("--freeze", multiple=True, metavar="PATTERN", help="Weights and biases that stay as they are (*, ?)."),
    _number("--average", float, _DEFAULT.average, "Share of the run that the averaged weights remember."),
    _share("--warmup", "where lambda leaves 0", _SCHEDULE.warmup),
    _share("--bend", "where the ramp turns from quartic to quadratic", _SCHEDULE.bend),
    _share("--full", "where lambda reaches 1", _SCHEDULE.full),
    _share("--knee", "lambda at the bend", _SCHEDULE.knee),
    _number("--patience", int, _DEFAULT.patience, "Evaluations without a better one before an early end; 0: never."),
    _number("--save-every", int, _DEFAULT.save_every, "Updates between two saved states; 0: by time alone."),
    _number("--save-minutes", float, _DEFAULT.save_minutes, "Minutes between two saved states; 0: never."),
    click.option("--resume", is_flag=True, help="Go on from the state that an interrupted run in --out has saved."),
    click.option("--tensorboard", is_flag=True, help="Write TensorBoard events too (needs tensorboardX)."),
)  # fmt: skip


def training_of(rest: dict[str, Any]) -> TrimSettings:
    """The settings of training, from the values of its options."""
    return TrimSettings(
        steps=rest["steps"],
        batch_size=rest["batch_size"],
        accumulate=rest["accumulate"],
        optimizer=rest["optimizer"],
        learning_rate=rest["lr"],
        schedule=_schedule({name: rest[name] for name in ("warmup", "bend", "full", "knee")}),
        seed=rest["seed"],
        losses=_losses(rest["loss"], rest["loss_graph"], rest["temperature"], rest["features"]),
        prune=rest["prune"],
        average=rest["average"],
        balance=rest["balance"],
        augment=_augmentations(rest["augment"]),
        freeze=tuple(rest["freeze"]),
        patience=rest["patience"],
        save_every=rest["save_every"],
        save_minutes=rest["save_minutes"],
        resume=rest["resume"],
        tensorboard=rest["tensorboard"],
    )


def _schedule(given: dict[str, float | None]) -> Schedule | None:
    """The schedule that options ask for; None where nothing is asked for."""
    asked = {name: value for name, value in given.items() if value is not None}
    return Schedule(**asked) if asked else None


def _augmentations(text: str | None) -> tuple[Augmentation, ...] | None:
    """What --augment names."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*AUGMENTATIONS, "none"):
            raise UsageError(f"--augment {name} is unknown: give none, or some of {', '.join(AUGMENTATIONS)}")
    return tuple(kind for kind in AUGMENTATIONS if kind in names)


def _losses(text: str | None, graph: Path | None, temperature: float, features: Sequence[str]) -> Losses | None:
    """What --loss and its companions ask for; None where nothing is asked for."""
    if text is None and graph is None and temperature == 1 and not features:
        return None
    spelled = text if text is not None else "" if graph is not None else "distill"
    return parse_losses(spelled, None if graph is None else str(graph), temperature, tuple(features))


def regimes_named(names: Sequence[str], ranges: RangeMethod) -> tuple[Regime, ...]:
    """What --robust-to names: schemes, whose activations have these ranges, and every precision of back ends."""
    found: list[Regime] = []
    for name in names:
        if name in PROFILES or name.endswith(".toml") or Path(name).is_file():
            found += profile_regimes(profile_named(name))
        elif SCHEME_NAME.fullmatch(name):
            found.append(scheme_regime(parse_scheme(name), ranges))
        else:
            raise UsageError(
                f"--robust-to {name} is neither a scheme, such as w4a8-sym-pc, nor a back end (`onnxqt profiles` lists "
                "them), nor a profile file"
            )
    return tuple(found)
