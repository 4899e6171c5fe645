"""Puts a trained base and its inpaint ControlNet into the package, in half precision.

    python recipes/ship_embedded.py --base outputs/embedded/base \
        --control outputs/controlnet_inpainting_<time>/final_model
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from controlfill.files import write_folder
from controlfill.inference.pipeline import load
from controlfill.models import embedded
from controlfill.models.controlnet import find_controlnet, read_control_header, save_controlnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--control")
    options = parser.parse_args()
    if options.base:
        shutil.copytree(options.base, embedded.FOLDER, dirs_exist_ok=True)
    if options.control:
        header = read_control_header(find_controlnet(options.control))
        assert header is not None
        network = load(embedded.EMBEDDED, options.control, device="cpu").network
        assert network is not None
        with write_folder(embedded.CONTROL_FOLDER) as folder:
            save_controlnet(network.half(), folder, replace(header, base=embedded.EMBEDDED))
    for file in embedded.FOLDER.rglob("*.*"):
        file.chmod(0o644)
    weights = embedded.FOLDER.rglob("*.safetensors")
    print(f"{sum(f.stat().st_size for f in weights) / 1e6:.1f} MB in {embedded.FOLDER}")


if __name__ == "__main__":
    main()
