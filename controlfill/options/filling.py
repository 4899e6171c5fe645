"""Options of commands that fill holes and measure them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from controlfill.options.base import (
    Anchor,
    Device,
    FillName,
    Options,
    Precision,
    SchedulerName,
    SpecName,
    WindowOrder,
    shared_values,
)
from controlfill.options.data import DataOptions


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """How a picture is sampled."""

    prompt: str = ""
    """What should be in the hole."""
    negative_prompt: str = ""
    """What should not."""
    guidance_scale: float | None = None
    """Weight of the prompt; 1 turns guidance off. Otherwise the base's own usual value."""
    controlnet_conditioning_scale: float = 1.0
    """Weight of the ControlNet; 0 turns it off."""
    control_guidance_start: float = 0.0
    """Share of the steps after which the ControlNet speaks."""
    control_guidance_end: float = 1.0
    """Share of the steps after which it is silent again, which saves its time."""
    control_prompted_only: bool = False
    """Let the ControlNet speak only where guidance looks at the prompt: faster and a little
    different."""
    guidance_start: float = 0.0
    """Share of the steps after which guidance is used."""
    guidance_end: float = 0.9
    """Share of the steps after which it is not: a step without it takes half of the time, and of
    10 steps the last needs none."""
    clip_guidance_scale: float = 0.0
    """Weight of what a CLIP says of the picture and its prompt; 0 turns it off, and 100 to 200 is
    usual. Slow: each step goes backwards through all networks."""
    clip_guidance_model: str | None = None
    """That CLIP: a folder or hub id such as openai/clip-vit-base-patch32."""
    clip_guidance_cutouts: int = 16
    """Random cutouts of the picture that it looks at in each step."""
    clip_guidance_end: float = 1.0
    """Share of the steps after which it is silent."""
    num_inference_steps: int = 10
    """Denoising steps."""
    scheduler: SchedulerName = "unipc"
    """Sampling method; unipc and dpm++2m use Karras sigmas."""
    seed: int = 42
    """Seed of the noise."""
    strength: float = 1.0
    """How far the hole is noised before it is redrawn: 1 knows nothing of what was there, less
    keeps more of it, 0 is no sampling at all."""
    fill: FillName | Literal["lama"] | None = None
    """A classical fill to start from instead of what was in the hole; with --strength 0 it is the
    result. `lama` needs a file of that network."""
    lama: Path | None = None
    """LaMa as an ONNX file, for --fill lama."""
    match_colours: bool = False
    """Give back the colours that known pixels lost on their way through the networks."""
    repair_seams: bool = True
    """Even out the step between old and new at the rim of the hole."""
    feather: int = 0
    """Pixels around the hole over which old and new blend; 0 leaves each known pixel alone."""
    window_size: int | None = None
    """Side of the windows through which large pictures are seen, in pixels; 0 = all at once.
    Otherwise the base's own size, for pictures larger than one and a half times that."""
    window_overlap: float = 0.5
    """Share of a window that it has in common with the next."""
    window_order: WindowOrder = "outward"
    """How large holes are filled: `outward` one window after the other, first those that see most
    of what is known; `rows` from top to bottom; `joint` all together in each step."""
    window_batch: int = 4
    """Windows that go through the networks together, in joint order."""


@dataclass(frozen=True, kw_only=True)
class HoleOptions(SampleOptions):
    """How a picture is sampled, what its mask means, and what is looked at."""

    mask_polarity: Literal["white", "black", "transparent"] = "white"
    """Which part of the mask is to be generated."""
    invert_mask: bool = False
    """Generate what the mask keeps."""
    grow_mask: int = 0
    """Pixels by which the hole grows on all sides; fewer than 0 let it shrink."""
    soft_mask: bool = False
    """Let a grey of the mask say how much may change there, instead of being black or white."""
    only_masked: bool = False
    """Look only at the surroundings of the hole: faster and finer in large pictures."""
    context: float = 1.5
    """How much larger than the hole those are; at least the base's own size."""
    context_box: tuple[int, int, int, int] | None = None
    """LEFT TOP WIDTH HEIGHT of the part to look at, in pixels; the hole lies within it."""
    separate_holes: bool = False
    """Fill holes that lie apart one after the other, each in its own surroundings."""


@dataclass(frozen=True, kw_only=True)
class GrowOptions(SampleOptions):
    """How a picture is sampled, and how much larger it shall be."""

    left: int = 0
    """Pixels to add on the left."""
    right: int = 0
    """Pixels to add on the right."""
    top: int = 0
    """Pixels to add above."""
    bottom: int = 0
    """Pixels to add below."""
    expand: str | None = None
    """Share of its width and height to add on each side, such as 50%."""
    to: str | None = None
    """Size to reach, WIDTHxHEIGHT."""
    anchor: Anchor = "center"
    """Where the old picture lies in the new one, for --to."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Options):
    """What the filling commands share: where to compute, where to write."""

    conditioning: SpecName | None = None
    """What the ControlNet was trained with; only for foreign weights, which don't say."""
    mixed_precision: Precision = "no"
    """Number format of the networks."""
    device: Device = "auto"
    """Where to compute."""
    engine: Literal["torch", "openvino"] = "torch"
    """What runs the networks: `openvino` takes about two thirds of the time on CPUs, and half of
    that with --mixed_precision bf16 (pip install 'controlfill[openvino]')."""
    output_dir: Path = Path("./outputs/inference")
    """Folder of the results."""


@dataclass(frozen=True, kw_only=True)
class SeedsOptions(PlaceOptions):
    """The same for commands that make one picture, in as many seeds as asked."""

    num_images: int = 1
    """Results in so many seeds, counted from --seed, and a contact sheet of them."""


@dataclass(frozen=True, kw_only=True)
class FillOptions(SeedsOptions, HoleOptions):
    """How to fill, where to compute, where to write."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """What is added to the base."""

    lora: tuple[str, ...] = ()
    """LoRAs to add to the base, FILE or FILE:0.8 for less of it; of diffusers, kohya or a run."""


@dataclass(frozen=True, kw_only=True)
class PairOptions(LoraOptions):
    """Which networks fill."""

    control: str | None = None
    """ControlNet: checkpoint folder, final_model, diffusers folder, .safetensors, or `embedded`."""
    base: str | None = None
    """The base; otherwise the one the ControlNet was trained on."""
    unet: Path | None = None
    """A UNet in the place of the base's own: a file of it alone, as of glid-3-xl-stable, a whole
    checkpoint, or a diffusers folder."""


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(PairOptions, FillOptions):
    """Fill the white part of MASK in IMAGE; writes inpainted.png and comparison.png."""

    image: Positional[Path]
    """The picture."""
    mask: Positional[Path]
    """The mask, as large as the picture: white = fill, black = keep."""


@dataclass(frozen=True, kw_only=True)
class OutpaintOptions(PairOptions, SeedsOptions, GrowOptions):
    """Continue IMAGE beyond its borders by any number of pixels; writes outpainted.png."""

    image: Positional[Path]
    """The picture."""


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(HoleOptions, GrowOptions):
    """All that may differ from one picture of a batch to the next."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions(PairOptions, PlaceOptions, ChangeOptions):
    """Fill or grow many pictures; writes them and manifest.jsonl, and goes on where it stopped."""

    data: Positional[Path]
    """Folder of pictures, or a .jsonl file: a line per picture with image, mask and options."""
    mask_dir: Path | None = None
    """Folder of masks, named as their pictures; without masks pictures are grown."""


@dataclass(frozen=True, kw_only=True)
class ZoomOptions(PairOptions, PlaceOptions, SampleOptions):
    """Grow IMAGE again and again into a video, OUT; the grown pictures go to --output_dir."""

    image: Positional[Path]
    """The picture, which also says how large the video is."""
    out: Positional[Path]
    """The video, an .mp4."""
    num_zooms: int = 4
    """How often the picture grows."""
    zoom_factor: float = 2.0
    """How many times as much is seen after each."""
    seconds_per_zoom: float = 2.0
    """Seconds from one to the next."""
    fps: int = 24
    """Frames per second."""
    zoom_in: bool = False
    """Play it backwards: from the last picture into the first."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(LoraOptions, SeedsOptions, SampleOptions):
    """Paint a picture that follows a conditioning picture; writes generated.png."""

    hint: Path
    """The conditioning picture; the result has its size."""
    control: str
    """ControlNet trained with --conditioning image: checkpoint, final_model, file."""
    base: str | None = None
    """The base; otherwise the one the ControlNet was trained on."""


@dataclass(frozen=True, kw_only=True)
class InferOptions(FillOptions):
    """Fill the white part of a mask with a trained checkpoint."""

    checkpoint_path: str
    """Checkpoint folder, final_model, diffusers folder, or a single .safetensors file."""
    input_image: Path
    """The picture."""
    input_mask: Path
    """The mask, as large as the picture: white = fill, black = keep."""
    pretrained_model_name_or_path: str | None = None
    """The base; otherwise the one recorded in the checkpoint."""
    num_inference_steps: int = 50
    """Denoising steps."""

    def as_inpaint(self) -> InpaintOptions:
        """The same request in the words of `controlfill inpaint`."""
        shared = shared_values(self, FillOptions)
        return InpaintOptions(
            image=self.input_image,
            mask=self.input_mask,
            control=self.checkpoint_path,
            base=self.pretrained_model_name_or_path,
            **shared,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """Measure fills on pictures whose truth is known, beside classical fills."""

    data: Positional[str] = "world:shapes"
    """Folder of pictures, or `world:shapes` (its held-out pictures)."""
    image_size: int = 64
    """Side of the square pictures, in pixels."""
    num_samples: int = 256
    """Pictures measured."""
    control: str | None = None
    """ControlNet to measure; the embedded one otherwise."""
    base: str | None = None
    """The base; otherwise the one the ControlNet was trained on."""
    conditioning: SpecName | None = None
    """What the ControlNet was trained with; only for foreign weights, which don't say."""
    num_inference_steps: int = 10
    """Denoising steps."""
    scheduler: SchedulerName = "unipc"
    """Sampling method."""
    guidance_scale: float | None = None
    """Weight of the prompt; the base's own usual value otherwise."""
    classical: tuple[str, ...] = ("telea", "navier-stokes", "biharmonic")
    """Classical fills to compare with."""
    objects: bool = True
    """On a world, also mask each object wholly and check what comes back against the prompt."""
    eval_batch_size: int = 32
    """Pictures sampled together."""
    device: Device = "auto"
    """Where to compute."""
    output_dir: Path = Path("./outputs/evaluation")
    """Folder of report.json, report.html and the pictures."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Check the installation: versions, device, memory, and one training and one sampling step."""

    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Walk the whole road on the embedded base: train, fill holes, measure, show a page."""

    output_dir: Path = Path("./demo")
    """Folder of the page and its pictures."""
    max_steps: int = 600
    """Training steps of the little run; the loss halves in some 200."""
    num_samples: int = 64
    """Held-out pictures measured."""
    seed: int = 42
    """Seed of everything random."""
