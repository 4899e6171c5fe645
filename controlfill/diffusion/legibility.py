"""The text loss: can the labels of a predicted picture be read, as far as a reader can tell?

CTC alone teaches a picture to please its reader and nobody else: what counts is how much worse the
labels are read than those of the true picture, beside the diffusion loss, and where little noise
was added. Judge by another reader than the one trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from controlfill.diffusion.noise import NoiseSchedule
from controlfill.errors import UserError
from controlfill.models.ocr import (
    FRAME,
    Reader,
    Reading,
    class_ids,
    fit_crops,
    fitted_width,
    restrict,
    size_of,
)

ByTime = Literal["abar", "none", "minsnr"]
# The cap that Hang et al. 2023 found best for Min-SNR.
GAMMA = 5.0


@dataclass(frozen=True, kw_only=True)
class TextWeighting:
    """What the text loss counts for: `scale` (0: it is off) times its parts.

    Times are drawn below the share `most_t` of the schedule, and weighted `by_time`.
    """

    scale: float
    feature: float
    ctc: float
    most_t: float = 0.6
    by_time: ByTime = "abar"


@dataclass(frozen=True, kw_only=True)
class TextErrors:
    """How badly crops are read, each (N,).

    `feature` is the mean squared distance of what the reader sees to what it sees in the true crop;
    `ctc` is the nats per frame that the label costs, `floor` those it costs in the true crop.
    """

    feature: Tensor
    ctc: Tensor
    floor: Tensor

    @property
    def excess(self) -> Tensor:
        """How much more than in the true crop the label costs (N,); never below 0."""
        return (self.ctc - self.floor).clamp(min=0)


def text_errors(
    reader: Reader,
    predicted: Sequence[Tensor],
    reference: Sequence[Tensor],
    labels: Sequence[str],
    signs: str,
) -> TextErrors:
    """How badly `labels` are read in the crops `predicted` against the true crops `reference`.

    Crops are (3, h, w) in [0, 1]; those of a pair have one size. The reader chooses among `signs`.
    No gradient reaches the reference. Raises UserError for labels that can't be read.
    """
    check_pairs(predicted, reference, labels)
    check_labels(labels, signs)
    frames = torch.tensor([fitted_width(size_of(crop)) // FRAME for crop in predicted])
    seen = reader(fit_crops(predicted))
    with torch.no_grad():
        true = reader(fit_crops(reference))
    distances = (seen.features - true.features).square().mean(2)
    return TextErrors(
        feature=mean_over(distances, frames),
        ctc=spelling(reader, seen, labels, signs, frames),
        floor=spelling(reader, true, labels, signs, frames),
    )


def check_pairs(
    predicted: Sequence[Tensor], reference: Sequence[Tensor], labels: Sequence[str]
) -> None:
    """Raise ValueError unless there is a true crop of the same size, and a label, for each crop."""
    if not len(predicted) == len(reference) == len(labels) > 0:
        raise ValueError(
            f"{len(predicted)} crops, {len(reference)} true ones and {len(labels)} labels; the "
            "text loss needs as many of each, and one at least"
        )
    for crop, true in zip(predicted, reference, strict=True):
        if crop.shape != true.shape:
            raise ValueError(f"a crop is {tuple(crop.shape)}, its true one {tuple(true.shape)}")


def check_labels(labels: Sequence[str], signs: str) -> None:
    """Raise UserError for labels that are empty or have signs that may not be read."""
    for label in labels:
        if not label:
            raise UserError("a label is empty; the text loss needs at least one sign in each")
        if set(label) - set(signs):
            raise UserError(
                f"the label {label!r} has signs that are not among {signs!r}; readers choose "
                "among those of all labels"
            )


def mean_over(values: Tensor, frames: Tensor) -> Tensor:
    """Means (N,) of the first `frames` (N,) of `values` (N, T): the rest pads a wider neighbour."""
    frames = frames.to(values.device)
    own = torch.arange(values.shape[1], device=values.device) < frames[:, None]
    return (values * own).sum(1) / frames


def spelling(
    reader: Reader, reading: Reading, labels: Sequence[str], signs: str, frames: Tensor
) -> Tensor:
    """CTC (N,) of `labels`, nats per frame, over the blank and `signs` (Graves et al. 2006).

    Leaving the other classes out is the same as giving them no probability. A label that needs more
    than its `frames` (N,) costs 0.
    """
    classes = restrict(reader, signs).nonzero()[:, 0]
    log_probs = reading.logits[..., classes].log_softmax(2).transpose(0, 1)
    ids = torch.tensor([number for label in labels for number in class_ids(reader, label)])
    targets = torch.searchsorted(classes, ids.to(classes.device))
    lengths = torch.tensor([len(label) for label in labels])
    nats = F.ctc_loss(
        log_probs, targets, frames, lengths, blank=0, reduction="none", zero_infinity=True
    )
    return nats / frames.to(nats.device)


def combine(errors: TextErrors, weighting: TextWeighting) -> Tensor:
    """The loss of each crop (N,)."""
    parts = weighting.feature * errors.feature + weighting.ctc * errors.excess
    return weighting.scale * parts


def time_weights(schedule: NoiseSchedule, timesteps: Tensor, by_time: ByTime) -> Tensor:
    """What the text errors of x_0 predicted at `timesteps` (N,) count for, (N,) in [0, 1].

    "abar" is the signal's share, as in AnyText (Tuo et al. 2023); "minsnr" is min(snr, 5) / 5: the
    Min-SNR of errors of x_0, which text errors are whatever the network predicts.
    """
    abar = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    if by_time == "none":
        return torch.ones_like(abar)
    if by_time == "abar":
        return abar
    return (abar / (1 - abar)).clamp(max=GAMMA) / GAMMA
