"""Makes the base of keyboard skins: its autoencoder, then text encoder and UNet with a ControlNet.

    python recipes/skins_base.py --work_dir outputs/skins
    python recipes/ship_embedded.py --name embedded-skins --base outputs/skins/base \
        --control outputs/skins/control/final_model

It starts from the base of shapes, saves as it goes, and goes on where it stopped when the same
command is given again. On 2 CPU cores it takes about 75 minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_base import State, Trainee, half, say
from torch import Tensor, nn
from transformers import CLIPTokenizer

from controlfill.data.hints import open_spec
from controlfill.data.sample import Sample
from controlfill.data.skin_world import CANVAS, SKIN_WORLDS, SkinSource
from controlfill.data.worlds import HELD_OUT, open_world
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.files import write_folder
from controlfill.models import embedded
from controlfill.models.bundle import load_bundle
from controlfill.models.controlnet import SINGLE, WEIGHTS, make_controlnet, make_header
from controlfill.models.controlnet import save_controlnet as save
from controlfill.skins import themes

FACTOR = 4
# Pictures whose latents are at hand at a time; each step two of them make room for new ones.
POOL, FRESH = 96, 2


def pixels(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) as (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def train_vae(options: argparse.Namespace, world: SkinSource) -> Any:
    """Teach the autoencoder of shapes the edges and letters of skins, on patches of 64 px."""
    vae = load_bundle(embedded.EMBEDDED).vae.requires_grad_(True).train().to(options.device)
    trainee = Trainee({"vae": vae}, options.work_dir / "vae.pt", options.vae_steps, 1e-3)

    def loss_of_step(step: int) -> Tensor:
        torch.manual_seed(step)
        rng = np.random.default_rng(step)
        patches = []
        for number in range(4 * step, 4 * step + 4):
            image = world[number].image
            tops, lefts = (rng.integers(side - 63, size=4) for side in CANVAS)
            patches += [
                pixels(image[y : y + 64, x : x + 64]) for y, x in zip(tops, lefts, strict=True)
            ]
        images = torch.cat(patches).to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        # A twentieth of the pull to the middle that shapes have: letters need exact latents.
        kl = posterior.kl().mean() / images[0].numel()
        return error.square().mean() + 0.3 * error.abs().mean() + 1e-4 * kl

    trainee.fit(loss_of_step)
    trainee.use_average()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def finish_vae(vae: Any, options: argparse.Namespace) -> None:
    """Set the scaling factor (latents of unit deviation), report held-out PSNR, save."""
    world = SkinSource(SKIN_WORLDS["skins-mixed"], HELD_OUT, 16, held_out=True)
    images = torch.cat([pixels(world[number].image) for number in range(16)]).to(options.device)
    latents = vae.encode(images).latent_dist.mode()
    error = (vae.decode(latents).sample.clamp(-1, 1) - images).square().mean() / 4
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    say(f"autoencoder: {-10 * float(error.log10()):.2f} dB, scale {vae.config.scaling_factor}")
    half(vae, options.out / "vae")


class Pool:
    """Latents, hints, weights and words of some pictures, which change slowly."""

    def __init__(self, vae: Any, world: SkinSource, device: str) -> None:
        self.vae, self.world, self.device = vae, world, device
        self.items: list[State] = []

    @torch.no_grad()
    def encode(self, sample: Sample) -> State:
        """What is kept of a picture; cells of labels weigh twice."""
        with torch.autocast(self.device, torch.bfloat16):
            posterior = self.vae.encode(pixels(sample.image).to(self.device)).latent_dist
        weights = torch.ones(CANVAS[0] // FACTOR, CANVAS[1] // FACTOR)
        for label in sample.labels:
            b = label.box
            down = slice(b.top // FACTOR, -(-b.bottom // FACTOR))
            weights[down, b.left // FACTOR : -(-b.right // FACTOR)] = 2
        scale = self.vae.config.scaling_factor
        return {
            "mean": posterior.mean[0].float().cpu() * scale,
            "deviation": posterior.std[0].float().cpu() * scale,
            "hint": torch.from_numpy(sample.hint).permute(2, 0, 1).contiguous(),
            "weights": weights,
            "prompt": sample.prompt,
        }

    def refresh(self, step: int) -> None:
        """The pool of step number `step`."""
        first = FRESH * step if self.items else max(0, FRESH * step - POOL)
        for number in range(first, FRESH * (step + 1) + (0 if step else POOL // 2)):
            item = self.encode(self.world[number])
            if len(self.items) < POOL:
                self.items.append(item)
            else:
                self.items[number % POOL] = item

    def draw(self, rng: np.random.Generator, count: int, cells: int) -> State:
        """`count` patches of `cells` latent cells, stacked."""
        patches: dict[str, list[Any]] = {name: [] for name in self.items[0]}
        for number in rng.integers(len(self.items), size=count):
            item = self.items[number]
            y, x = (int(rng.integers(side // FACTOR - cells + 1)) for side in CANVAS)
            for name in ("mean", "deviation", "weights"):
                patches[name].append(item[name][..., y : y + cells, x : x + cells])
            y, x, side = FACTOR * y, FACTOR * x, FACTOR * cells
            patches["hint"].append(item["hint"][:, y : y + side, x : x + side])
            patches["prompt"].append(item["prompt"] if rng.random() > 0.1 else "")
        return {n: v if n == "prompt" else torch.stack(v) for n, v in patches.items()}


def train_networks(
    options: argparse.Namespace, trainee: Trainee, pool: Pool, tokenizer: Any, listens: bool
) -> None:
    """Teach text encoder and UNet to predict v; with `listens` beside a ControlNet that learns too.

    A fifth of the samples, and one at least, go without the ControlNet: the base stays one that
    paints skins from words alone.
    """
    text_encoder, unet = trainee.modules["text_encoder"], trainee.modules["unet"]
    schedule = NoiseSchedule(dict(embedded.make_scheduler().config))
    # As in the base of shapes: the loss on v below an SNR of 2, on x_0 above it.
    by_time = (3 * (1 - schedule.alphas_cumprod)).clamp(max=1)

    def loss_of_step(step: int) -> Tensor:
        pool.refresh(step)
        torch.manual_seed(step)
        part = pool.draw(np.random.default_rng(step), options.batch, options.cells)
        x0 = part["mean"] + part["deviation"] * torch.randn_like(part["mean"])
        noise = torch.randn_like(x0)
        times = schedule.draw_timesteps(len(x0), torch.Generator().manual_seed(step))
        ids = tokenizer(
            part["prompt"], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(options.device)
        x0, noise, times = (tensor.to(options.device) for tensor in (x0, noise, times))
        noisy = schedule.add_noise(x0, noise, times)
        down, middle = None, None
        with torch.autocast(options.device, torch.bfloat16):
            words = text_encoder(ids).last_hidden_state
            if listens:
                keep = (torch.rand(len(x0), 1, 1, 1) > 0.2).float()
                keep[-1] = 0
                down, middle = trainee.modules["control"](
                    noisy, times, encoder_hidden_states=words, return_dict=False,
                    controlnet_cond=part["hint"].to(options.device).float() / 255,
                )  # fmt: skip
                down = [residual * keep.to(options.device) for residual in down]
                middle = middle * keep.to(options.device)
            prediction = unet(
                noisy, times, encoder_hidden_states=words,
                down_block_additional_residuals=down, mid_block_additional_residual=middle,
            ).sample  # fmt: skip
        errors = (prediction.float() - schedule.target(x0, noise, times)).square().mean(dim=1)
        weights = part["weights"] / part["weights"].mean(dim=(1, 2), keepdim=True)
        errors = (errors * weights.to(options.device)).mean(dim=(1, 2))
        return (errors * by_time.to(options.device)[times]).mean()

    trainee.fit(loss_of_step)
    trainee.use_average()


def words() -> list[str]:
    """Every word that captions of skins hold, after those of shapes."""
    tables = themes.HUES, themes.GROUNDS, themes.SHAPES, themes.CONTRASTS
    more = [word for table in tables for word in table]
    said = ["a", "keyboard", "skin", "of", "ground", "and", "keys", "light", "dark"]
    return list(dict.fromkeys([*open_world("shapes-full").words(), *said, *more]))


def read_options() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/skins"))
    parser.add_argument("--vae_steps", type=int, default=2400)
    parser.add_argument("--alone_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out = options.work_dir / "base"
    return options


def main() -> None:
    """All of it."""
    options = read_options()
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    world = SkinSource(SKIN_WORLDS["skins-mixed"], 0, HELD_OUT)
    embedded.make_scheduler().save_pretrained(options.out / "scheduler")
    embedded.write_index(options.out)
    tokenizer = open_tokenizer(options.out / "tokenizer")
    vae = train_vae(options, world)
    finish_vae(vae, options)
    pool = Pool(vae, world, options.device)
    shapes = load_bundle(embedded.EMBEDDED)
    modules: dict[str, nn.Module] = {
        "text_encoder": embedded.make_text_encoder(tokenizer), "unet": shapes.unet,
    }  # fmt: skip
    for module in modules.values():
        module.requires_grad_(True).train().to(options.device)
    alone = Trainee(modules, options.work_dir / "alone.pt", options.alone_steps, 1e-3)
    train_networks(options, alone, pool, tokenizer, listens=False)
    control = make_controlnet(shapes, 3).train().to(options.device)
    both = {**modules, "control": control}
    trainee = Trainee(both, options.work_dir / "both.pt", options.steps, options.rate)
    train_networks(options, trainee, pool, tokenizer, listens=True)
    for name, module in modules.items():
        half(module, options.out / name)
    with write_folder(options.work_dir / "control" / "final_model") as folder:
        header = make_header(load_bundle(str(options.out)), open_spec("image").label, trainee.step)
        save(control, folder, header, None, (WEIGHTS, SINGLE))
    say(f"the base is in {options.out}, its ControlNet in {options.work_dir / 'control'}")


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, made if it is not there: what has learned keeps its numbers."""
    if (folder / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    return embedded.make_tokenizer(words(), folder)


if __name__ == "__main__":
    main()
