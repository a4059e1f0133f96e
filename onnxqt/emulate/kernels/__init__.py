"""Integer kernels: pure functions from codes to codes, one module per kind of operator.

Codes are integer arrays on a grid; accumulators are int32 or int64. Where devices differ, a module holds one function
per rule, in a table `RULES` by the names that `onnxqt.profiles.Arithmetic` uses.
"""
