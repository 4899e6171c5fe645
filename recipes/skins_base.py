"""Makes the base of keyboard skins: its autoencoder, text encoder, UNet and ControlNet.

In the end the decoder learns once more, on latents as the networks make them.

    python recipes/skins_base.py --work_dir outputs/skins
    python recipes/ship_embedded.py --name embedded-skins --base outputs/skins/base \
        --control outputs/skins/control/final_model

It starts from the base of shapes, saves as it goes, and goes on where it stopped when the same
command is given again. On 2 CPU cores it takes about two and a half hours.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from embedded_base import State, Trainee, half, say
from soft_edges import edge_error, to_lab
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
from controlfill.skins.layout import Box, Layout, Size

FACTOR = 4
# Pictures whose latents are at hand at a time; each step two of them make room for new ones, and
# of those for the decoder, which have to be denoised first, every eighth step one.
POOL, FRESH, RARELY = 96, 2, 8
# Cells of patches, how many of them cost as much as 16 of 32 x 32, and how often they are drawn.
# Whole canvases teach what attention sees when a skin is painted.
KINDS = ((32, 32, 16), (48, 48, 7), (64, 64, 4), (80, 128, 2))
OFTEN = (0.6, 0.15, 0.15, 0.1)
DECODED = ((24, 24, 6), (40, 40, 2), (80, 128, 1))
OFTEN_DECODED = (0.7, 0.2, 0.1)


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


def contrast(theme: themes.Theme) -> float:
    """How far keys lie from their ground, in Lab with lightness up to 100."""
    value = themes.brightness(theme)
    shade = value + themes.CONTRASTS[theme.contrast] * themes.toward(value)
    colours = themes.colour(theme.key_hue, shade), themes.colour(theme.hue, value)
    lab = cv2.cvtColor(np.stack(colours)[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    return float(np.linalg.norm(lab[0] - lab[1]))


def weigh_cells(sample: Sample, layout: Layout) -> Tensor:
    """How much each latent cell counts: outlines of keys and labels more than what is plain."""
    weights = torch.ones(CANVAS[0] // FACTOR, CANVAS[1] // FACTOR)
    for slot in layout.keys:
        b, inner = slot.box, weights.clone()
        top, left, bottom, right = (side // FACTOR for side in (b.top, b.left, b.bottom, b.right))
        weights[max(0, top - 1) : bottom + 2, max(0, left - 1) : right + 2] = 1.5
        weights[top + 1 : bottom, left + 1 : right] = inner[top + 1 : bottom, left + 1 : right]
    for label in sample.labels:
        b = label.box
        down = slice(b.top // FACTOR, -(-b.bottom // FACTOR))
        weights[down, b.left // FACTOR : -(-b.right // FACTOR)] = 2.2
    return weights


class Pool:
    """Latents, hints, weights and words of some pictures, which change slowly."""

    def __init__(self, vae: Any, world: SkinSource, device: str) -> None:
        self.vae, self.world, self.device = vae, world, device
        self.items: list[State] = []

    @torch.no_grad()
    def encode(self, number: int) -> State:
        """What is kept of a picture; soft contrasts, small in latents, weigh more."""
        sample = self.world[number]
        with torch.autocast(self.device, torch.bfloat16):
            posterior = self.vae.encode(pixels(sample.image).to(self.device)).latent_dist
        weights = weigh_cells(sample, self.world.layout_of(number))
        gain = min(2.5, max(1.0, 25 / contrast(themes.draw_theme(self.world.first + number))))
        scale = self.vae.config.scaling_factor
        return {
            "mean": posterior.mean[0].float().cpu() * scale,
            "deviation": posterior.std[0].float().cpu() * scale,
            "hint": torch.from_numpy(sample.hint).permute(2, 0, 1).contiguous(),
            "weights": gain * weights / weights.mean(),
            "prompt": sample.prompt,
        }

    def refresh(self, step: int) -> None:
        """The pool of step number `step`."""
        first = FRESH * step if self.items else max(0, FRESH * step - POOL)
        for number in range(first, FRESH * (step + 1) + (0 if step else POOL // 2)):
            item = self.encode(number)
            if len(self.items) < POOL:
                self.items.append(item)
            else:
                self.items[number % POOL] = item

    def draw(self, rng: np.random.Generator, share: float) -> State:
        """Patches of one size, as many as cost `share` of a whole batch, stacked."""
        height, width, count = KINDS[rng.choice(len(KINDS), p=OFTEN)]
        patches: dict[str, list[Any]] = {name: [] for name in self.items[0]}
        for number in rng.integers(len(self.items), size=max(1, round(share * count))):
            item = self.items[number]
            place = random_place(rng, (height, width))
            for name in ("mean", "deviation", "weights"):
                patches[name].append(cut(item[name], place))
            patches["hint"].append(cut(item["hint"], place, FACTOR))
            patches["prompt"].append(item["prompt"] if rng.random() > 0.1 else "")
        return {n: v if n == "prompt" else torch.stack(v) for n, v in patches.items()}


def random_place(rng: np.random.Generator, size: Size) -> Box:
    """A rectangle of `size` cells somewhere on the canvas."""
    y, x = (int(rng.integers(s // FACTOR - n + 1)) for s, n in zip(CANVAS, size, strict=True))
    return Box(x, y, x + size[1], y + size[0])


def cut(picture: Tensor, place: Box, factor: int = 1) -> Tensor:
    """The part of `picture` (..., H, W), which has `factor` pixels for a cell of `place`."""
    y, x = slice(place.top * factor, place.bottom * factor), slice(place.left * factor, None)
    return picture[..., y, x][..., : (place.right - place.left) * factor]


def predict(
    modules: dict[str, nn.Module], noisy: Tensor, times: Tensor, ids: Tensor, told: State
) -> Tensor:
    """What the networks predict of `noisy`; `told` has a hint, and how much of it counts for each.

    Without a "hint" the ControlNet is not asked.
    """
    down, middle = None, None
    with torch.autocast(noisy.device.type, torch.bfloat16):
        words = modules["text_encoder"](ids).last_hidden_state
        if "hint" in told:
            down, middle = modules["control"](
                noisy, times, encoder_hidden_states=words, return_dict=False,
                controlnet_cond=told["hint"].to(noisy.device).float() / 255,
            )  # fmt: skip
            keep = told["keep"].to(noisy.device)
            down, middle = [residual * keep for residual in down], middle * keep
        return modules["unet"](
            noisy, times, encoder_hidden_states=words,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample.float()  # fmt: skip


def number_words(tokenizer: Any, prompts: list[str]) -> Tensor:
    """The numbers of the words of `prompts`."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_networks(
    options: argparse.Namespace, trainee: Trainee, pool: Pool, tokenizer: Any, listens: bool
) -> None:
    """Teach text encoder and UNet to predict v; with `listens` beside a ControlNet that learns too.

    A tenth of the samples goes without the ControlNet: the base stays one that paints skins from
    words alone.
    """
    schedule = NoiseSchedule(dict(embedded.make_scheduler().config))
    # The loss on v where there is much noise, on x_0 where there is little; edges need more of that
    # than shapes do, which have a 3 here.
    by_time = (8 * (1 - schedule.alphas_cumprod)).clamp(max=1)

    def loss_of_step(step: int) -> Tensor:
        pool.refresh(step)
        torch.manual_seed(step)
        part = pool.draw(np.random.default_rng(step), options.share)
        x0 = part["mean"] + part["deviation"] * torch.randn_like(part["mean"])
        noise = torch.randn_like(x0)
        times = schedule.draw_timesteps(len(x0), torch.Generator().manual_seed(step))
        # Few steps of sampling come as low as the lowest times, so they are drawn more seldom.
        higher = torch.randint(60, schedule.steps, times.shape)
        times = torch.where((times < 60) & (torch.rand(len(times)) < 0.85), higher, times)
        told = {"hint": part["hint"], "keep": (torch.rand(len(x0), 1, 1, 1) > 0.1).float()}
        ids = number_words(tokenizer, part["prompt"]).to(options.device)
        x0, noise, times = (tensor.to(options.device) for tensor in (x0, noise, times))
        noisy = schedule.add_noise(x0, noise, times)
        prediction = predict(trainee.modules, noisy, times, ids, told if listens else {})
        errors = (prediction - schedule.target(x0, noise, times)).square().mean(dim=1)
        errors = (errors * part["weights"].to(options.device)).mean(dim=(1, 2))
        return (errors * by_time.to(options.device)[times]).mean()

    trainee.fit(loss_of_step)
    trainee.use_average()


class Denoised:
    """Pictures with their latents and with those that the networks make of them, from noise on.

    Most of them are of soft contrasts.
    """

    def __init__(self, pool: Pool, modules: dict[str, nn.Module], tokenizer: Any) -> None:
        self.pool, self.modules, self.tokenizer = pool, modules, tokenizer
        self.schedule = NoiseSchedule(dict(embedded.make_scheduler().config))
        self.items: list[tuple[Tensor, Tensor, Tensor]] = []
        self.next = 0

    def choose(self, rng: np.random.Generator) -> int:
        """The number of the next picture."""
        while True:
            self.next += 1
            far = contrast(themes.draw_theme(self.pool.world.first + self.next))
            if rng.random() < (1 if far < 22 else 0.3 if far < 45 else 0.12):
                return self.next

    @torch.no_grad()
    def add(self, rng: np.random.Generator) -> None:
        """One more picture, in the place of another one if there are many."""
        number, device = self.choose(rng), self.pool.device
        item = self.pool.encode(number)
        x0, times = item["mean"][None].to(device), torch.tensor([int(rng.integers(60, 450))])
        noisy = self.schedule.add_noise(x0, torch.randn_like(x0), times.to(device))
        told = {"hint": item["hint"][None], "keep": torch.ones(1)}
        ids = number_words(self.tokenizer, [item["prompt"]]).to(device)
        predicted = predict(self.modules, noisy, times.to(device), ids, told)
        made = self.schedule.to_x0(predicted, noisy, times.to(device))[0].cpu()
        picture = pixels(self.pool.world[number].image)[0]
        place = len(self.items) if len(self.items) < POOL else int(rng.integers(POOL))
        self.items[place : place + 1] = [(picture, item["mean"], made)]

    def draw(self, rng: np.random.Generator, share: float) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1] and latents: three fifths made, a fifth noised, a fifth true."""
        height, width, count = DECODED[rng.choice(len(DECODED), p=OFTEN_DECODED)]
        pictures, latents = [], []
        for number in rng.integers(len(self.items), size=max(1, round(share * count))):
            picture, mean, made = self.items[number]
            place, kind = random_place(rng, (height, width)), rng.random()
            noise = 0.06 * float(rng.random()) * (0.6 <= kind < 0.8)
            seen = cut(made if kind < 0.6 else mean, place)
            pictures.append(cut(picture, place, FACTOR))
            latents.append(seen + noise * torch.randn_like(seen))
        return torch.stack(pictures), torch.stack(latents)


def train_decoder(options: argparse.Namespace, vae: Any, denoised: Denoised) -> None:
    """Teach the decoder soft edges, of latents as they are painted; the encoder stays."""
    learns = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    for module in learns.values():
        module.requires_grad_(True).train()
    trainee = Trainee(learns, options.work_dir / "decoder.pt", options.decoder_steps, 8e-4)

    def loss_of_step(step: int) -> Tensor:
        torch.manual_seed(step)
        rng = np.random.default_rng(step)
        for _ in range(step % RARELY == 0 if denoised.items else POOL // 4):
            denoised.add(rng)
        truth, latents = denoised.draw(rng, options.share)
        truth, latents = truth.to(options.device), latents.to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        decoded = decoded.float()
        error, lab = decoded - truth, (to_lab(decoded) - to_lab(truth)).abs().sum(dim=1).mean()
        plain = error.square().mean() + 0.3 * error.abs().mean() + 0.002 * lab
        return plain + 0.12 * edge_error(to_lab(decoded), to_lab(truth))

    trainee.fit(loss_of_step)
    trainee.use_average()
    vae.eval().requires_grad_(False)
    half(vae, options.out / "vae")


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
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--decoder_steps", type=int, default=2800)
    parser.add_argument("--share", type=float, default=1.0, help="of a batch of 16 patches")
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
    for module in both.values():
        module.eval().requires_grad_(False)
    train_decoder(options, vae, Denoised(pool, both, tokenizer))
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
