"""The denoiser: the only lines where a ControlNet meets a UNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlfill.diffusion.condition import Condition
from controlfill.diffusion.reuse import remember_text, share_halves

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


# A ControlDenoiser that has its network already.
Predictor = Callable[..., Tensor]


class ControlDenoiser:
    """A frozen UNet that listens to a ControlNet handed in with every call.

    The network is an argument so that whatever wraps it (DDP, compile) stays in charge of it.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    def for_run(
        self, network: nn.Module | None, halves: bool = False, control_halves: bool = False
    ) -> Predictor:
        """All but the network in a call, for the many steps of a run, whose text is the same.

        With `halves`, batches come as two halves that differ only in their text; with
        `control_halves` the network sees both of them too.
        """
        unet: Any = remember_text(self.unet)
        network = None if network is None else remember_text(network)
        if halves:
            unet = share_halves(unet)
        if network is not None and control_halves:
            network = share_halves(network)
        return partial(ControlDenoiser(unet), network)

    def __call__(
        self,
        network: nn.Module | None,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Condition,
        scale: float = 1.0,
        spared: int = 0,
    ) -> Tensor:
        """The prediction (B, C, H, W) for `noisy`; without a network, or at scale 0, the UNet's.

        The first `spared` samples are predicted without control.
        """
        dtype, words = self.unet.dtype, condition.text
        down, middle = None, None
        if network is not None and scale:
            down, middle = network(
                noisy[spared:],
                timesteps,
                # Not a new tensor at every step: keys and values of the text are remembered.
                encoder_hidden_states=words.tokens[spared:] if spared else words.tokens,
                controlnet_cond=condition.hint[spared:].to(noisy.dtype),
                conditioning_scale=scale,
                added_cond_kwargs=condition.added(slice(spared, None)),
                return_dict=False,
            )
            # The network that learns keeps single precision where the frozen UNet is in half.
            down, middle = (
                [_spare(r, spared).to(dtype) for r in down],
                _spare(middle, spared).to(dtype),
            )
        seen = noisy if condition.masked is None else torch.cat([noisy, condition.masked], dim=1)
        return self.unet(
            seen.to(dtype),
            timesteps,
            encoder_hidden_states=words.tokens.to(dtype),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            added_cond_kwargs=condition.added(),
            return_dict=False,
        )[0]


def _spare(residual: Tensor, count: int) -> Tensor:
    """`residual` (B, ...) behind `count` samples of zeros."""
    return (
        torch.cat([residual.new_zeros((count, *residual.shape[1:])), residual])
        if count
        else residual
    )
