"""The denoiser: the only lines where a ControlNet meets a UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from controlfill.diffusion.condition import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class ControlDenoiser:
    """A frozen UNet that listens to a ControlNet handed in with every call.

    The network is an argument so that whatever wraps it (DDP, compile) stays in charge of it.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    def __call__(
        self,
        network: nn.Module | None,
        noisy: Tensor,
        timesteps: Tensor,
        condition: Condition,
        scale: float = 1.0,
    ) -> Tensor:
        """The prediction (B, C, H, W) for `noisy`; without a network, or at scale 0, the UNet's."""
        dtype = self.unet.dtype
        down, middle = None, None
        if network is not None and scale:
            down, middle = network(
                noisy,
                timesteps,
                encoder_hidden_states=condition.text,
                controlnet_cond=condition.hint.to(noisy.dtype),
                conditioning_scale=scale,
                return_dict=False,
            )
            # The network that learns keeps single precision where the frozen UNet is in half.
            down, middle = [residual.to(dtype) for residual in down], middle.to(dtype)
        return self.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=condition.text.to(dtype),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
