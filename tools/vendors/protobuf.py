"""Protobuf's own reader of text, for the record of AMCT. `python protobuf.py CASES`; see `cases.py`.

The message is that of AMCT's documentation ("record file"), as far as it matters here; AMCT itself comes with CANN
only. A file of TIDL needs a template that TIDL wrote, so its check is a test (`tests/test_vendors_edge.py`).
"""

import sys
from importlib.metadata import version

import cases
import numpy as np
import onnx
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

FIELDS = {
    "Single": {"scale_d": (1, 2, 1), "offset_d": (2, 5, 1), "scale_w": (3, 2, 3), "offset_w": (4, 5, 3)},
    "Entry": {"key": (1, 9, 1), "value": (2, "Single", 1)},
    "ScaleOffsetRecord": {"record": (1, "Entry", 3)},
}  # number, type or message, label


def record_class() -> type:
    """The message `ScaleOffsetRecord`."""
    file = descriptor_pb2.FileDescriptorProto(name="record.proto", package="amct", syntax="proto2")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, label) in fields.items():
            added = message.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = 11, f".amct.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("amct.ScaleOffsetRecord"))


def check(case: cases.Case) -> cases.Outcome:
    """Scales and offsets of each record, by the node of its key."""
    try:
        content = text_format.Parse(case.file(".record.txt").read_text(), record_class()())
    except text_format.ParseError as error:
        raise cases.Refused(str(error)) from error
    nodes = {node.name: node for node in onnx.load(case.folder / "float.onnx").graph.node}
    checked, wrong = 0, []
    for entry in content.record:
        node, value = nodes[entry.key], entry.value
        into, weight = case.activations[node.input[0]], case.weights[node.input[1]]
        shift = 0 if into.signed else 1 << (into.bits - 1)
        least = np.float32(2.0**-23)
        same = {
            "scale of the input": value.scale_d == into.scale,
            "offset of the input": value.offset_d == into.zero_point - shift,
            "scales of the weight": np.array_equal(np.float32(value.scale_w), np.maximum(weight.scale.ravel(), least)),
            "offsets of the weight": list(value.offset_w) == [0] * weight.scale.size,
        }
        checked += len(same)
        wrong += [f"{entry.key}: {what}" for what, equal in same.items() if not equal]
    detail = f"differ: {', '.join(wrong[:3])}" if wrong else ""
    return cases.Outcome(checked, len(wrong), "scales and offsets of records", detail)


if __name__ == "__main__":
    sys.exit(cases.main("protobuf", version("protobuf"), {"ascend": check}))
