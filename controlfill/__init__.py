"""controlfill: train ControlNets that complete pictures, and use them.

    import controlfill

    pipe = controlfill.load()                        # the embedded pair, or load(base, control=...)
    result = pipe.inpaint("photo.jpg", "mask.png", prompt="a red circle")
    result.save("out")

    for step in controlfill.train(controlfill.TrainOptions(image_dir="photos")):
        print(step.index, float(step.loss))

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlfill.data.sample import Sample, Source
    from controlfill.errors import UserError
    from controlfill.inference.complete import Result
    from controlfill.inference.pipeline import Pipeline, load
    from controlfill.options import SampleOptions, TrainOptions
    from controlfill.training.run import train

_HOMES = {
    "Pipeline": "controlfill.inference.pipeline",
    "load": "controlfill.inference.pipeline",
    "Result": "controlfill.inference.complete",
    "Sample": "controlfill.data.sample",
    "Source": "controlfill.data.sample",
    "SampleOptions": "controlfill.options",
    "TrainOptions": "controlfill.options",
    "UserError": "controlfill.errors",
    "train": "controlfill.training.run",
}

__all__ = [
    "Pipeline", "Result", "Sample", "SampleOptions", "Source", "TrainOptions", "UserError",
    "load", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from its home the first time it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"controlfill has no {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
