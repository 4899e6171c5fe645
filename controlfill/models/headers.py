"""What weights files say of themselves beside their tensors: configs, and what a UNet predicts."""

from __future__ import annotations

import json
from typing import Any

from controlfill.errors import UserError
from controlfill.models.configs import SPEC_KEY, SPECS, Config, is_pipeline, marked_prediction
from controlfill.models.layout import without_prefix
from controlfill.models.recognise import recognise
from controlfill.models.weights import Weights

# What our own files say of themselves in their header, besides what a ControlNet was trained on.
HEADER_KEY = "controlfill"
CONFIG_KEY = "controlnet_config"
CONFIGS_KEY = "controlfill_configs"
# What a header says of a pipeline beside its class: whether SDXL's empty prompt is zeros.
ZEROS = "force_zeros_for_empty_prompt"


def own_config(weights: Weights, kind: str) -> Config | None:
    """The config that a file of ours carries in its header. Raises UserError for damaged ones."""
    if kind == "controlnet" and CONFIG_KEY in weights.metadata:
        return _mapping(CONFIG_KEY, _parsed(weights, CONFIG_KEY))
    config = _mapping(CONFIGS_KEY, _parsed(weights, CONFIGS_KEY)).get(kind)
    return None if config is None else _mapping(f"{CONFIGS_KEY}, {kind}", config)


def _parsed(weights: Weights, key: str) -> Any:
    """A value of a header, which is JSON."""
    try:
        return json.loads(weights.metadata.get(key, "{}"))
    except ValueError as error:
        raise UserError(f"the header of the file is damaged: {error}") from error


def _mapping(where: str, value: Any) -> dict[str, Any]:
    """`value`, which is a mapping. Raises UserError for others."""
    if not isinstance(value, dict):
        raise UserError(f"the header of the file is damaged: {where} is {value!r:.60}, no mapping")
    return value


def own_pipeline(weights: Weights) -> str:
    """The class of the pipeline that a header names; "" where it names none that is known here.

    A header may be anybody's, and the class in a folder's index is what diffusers loads.
    """
    name = (own_config(weights, "pipeline") or {}).get("_class_name")
    return str(name) if is_pipeline(name) else ""


def said_prediction(weights: Weights) -> str | None:
    """What the UNet of a single file predicts, by its header, a mark or SD 2's bias, else None."""
    told = (own_config(weights, "scheduler") or {}).get("prediction_type")
    what = recognise(weights)
    return told or marked_prediction(weights, without_prefix(weights, what.prefix), what.family)


def file_prediction(weights: Weights) -> str | None:
    """The same, a whole checkpoint that says nothing being taken for what nearly all predict.

    That is epsilon. A UNet alone is not, for the tools that write those leave the marks out.
    """
    whole = recognise(weights).kind == "checkpoint"
    return said_prediction(weights) or ("epsilon" if whole else None)


def spec(prediction: str | None) -> dict[str, str]:
    """What a header says of what a UNet predicts; nothing where that is not told."""
    return {SPEC_KEY: SPECS.get(prediction, prediction)} if prediction else {}
