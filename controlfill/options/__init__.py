"""Every knob of every command: frozen dataclasses, free of torch.

A field is a flag, a YAML key and a key of the settings saved with each result, all by one name; the
text below a field is its `--help`.
"""

from controlfill.options.base import (
    ALIASES,
    LEAST,
    MASK_KINDS,
    SD15,
    SHARES,
    Options,
    Precision,
    check_numbers,
    check_values,
    field_types,
    read_size,
    shared_values,
)
from controlfill.options.data import DataOptions, MaskOptions, PreviewOptions
from controlfill.options.filling import (
    BatchOptions,
    ChangeOptions,
    DemoOptions,
    DoctorOptions,
    EvaluateOptions,
    FillOptions,
    GenerateOptions,
    GrowOptions,
    HoleOptions,
    InferOptions,
    InpaintOptions,
    OutpaintOptions,
    SampleOptions,
    ZoomOptions,
)
from controlfill.options.preparing import PrepareShardsOptions, PrepareTableOptions
from controlfill.options.skin_generate import SkinGenerateOptions, SkinReportOptions
from controlfill.options.skins import (
    LayoutOptions,
    SkinCheckOptions,
    SkinComposeOptions,
    SkinExportOptions,
    SkinHintOptions,
    SkinImportOptions,
    SkinRenderOptions,
    SkinSliceOptions,
    SkinThemesOptions,
)
from controlfill.options.skinset import (
    PrepareCannyOptions,
    PrepareCaptionsOptions,
    PrepareGlyphsOptions,
    PrepareSkinsOptions,
)
from controlfill.options.training import (
    CacheOptions,
    ControlOptions,
    LightningOptions,
    TrainOptions,
)

__all__ = [
    "ALIASES", "LEAST", "MASK_KINDS", "SD15", "SHARES", "BatchOptions", "CacheOptions",
    "ChangeOptions", "ControlOptions", "DataOptions", "DemoOptions", "DoctorOptions",
    "EvaluateOptions", "FillOptions", "GenerateOptions", "GrowOptions", "HoleOptions",
    "InferOptions", "InpaintOptions", "LayoutOptions", "LightningOptions", "MaskOptions",
    "Options", "OutpaintOptions", "Precision", "PrepareCannyOptions", "PrepareCaptionsOptions",
    "PrepareGlyphsOptions", "PrepareShardsOptions", "PrepareSkinsOptions",
    "PrepareTableOptions", "PreviewOptions", "SampleOptions", "SkinCheckOptions",
    "SkinComposeOptions", "SkinExportOptions", "SkinGenerateOptions", "SkinHintOptions",
    "SkinImportOptions", "SkinRenderOptions", "SkinReportOptions", "SkinSliceOptions",
    "SkinThemesOptions", "TrainOptions", "ZoomOptions", "check_numbers", "check_values",
    "field_types", "read_size", "shared_values",
]  # fmt: skip
