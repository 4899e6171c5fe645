"""Puts a trained base and its ControlNet into the package, in half precision.

    python recipes/ship_embedded.py --base outputs/embedded/base \
        --control outputs/controlnet_inpainting_<time>/final_model

`--name embedded-skins` ships them as the base of keyboard skins, `--name embedded-inpaint` a base
that fills holes without a ControlNet.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlfill.files import write_folder
from controlfill.inference.pipeline import load
from controlfill.models import embedded
from controlfill.models.controlnet import find_controlnet, read_control_header, save_controlnet


def halve(file: Path) -> None:
    """Write the weights of `file` in half precision."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    if any(tensor.dtype == torch.float32 for tensor in weights.values()):
        save_file({name: tensor.half() for name, tensor in weights.items()}, file, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=embedded.FOLDERS, default=embedded.EMBEDDED)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--control")
    options = parser.parse_args()
    name, folder = options.name, embedded.FOLDERS[options.name]
    if options.base:
        shutil.copytree(options.base, folder, dirs_exist_ok=True)
    if options.control:
        header = read_control_header(find_controlnet(options.control))
        assert header is not None
        network = load(name, options.control, device="cpu").network
        assert network is not None
        with write_folder(embedded.CONTROLS[name]) as written:
            save_controlnet(network.half(), written, replace(header, base=name))
    for file in folder.rglob("config.json"):
        # diffusers writes from which folder a network once came.
        words = json.loads(file.read_text("utf-8"))
        words.pop("_name_or_path", None)
        file.write_text(json.dumps(words, indent=2) + "\n", "utf-8")
    weights = list(folder.rglob("*.safetensors"))
    for file in weights:
        halve(file)
    for file in folder.rglob("*.*"):
        file.chmod(0o644)
    print(f"{sum(f.stat().st_size for f in weights) / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    main()
