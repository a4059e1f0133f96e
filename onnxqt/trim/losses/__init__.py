"""What training minimises: a weighted sum of terms, added to the training graph as its only output.

`terms` says what can be asked for, `find` decides what a model and its samples allow, `build` adds the nodes, `feeds`
gives the values of their inputs. A term compares with the original model (no labels needed), with labels, or is a
loss graph of the user's (`graph_file`).
"""

from onnxqt.trim.losses.build import insert_loss, with_loss
from onnxqt.trim.losses.feeds import check_label_values, least_loss, loss_feeds, measure_power, softmax, teacher_outputs
from onnxqt.trim.losses.find import choose_features, find_kind, find_terms
from onnxqt.trim.losses.graph_file import load_loss_graph
from onnxqt.trim.losses.terms import LOSS, Binding, Losses, Term, parse_losses, read_losses, read_term

__all__ = [
    "LOSS",
    "Binding",
    "Losses",
    "Term",
    "check_label_values",
    "choose_features",
    "find_kind",
    "find_terms",
    "insert_loss",
    "least_loss",
    "load_loss_graph",
    "loss_feeds",
    "measure_power",
    "parse_losses",
    "read_losses",
    "read_term",
    "softmax",
    "teacher_outputs",
    "with_loss",
]
