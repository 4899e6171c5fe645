"""The Hugging Face hub: a model card that says what was trained, and the upload."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from controlfill.data.hints import open_spec
from controlfill.errors import UserError
from controlfill.files import write_whole
from controlfill.models.controlnet import Header
from controlfill.models.inpainter import TunedHeader
from controlfill.options import FinetuneOptions, TrainOptions

log = logging.getLogger(__name__)

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: image-to-image
tags: [controlnet, inpainting, controlfill]
---

# {name}

A ControlNet for `{base}` ({family}, {prediction}), trained for {step} steps with
controlfill {version}.

- conditioning: `{conditioning}`. Hint: {hint}.
- data: `{data}`, {size} px, batch {batch} x {accumulation}, learning rate {rate:g}
- masks: {masks}, {low:.0%} to {high:.0%} of the picture

```python
import controlfill

pipe = controlfill.load(control="controlnet.safetensors")
result = pipe.{call}
result.save("out")
```

`diffusers.ControlNetModel.from_pretrained` opens this folder too.
"""


TUNED = """---
base_model: {base}
library_name: diffusers
pipeline_tag: image-to-image
tags: [inpainting, {kind}, controlfill]
---

# {name}

{what} of `{base}` ({family}, {prediction}), trained for {step} steps with
controlfill {version}.

- data: `{data}`, {size} px, batch {batch} x {accumulation}, learning rate {rate:g}
- prompt: {prompt}
- text encoders: {text}; class pictures: {prior}
- masks: {masks}, {low:.0%} to {high:.0%} of the picture

```
controlfill inpaint photo.jpg mask.png --prompt "..." {flags}
```

{elsewhere}
"""
# What other tools make of a LoRA, of a folder, and of a folder with a UNet that they don't know.
LORA = (
    "`load_lora_weights` of diffusers opens `pytorch_lora_weights.safetensors`; A1111 and "
    "ComfyUI read the other file."
)
FOLDER = "`diffusers.AutoPipelineForInpainting.from_pretrained` opens this folder too."
GLID = (
    "Its UNet takes 8 channels, as glid-3-xl-stable's does, so no pipeline of diffusers can sample "
    "it; `diffusers.UNet2DConditionModel` and the other parts open it."
)


def write_tuned_card(
    folder: Path, header: TunedHeader, options: FinetuneOptions, glid: bool
) -> None:
    """Write README.md, the model card of a fine-tuned base or its LoRA, into `folder`.

    `glid` means that its UNet is of glid-3-xl-stable's kind.
    """
    low, high = options.mask_area
    flags, where = "--base FOLDER", GLID if glid else FOLDER
    if options.use_lora:
        unet = f"--unet {options.unet} " if options.unet else ""
        flags = f"--base {header.base} {unet}--lora pytorch_lora_weights.safetensors"
        where = "" if glid else LORA
    text = TUNED.format(
        base=header.base, name=folder.parent.name, family=header.base_family,
        kind="lora" if options.use_lora else "finetuned",
        what=f"A LoRA of rank {header.rank}" if options.use_lora else "All weights",
        prediction=header.prediction_type, version=header.version, step=header.step,
        data=Path(options.pictures).name, size=options.image_size, batch=options.batch_size,
        accumulation=options.gradient_accumulation_steps, rate=options.rate,
        prompt=f"`{options.instance_prompt}`" if options.instance_prompt else "each picture's own",
        text="trained" if options.train_text_encoder else "as in the base",
        prior=f"`{options.class_prompt}`" if options.with_prior_preservation else "none",
        masks=", ".join(options.mask_kinds), low=low, high=high, flags=flags,
        elsewhere=where,
    )  # fmt: skip
    write_whole(folder / "README.md", text.encode())


def write_card(folder: Path, header: Header, options: TrainOptions) -> None:
    """Write README.md, the model card, into `folder`."""
    spec = open_spec(header.conditioning)
    low, high = options.mask_area
    text = CARD.format(
        base=header.base, name=folder.parent.name, family=header.base_family,
        prediction=header.prediction_type, version=header.version, step=header.step,
        conditioning=header.conditioning, hint=spec.about, data=Path(options.image_dir).name,
        size=options.image_size, batch=options.batch_size,
        accumulation=options.gradient_accumulation_steps, rate=options.learning_rate,
        masks="none" if spec.given else ", ".join(options.mask_kinds), low=low, high=high,
        call='follow("hint.png", prompt="...")' if spec.given else
        'inpaint("photo.jpg", "mask.png", prompt="...")',
    )  # fmt: skip
    write_whole(folder / "README.md", text.encode())


def push(folder: Path, name: str, api: Any = None) -> None:
    """Upload `folder` as the model repository `name`. Raises UserError when the hub refuses.

    The token is that of `hf auth login` or HF_TOKEN; it is never an option, which would be logged.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        repo = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=str(folder), commit_message="controlfill training"
        )
    except Exception as error:  # the client raises anything from HTTP errors to ValueError
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push_to_hub: {name} could not be uploaded ({reason}); the model is in {folder}"
        ) from error
    log.info("uploaded to %s", repo.repo_id)
