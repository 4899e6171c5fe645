"""What tests share: a narrow SD 1.5 made here, the embedded pair, and real COCO if present."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from narrow import make_base
from warm import Warm

from controlfill.inference.pipeline import Pipeline, load
from controlfill.models import embedded
from controlfill.options import TrainOptions

if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside other workers one thread each is fastest, also in the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco"
# Files that take longest, first: one that comes last leaves the other workers without work.
LONG = (
    "test_run.py", "test_readme.py", "test_finetune.py", "test_engines.py", "test_fuzz.py",
    "test_sharding.py", "test_distributed.py", "test_resume.py", "test_killed.py",
    "test_sdxl.py", "test_cache.py", "test_evaluate.py", "test_demo.py", "test_skins_walk.py",
    "test_outpaint.py", "test_holes.py", "test_choices.py", "test_benchmarks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest; within a file nothing changes."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def coco():
    """The folder of real COCO files; rows that need it are skipped without it."""
    if not COCO.is_dir():
        pytest.skip(f"real COCO files are not at {COCO}")
    return COCO


@pytest.fixture(scope="session")
def warm():
    """Runs commands in new processes that need not import torch first."""
    with Warm() as waiting:
        yield waiting


@pytest.fixture(scope="session")
def narrow_base(tmp_path_factory):
    """A randomly initialised, narrow SD 1.5 with all its parts, written by diffusers."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("narrow") / "sd15"
    torch.manual_seed(0)
    words = ["a", "red", "cat", "on", "mat"]
    tokenizer = embedded.make_tokenizer(words, folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=32,
            bos_token_id=tokenizer("").input_ids[0], eos_token_id=tokenizer("").input_ids[1],
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    unet = UNet(
        sample_size=8, block_out_channels=(16, 16, 32, 32), layers_per_block=2,
        attention_head_dim=2, cross_attention_dim=32, norm_num_groups=4,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """Narrow bases, each made once: `narrow("sdxl", in_channels=9)` is a folder."""

    @cache
    def make(family: str, in_channels: int = 4) -> Path:
        return make_base(family, tmp_path_factory.mktemp("narrow") / family, in_channels)

    return make


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    """The embedded pair."""
    return load(device="cpu")


@pytest.fixture
def photo() -> np.ndarray:
    """A smooth picture of odd size, uint8 (45, 70, 3)."""
    rows, columns = np.mgrid[0:45, 0:70]
    return np.stack([rows * 5, columns * 3, 255 - rows - columns], axis=2).astype(np.uint8)


@pytest.fixture
def hole() -> np.ndarray:
    """A mask for `photo`: a rectangle that touches no border."""
    mask = np.zeros((45, 70), np.uint8)
    mask[10:30, 20:50] = 255
    return mask


@pytest.fixture
def small_run(tmp_path) -> TrainOptions:
    """Options of the smallest run on the embedded base."""
    return small_options(tmp_path / "outputs")


def small_options(output_dir: Path) -> TrainOptions:
    """The same for fixtures that a file's tests share."""
    return TrainOptions(
        image_dir="world:shapes",
        pretrained_model_name_or_path="embedded",
        image_size=64,
        batch_size=2,
        learning_rate=1e-3,
        max_steps=4,
        save_steps=2,
        log_steps=2,
        log_images_steps=0,
        num_workers=0,
        output_dir=output_dir,
    )


def final_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the only run's final model."""
    from safetensors.torch import load_file

    (folder,) = output_dir.glob("controlnet_inpainting_*/final_model")
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finish(options, source=None):
    """Train to the end; the losses of all steps."""
    from controlfill.training.run import train

    return [float(step.loss) for step in train(options, source)]


def stop_after(options, steps):
    """Train and walk away after some steps, as a crash would."""
    from controlfill.training.run import train

    for step in train(options):
        if step.index == steps:
            return
