"""Files for the quantization tools of vendors, made of a calibration table.

`VENDORS` lists the formats, `write_vendor` makes the files of one. Most of these tools take the float model beside the
file and quantize its weights themselves; `baked_model` makes the float model for them. What a format cannot express of
the table at hand is in `Written.lost`.
"""

from collections.abc import Mapping

from onnxqt.errors import UsageError
from onnxqt.vendors import (
    ascend,
    hailo,
    mnn,
    ncnn,
    nncase,
    onnxruntime,
    qualcomm,
    quark,
    rockchip,
    sophgo,
    tensorrt,
    tidl,
)
from onnxqt.vendors.bake import Baked, baked_model
from onnxqt.vendors.form import Request, Vendor, Written

FORMATS: tuple[Vendor, ...] = (
    *(*onnxruntime.FORMATS, *tensorrt.FORMATS, *qualcomm.FORMATS, *quark.FORMATS, *rockchip.FORMATS, *sophgo.FORMATS),
    *(*ncnn.FORMATS, *mnn.FORMATS, *hailo.FORMATS, *tidl.FORMATS, *nncase.FORMATS, *ascend.FORMATS),
)

VENDORS: Mapping[str, Vendor] = {vendor.name: vendor for vendor in FORMATS}


def write_vendor(name: str, request: Request) -> Written:
    """The files of one format.

    Args:
        name: as `VENDORS` has it.
        request: what is to be written.

    Raises:
        UsageError: if there is no such format or scheme, an option is unknown or missing, or the format takes no
            template.
        ExportError: if the format cannot hold the table; naming the tensor and the remedy.
    """
    vendor = VENDORS.get(name)
    if vendor is None:
        raise UsageError(f"unknown format '{name}': give one of {', '.join(VENDORS)}")
    if request.scheme not in request.table.schemes:
        schemes = ", ".join(request.table.schemes)
        raise UsageError(f"the table has no scheme {request.scheme}: give one of {schemes}")
    if request.template is not None and not vendor.patches:
        raise UsageError(f"{name} takes no template: leave it out")
    unknown = [option for option in request.options if option not in vendor.options]
    if unknown:
        known = ", ".join(vendor.options) or "none"
        raise UsageError(f"{name} has no option '{unknown[0]}': it has {known}")
    missing = [
        option for option, (default, _) in vendor.options.items() if not default and option not in request.options
    ]
    if missing:
        raise UsageError(f"{name} needs the option '{missing[0]}': {vendor.options[missing[0]][1]}")
    return vendor.write(request)


__all__ = ["FORMATS", "VENDORS", "Baked", "Request", "Vendor", "Written", "baked_model", "write_vendor"]
