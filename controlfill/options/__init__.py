"""Every knob of every command: frozen dataclasses, free of torch.

A field is a flag, a YAML key and a key of the settings saved with each result, all by one name; the
text below a field is its `--help`.
"""

from controlfill.options.base import (
    LEAST,
    MASK_KINDS,
    SD15,
    SHARES,
    Options,
    check_numbers,
    field_types,
)
from controlfill.options.data import DataOptions, MaskOptions, PreviewOptions
from controlfill.options.filling import (
    DemoOptions,
    DoctorOptions,
    EvaluateOptions,
    FillOptions,
    InferOptions,
    InpaintOptions,
    SampleOptions,
)
from controlfill.options.training import TrainOptions

__all__ = [
    "LEAST", "MASK_KINDS", "SD15", "SHARES", "DataOptions", "DemoOptions", "DoctorOptions",
    "EvaluateOptions", "FillOptions", "InferOptions", "InpaintOptions", "MaskOptions", "Options",
    "PreviewOptions", "SampleOptions", "TrainOptions", "check_numbers", "field_types",
]  # fmt: skip
