"""Metrics equal their references, by region."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from controlfill.evaluation import metrics


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    mask = np.zeros((40, 50), np.uint8)
    mask[10:25, 5:40] = 255
    output = truth.copy()
    noise = rng.integers(-30, 30, truth.shape)
    output[mask > 0] = (truth + noise).clip(0, 255).astype(np.uint8)[mask > 0]
    return output, truth, mask


def test_psnr_and_ssim_equal_scikit_image(pair):
    output, truth, mask = pair
    figures = metrics.summarize([metrics.score(output, truth, mask)])
    hole = mask > 0
    assert figures["hole_psnr"] == pytest.approx(peak_signal_noise_ratio(truth[hole], output[hole]))
    assert figures["whole_psnr"] == pytest.approx(peak_signal_noise_ratio(truth, output))
    # scikit-image leaves a rim of 5 pixels out of its own mean; ours is over the whole picture.
    options = {"channel_axis": -1, "gaussian_weights": True, "use_sample_covariance": False}
    theirs, full = structural_similarity(truth, output, full=True, **options)
    assert figures["whole_ssim"] == pytest.approx(full.mean())
    assert figures["whole_ssim"] == pytest.approx(theirs, abs=0.03)
    assert figures["hole_ssim"] == pytest.approx(full[hole].mean())
    assert figures["known_max_error"] == 0


def test_pooling_and_the_mean_of_pictures(pair):
    output, truth, mask = pair
    bad, perfect = (metrics.score(o, truth, mask) for o in (output, truth))
    figures = metrics.summarize([bad, perfect])
    alone = metrics.summarize([bad])
    assert figures["hole_psnr"] == pytest.approx(alone["hole_psnr"] + 10 * np.log10(2))
    assert figures["hole_psnr_mean"] == pytest.approx((alone["hole_psnr"] + 60) / 2)
    assert metrics.summarize([perfect])["hole_psnr"] == float("inf")


def test_a_changed_known_byte_is_seen(pair):
    output, truth, mask = pair
    output[0, 0, 1] = (int(truth[0, 0, 1]) + 3) % 256
    error = abs(int(output[0, 0, 1]) - int(truth[0, 0, 1]))
    assert metrics.score(output, truth, mask).known_error == error


def test_the_seam_compares_steps_with_the_truths_own():
    truth = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (30, 1, 3))
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 10:20] = 255
    assert metrics.summarize([metrics.score(truth, truth, mask)])["seam"] == 1
    visible = truth.copy()
    visible[:, 10:20] += 50
    assert metrics.summarize([metrics.score(visible, truth, mask)])["seam"] > 40
    assert metrics.rim_steps(truth, mask > 0) == 30 * 2


def test_tiny_pictures_have_a_similarity_too():
    truth = np.zeros((4, 4, 3), np.uint8)
    assert metrics.ssim_map(truth, truth).mean() == 1
    assert metrics.ssim_map(truth + 1, truth).mean() == 0


def test_without_steps_in_the_truth_there_is_no_seam():
    plain = np.full((30, 30, 3), 9, np.uint8)
    mask = np.zeros((30, 30), np.uint8)
    mask[5:9, 5:9] = 255
    assert np.isnan(metrics.summarize([metrics.score(plain, plain, mask)])["seam"])
