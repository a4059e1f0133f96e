"""How accurate models are on every back end: {original, trimmed ...} x {profiles} x {precisions}.

In a cell, the compiler of the profile quantizes the float model (`onnxqt.compiler`), the emulator computes as its
device does, and the outputs over the evaluation samples are compared with those of the original float model:

    top-1          share of right samples (with labels); agreement with the original float model (without)
    gap            top-1 of the original float model - top-1 of the cell; with agreement: 1 - agreement
    mean gap       over all cells of a model
    spread         largest - smallest top-1 (or agreement) of its cells

A cell that is done is in the file at once; a run with the same inputs goes on from there. What makes inputs the same
is the key of a cell: a hash of the models, the samples, the profile, the code of this package and the versions of
others. The same inputs give the same file: nothing in it depends on time.
"""

from onnxqt.matrix.advice import advice_for
from onnxqt.matrix.cells import Cell, Matrix
from onnxqt.matrix.files import make_matrix
from onnxqt.matrix.run import DYNAMIC
from onnxqt.matrix.task import Subject, Task

__all__ = ["DYNAMIC", "Cell", "Matrix", "Subject", "Task", "advice_for", "make_matrix"]
