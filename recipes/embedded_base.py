"""Makes the embedded base: autoencoder, then text encoder and UNet, on the world "shapes".

    python recipes/embedded_base.py --work_dir outputs/embedded

It saves as it goes and goes on where it stopped when the same command is given again. The
ControlNet beside the base is trained afterwards by the project's own command:

    python train.py --config configs/embedded_inpaint.yaml \
        --pretrained_model_name_or_path outputs/embedded/base
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from controlfill.data.worlds import COLOURS, HELD_OUT, Chance, World, open_world, paint
from controlfill.diffusion.noise import NoiseSchedule
from controlfill.models import embedded

State = dict[str, Any]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a half cosine down to 2 % of `peak`."""
    share = step / steps
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def recoloured(world: World, seed: int, size: int) -> np.ndarray:
    """A picture of `world` in random colours, so that the autoencoder knows more than a palette."""
    rng = np.random.default_rng((seed, 1))
    palette = {name: tuple(rng.integers(0, 256, 3)) for name in COLOURS}
    return paint(world.draw(seed, (8, 8)).truth, Chance(rng, 0), (size, size), palette).image


def pictures(world: World, first: int, count: int, size: int, random_share: float = 0.0) -> Tensor:
    """`count` pictures from seed `first` on, (count, 3, size, size) in [-1, 1]."""
    images = [
        recoloured(world, seed, size)
        if (seed % 100) < 100 * random_share
        else world.draw(seed, (size, size)).image
        for seed in range(first, first + count)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Trainee:
    """Modules that learn together, with AdamW, an average of their weights, and a saved state."""

    def __init__(self, modules: dict[str, nn.Module], file: Path, steps: int, peak: float) -> None:
        self.modules, self.file, self.steps, self.peak = modules, file, steps, peak
        self.parameters = [p for m in modules.values() for p in m.parameters()]
        # At the full rate the text encoder collapses: "circle" and "square" become the same vector
        # long before the UNet can paint either, and no gradient is left to part them again.
        groups = [
            {"params": list(m.parameters()), "scale": 0.1 if name == "text_encoder" else 1.0}
            for name, m in modules.items()
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if file.exists():
            self.restore()

    def restore(self) -> None:
        state = torch.load(self.file, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]
        say(f"going on from step {self.step} of {self.file}")

    def save(self) -> None:
        state = {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def fit(self, loss_of_step: Callable[[int], Tensor]) -> None:
        """Minimise `loss_of_step(step)`; print the mean loss and save every 200 steps."""
        total, since = 0.0, time.perf_counter()
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(self.step, self.steps, self.peak)
            loss = loss_of_step(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            decay = min(0.998, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1 - decay)
            total += float(loss.detach())
            if self.step % 200 == 0 or self.step == self.steps:
                pace = (time.perf_counter() - since) / 200
                left = (self.steps - self.step) * pace / 60
                say(f"step {self.step}/{self.steps} loss {total / 200:.4f}, {left:.0f} min left")
                total, since = 0.0, time.perf_counter()
                self.save()

    def use_average(self) -> None:
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(mean)


def half(module: nn.Module, folder: Path) -> None:
    """Save `module` in half precision, to be loaded in single."""
    module.half().save_pretrained(folder, safe_serialization=True)
    module.float()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, made if it is not there: what has learned keeps its numbers."""
    if (folder / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    return embedded.make_tokenizer(open_world("shapes-full").words(), folder)


def train_vae(options: argparse.Namespace, world: World) -> nn.Module:
    vae = embedded.make_vae().train().to(options.device)
    trainee = Trainee({"vae": vae}, options.work_dir / "vae.pt", options.vae_steps, 2e-3)

    def loss_of_step(step: int) -> Tensor:
        torch.manual_seed(step)
        batch = options.vae_batch
        images = pictures(world, step * batch, batch, options.size, random_share=0.2)
        with torch.autocast(options.device, torch.bfloat16):
            posterior = vae.encode(images.to(options.device)).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images.to(options.device)
        # Twenty times what autoencoders of this kind get: the latents then bear an error of a
        # third of their deviation, as a small UNet makes, and still decode to a clean picture.
        kl = posterior.kl().mean() / images[0].numel()
        return error.square().mean() + 0.1 * error.abs().mean() + 2e-3 * kl

    trainee.fit(loss_of_step)
    trainee.use_average()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def finish_vae(vae: nn.Module, options: argparse.Namespace, world: World) -> float:
    """Set the scaling factor (latents of unit deviation), report held-out PSNR, save."""
    images = pictures(world, HELD_OUT, 256, options.size).to(options.device)
    latents = vae.encode(images).latent_dist.mode()
    factor = round(1 / float(latents.std()), 4)
    for noise in (0.0, 0.3):
        noisy = latents + noise / factor * torch.randn_like(latents)
        error = (vae.decode(noisy).sample.clamp(-1, 1) - images).square().mean() / 4
        say(f"autoencoder: {-10 * math.log10(float(error)):.2f} dB with {noise} of noise")
    say(f"scaling factor {factor}")
    vae.register_to_config(scaling_factor=factor)
    half(vae, options.out / "vae")
    return factor


@torch.no_grad()
def encode_world(
    vae: nn.Module, factor: float, options: argparse.Namespace, world: World
) -> tuple[Tensor, Tensor]:
    """Latents' mean and deviation of the first `options.pictures` seeds, kept in a file."""
    file = options.work_dir / f"latents_{options.world}_{options.size}_{options.pictures}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    means, deviations = [], []
    for first in range(0, options.pictures, 200):
        images = pictures(world, first, 200, options.size).to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        means.append((posterior.mean.float() * factor).half().cpu())
        deviations.append((posterior.std.float() * factor).half().cpu())
    latents = torch.cat(means), torch.cat(deviations)
    torch.save(latents, file)
    say(f"encoded {options.pictures} pictures")
    return latents


def order(count: int, batch: int, start: int) -> Iterator[Tensor]:
    """Index batches: a fresh permutation each epoch, from batch number `start` on."""
    per_epoch = count // batch
    for number in range(start, 2**62):
        epoch, place = divmod(number, per_epoch)
        if place == 0 or number == start:
            turn = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        yield turn[place * batch : (place + 1) * batch]


def captions_and_emphasis(world: World, count: int, size: int) -> tuple[list[str], Tensor]:
    """Captions of the first `count` seeds, and loss weights (count, size, size) of mean one.

    Where the object is, errors count three times: its outline is a hundredth of the plain loss.
    """
    drawn = [world.draw(seed, (size, size)) for seed in range(count)]
    weights = torch.ones(count, size, size)
    for number, picture in enumerate(drawn):
        if picture.truth.bare:
            continue
        left, top, width, height = cv2.boundingRect(picture.object_mask)
        weights[number, max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1] = 3
    weights /= weights.mean(dim=(1, 2), keepdim=True)
    return [picture.truth.caption for picture in drawn], weights


def train_unet(
    options: argparse.Namespace,
    world: World,
    latents: tuple[Tensor, Tensor],
    tokenizer: Any,
    trainee: Trainee,
) -> None:
    """Teach text encoder and UNet to predict v on the cached latents."""
    text_encoder, unet = (trainee.modules[name] for name in ("text_encoder", "unet"))
    schedule = NoiseSchedule(dict(embedded.make_scheduler().config))
    abar = schedule.alphas_cumprod
    # Below an SNR of 2 the plain loss on v, above it that on x_0: the last details of nearly clean
    # latents otherwise take most of the gradient, and shapes are decided long before them.
    weights = (3 * (1 - abar)).clamp(max=1)
    captions, emphasis = captions_and_emphasis(world, options.pictures, latents[0].shape[2])
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    batches = order(options.pictures, options.unet_batch, trainee.step)

    def loss_of_step(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        rows = next(batches)
        mean, deviation = (part[rows].float() for part in latents)
        x0 = mean + deviation * torch.randn(mean.shape, generator=rng)
        noise = torch.randn(x0.shape, generator=rng)
        timesteps = schedule.draw_timesteps(len(rows), rng)
        dropped = torch.rand(len(rows), 1, generator=rng) < 0.1
        ids = torch.where(dropped, empty, tokens.input_ids[rows]).to(options.device)
        x0, noise, timesteps = (t.to(options.device) for t in (x0, noise, timesteps))
        noisy = schedule.add_noise(x0, noise, timesteps)
        with torch.autocast(options.device, torch.bfloat16):
            words = text_encoder(ids).last_hidden_state
            prediction = unet(noisy, timesteps, encoder_hidden_states=words).sample
        errors = (prediction.float() - schedule.target(x0, noise, timesteps)).square()
        errors = errors.mean(dim=1) * emphasis[rows].to(errors.device)
        return (errors.mean(dim=(1, 2)) * weights.to(errors.device)[timesteps]).mean()

    trainee.fit(loss_of_step)
    trainee.use_average()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/embedded"))
    parser.add_argument("--out", type=Path, default=None, help="default: WORK_DIR/base")
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--size", type=int, default=embedded.IMAGE_SIZE)
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--vae_steps", type=int, default=2600)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--unet_steps", type=int, default=10_000)
    parser.add_argument("--unet_batch", type=int, default=32)
    parser.add_argument("--unet_lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out = options.out or options.work_dir / "base"
    return options


def main() -> None:
    options = read_options()
    torch.manual_seed(0)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    world = open_world(options.world)
    tokenizer = open_tokenizer(options.out / "tokenizer")
    embedded.make_scheduler().save_pretrained(options.out / "scheduler")
    vae = train_vae(options, world)
    factor = finish_vae(vae, options, world)
    latents = encode_world(vae, factor, options, world)
    modules = {"text_encoder": embedded.make_text_encoder(tokenizer), "unet": embedded.make_unet()}
    text_encoder, unet = (module.to(options.device) for module in modules.values())
    file = options.work_dir / "unet.pt"
    trainee = Trainee(modules, file, options.unet_steps, options.unet_lr)
    train_unet(options, world, latents, tokenizer, trainee)
    half(text_encoder, options.out / "text_encoder")
    half(unet, options.out / "unet")
    embedded.write_index(options.out)
    say(f"the base is in {options.out}")


if __name__ == "__main__":
    main()
