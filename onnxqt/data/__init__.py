"""Samples: opening, checking and streaming what people have: numpy files, images, tables, ONNX's test data, programs.

Opened means checked, not loaded: `open_samples` reads the headers of every file and compares them with the model's
inputs; the values are read, converted and checked as they are streamed. Nothing is ever unpickled, nothing that a file
names is followed, and sizes are compared with limits before anything is allocated.

    form           what a model wants for its inputs, and what it is fed
    content        what every kind of source gives, fitted to a model
    numpy_files, tensor_files, text_files, images    the kinds of sources
    preprocessing  how an image becomes an input: presets and a TOML file
    samples        batches in order or shuffled, subsets
    source         which kind a path is; a path as plain data
    iterables      what a program makes, written to files first
"""

from onnxqt.data.content import ARRAY_LIMIT
from onnxqt.data.form import LABELS, Batch, Index, InputSpec, fixed_batch, has_batch_axis, has_classes
from onnxqt.data.iterables import Data, is_function, is_located, locate
from onnxqt.data.preprocessing import PRESETS, Preprocessing, parse_preprocessing
from onnxqt.data.samples import WINDOW_LIMIT, Samples, check_labels, check_targets, require
from onnxqt.data.source import DataSource, open_samples

__all__ = [
    "ARRAY_LIMIT",
    "LABELS",
    "PRESETS",
    "WINDOW_LIMIT",
    "Batch",
    "Data",
    "DataSource",
    "Index",
    "InputSpec",
    "Preprocessing",
    "Samples",
    "check_labels",
    "check_targets",
    "fixed_batch",
    "has_batch_axis",
    "has_classes",
    "is_function",
    "is_located",
    "locate",
    "open_samples",
    "parse_preprocessing",
    "require",
]
