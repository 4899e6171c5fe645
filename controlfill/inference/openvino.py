"""The denoiser as OpenVINO graphs: the same numbers on CPUs in about two thirds of the time.

UNet and ControlNet become one graph when they are first needed, which takes some seconds.
"""

from __future__ import annotations

import warnings
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from controlfill.diffusion.condition import Condition
from controlfill.diffusion.denoiser import ControlDenoiser, Predictor
from controlfill.diffusion.reuse import without_hint_embedding
from controlfill.errors import UserError
from controlfill.models.text import Words

# The numbers that OpenVINO reckons in, by our --mixed_precision.
PRECISIONS = {"no": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVinoDenoiser(ControlDenoiser):
    """A ControlDenoiser of one UNet and one ControlNet, any size and batch, in float32 outside."""

    def __init__(self, unet: Any, network: nn.Module | None, precision: str) -> None:
        super().__init__(unet)
        self.network = None if network is None else without_hint_embedding(network)
        self.core, self.numbers = open_core(), PRECISIONS[precision]
        self.graphs: dict[tuple[bool, bool], Any] = {}

    def for_run(
        self, network: nn.Module | None, halves: bool = False, control_halves: bool = False
    ) -> Predictor:
        """The graphs, which are the same in every run and for all halves."""
        return partial(self, network)

    def __call__(
        self,
        network: nn.Module | None,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Condition,
        scale: float = 1.0,
        spared: int = 0,
    ) -> Tensor:
        """As ControlDenoiser; `network` only says whether the one of the graphs speaks."""
        speaks = network is not None and bool(scale)
        seen = noisy if condition.masked is None else torch.cat([noisy, condition.masked], dim=1)
        inputs = {"seen": seen, "timestep": timesteps, "text": condition.text.tokens}
        if added := condition.added():
            inputs["added"] = torch.cat([added["text_embeds"], added["time_ids"]], dim=1)
        if speaks:
            inputs |= {"hint": condition.hint, "scale": torch.tensor(float(scale))}
        kind = (speaks, speaks and bool(spared))
        if kind not in self.graphs:
            self.graphs[kind] = self.compile(Joined(self, *kind), inputs)
        found = self.graphs[kind]({name: value.numpy() for name, value in inputs.items()})
        # A copy: the next call writes its answer to the same place.
        return torch.from_numpy(found[0].copy())

    def compile(self, joined: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """`joined` as a graph for inputs of any size."""
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of branches that all calls take alike
            graph = openvino.convert_model(joined, example_input=inputs)
        asked = {
            "INFERENCE_PRECISION_HINT": self.numbers,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return self.core.compile_model(graph, "CPU", asked)


class Joined(nn.Module):
    """A ControlDenoiser as a module whose inputs are all tensors."""

    def __init__(self, denoiser: OpenVinoDenoiser, speaks: bool, spares: bool) -> None:
        super().__init__()
        self.unet, self.network = denoiser.unet, denoiser.network if speaks else None
        self.spares = spares

    def forward(
        self,
        seen: Tensor,
        timestep: Tensor,
        text: Tensor,
        added: Tensor | None = None,
        hint: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The prediction (B, C, h, w); with `spares` the first half hears no ControlNet.

        `seen` is the noisy latents, and behind them what inpaint UNets see beside; `added` are
        SDXL's pooled words and, last, its six numbers of size and cut.
        """
        latents: int = self.unet.config["out_channels"]
        noisy, masked = seen[:, :latents], seen[:, latents:]
        condition = Condition(
            text=Words(text) if added is None else Words(text, added[:, :-6]),
            hint=noisy if hint is None else hint,
            masked=masked if masked.shape[1] else None,
            framing=None if added is None else added[:, -6:],
        )
        spared = noisy.shape[0] // 2 if self.spares else 0
        loud: Any = 0.0 if scale is None else scale
        return ControlDenoiser(self.unet)(self.network, noisy, timestep, condition, loud, spared)


@lru_cache(maxsize=1)
def open_core() -> Any:
    """OpenVINO itself, once for the life of the process. Raises UserError where it is missing.

    When it goes, the stack of signal handlers goes with it, and the next signal ends the process.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            "--engine openvino needs OpenVINO; pip install 'controlfill[openvino]'"
        ) from error
    return openvino.Core()
