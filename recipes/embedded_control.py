"""Makes the ControlNet that the embedded pair's training starts from.

    python recipes/embedded_control.py --base outputs/embedded/base --out outputs/embedded/start
    python train.py --config configs/embedded_inpaint.yaml --pretrained_model_name_or_path \
        outputs/embedded/base --controlnet_model_name_or_path outputs/embedded/start

It is a copy of the UNet's encoder, as always, with text attention added at full latent size, where
the embedded UNet has none (SD 1.5 has). The hint tells where an object goes and the prompt which
one; without it the network could not draw the prompt's outline at the size at which outlines are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from controlfill.data.hints import open_spec
from controlfill.files import write_folder
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import make_controlnet, make_header, save_controlnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bundle, spec = load_bundle(options.base), open_spec("masked-image")
    torch.manual_seed(0)
    copy = make_controlnet(bundle, spec.channels)
    config: dict[str, Any] = dict(copy.config)
    config["down_block_types"] = ["CrossAttnDownBlock2D"] * len(config["down_block_types"])
    network: Any = ControlNetModel.from_config(config)
    network.load_state_dict(copy.state_dict(), strict=False)
    for attention in network.down_blocks[0].attentions:
        # What is new begins by saying nothing, like the zero convolutions.
        torch.nn.init.zeros_(attention.proj_out.weight)
        torch.nn.init.zeros_(attention.proj_out.bias)
    with write_folder(options.out) as folder:
        save_controlnet(network, folder, make_header(bundle, spec.label))
    weights = sum(p.numel() for p in network.parameters())
    print(f"{weights / 1e6:.2f} M weights in {options.out}")


if __name__ == "__main__":
    main()
