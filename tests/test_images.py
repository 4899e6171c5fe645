"""Pictures of every kind open; masks are strict; known bytes survive pasting."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from controlfill import images
from controlfill.errors import UserError


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray(GREY.astype(np.int32)), GREY),
        (Image.fromarray(GREY).convert("P"), GREY),
        (Image.fromarray(GREY > 100).convert("1"), np.where(GREY > 100, 255, 0)),
    ],
    ids=["grey", "16-bit", "32-bit", "palette", "1-bit"],
)
def test_odd_modes_become_rgb(picture, expected):
    photo = images.open_image(encoded(picture, "TIFF"))
    assert photo.alpha is None
    np.testing.assert_array_equal(photo.rgb, np.repeat(expected[..., None], 3, axis=2))


def test_cmyk_and_float_open():
    cmyk = Image.fromarray(np.dstack([GREY] * 3)).convert("CMYK")
    assert (
        np.abs(images.open_image(encoded(cmyk, "TIFF")).rgb.astype(int) - GREY[..., None]).max() < 3
    )
    unit = Image.fromarray(GREY.astype(np.float32) / 255)
    np.testing.assert_array_equal(images.open_image(encoded(unit, "TIFF")).rgb[..., 0], GREY)


def test_alpha_is_kept_apart():
    rgba = np.dstack([GREY, GREY, GREY, 255 - GREY])
    photo = images.open_image(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(photo.rgb, rgba[..., :3])
    np.testing.assert_array_equal(photo.alpha, rgba[..., 3])


def test_exif_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    photo = images.open_image(encoded(Image.fromarray(GREY), "PNG", exif=exif))
    np.testing.assert_array_equal(photo.rgb[..., 0], np.rot90(GREY, -1))


def test_damaged_exif_is_no_reason_to_refuse_good_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker" * 20
    data = bytearray(encoded(Image.fromarray(np.dstack([GREY] * 3)), "JPEG", exif=exif))
    start = data.index(b"Exif")
    for place in range(start + 6, start + 60):
        for value in (0, 255):
            broken = bytes(data[:place]) + bytes([value]) + bytes(data[place + 1 :])
            assert sorted(images.open_image(broken).size) == [6, 8]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_equal_pillows_own(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(GREY), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        theirs = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(images.open_image(data).rgb[..., 0], theirs)


def test_masks_of_0_and_1_count():
    mask = images.as_mask((GREY > 100).astype(np.uint8), (6, 8))
    np.testing.assert_array_equal(mask, np.where(GREY > 100, 255, 0))


def test_names_that_are_no_utf8_travel_too(tmp_path):
    settings = {"image": "caf\udce9.png"}
    path = images.save_image(tmp_path / "x.png", GREY, settings=settings)
    assert images.read_settings(path) == settings


def test_large_jpegs_are_decoded_smaller_but_never_too_small():
    data = encoded(Image.new("RGB", (800, 600)), "JPEG")
    assert images.open_image(data).size == (600, 800)
    assert images.open_image(data, at_least=150).size == (150, 200)
    assert min(images.open_image(data, at_least=160).size) >= 160


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (33, 25), (17, 9), (1, 1)])
def test_the_fast_jpeg_decoder_equals_pillows(subsampling, progressive, size):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize(size)
    for quality in (30, 90):
        data = encoded(
            picture, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive
        )
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(images.open_image(data).rgb, np.asarray(opened))


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"just some text", "is not a picture"), (b"", "is not a picture")],
)
def test_what_is_no_picture_is_refused(data, words):
    with pytest.raises(UserError, match=words):
        images.open_image(data)


def test_truncated_jpeg_is_refused():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(UserError, match="broken picture"):
        images.open_image(data[: len(data) // 2])


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        images.open_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        images.open_image(tmp_path)


@pytest.mark.parametrize("kind", ["pil", "numpy", "float", "bool", "uint16", "tensor", "batch"])
def test_as_photo_takes_all_kinds(kind):
    rgb = np.dstack([GREY] * 3)
    given_ = {
        "pil": Image.fromarray(rgb),
        "numpy": rgb,
        "float": rgb / 255,
        "bool": GREY > 100,
        "uint16": GREY.astype(np.uint16) * 257,
        "tensor": torch.from_numpy(rgb).permute(2, 0, 1),
        "batch": torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255,
    }[kind]
    expected = np.where(rgb > 100, 255, 0) if kind == "bool" else rgb
    np.testing.assert_array_equal(images.as_photo(given_).rgb, expected)


def test_as_photo_refuses_the_rest():
    with pytest.raises(UserError, match="1, 3 or 4 channels"):
        images.as_photo(np.zeros((4, 4, 7), np.uint8))
    with pytest.raises(UserError, match="expected a path"):
        images.as_photo(object())


def test_masks_must_fit_and_hold_something_white():
    with pytest.raises(UserError, match="mask is 4x3 but the picture is 8x6"):
        images.as_mask(np.full((3, 4), 255, np.uint8), (6, 8))
    with pytest.raises(UserError, match="all black"):
        images.as_mask(np.zeros((6, 8), np.uint8), (6, 8))
    np.testing.assert_array_equal(images.as_mask(GREY > 0, (6, 8)), np.where(GREY > 0, 255, 0))


def test_settings_travel_in_the_png(tmp_path):
    settings = {"prompt": "ein Käfer 字", "seed": 3}
    path = images.save_image(tmp_path / "new" / "x.png", np.dstack([GREY] * 3), settings=settings)
    assert images.read_settings(path) == settings


def test_thin_strokes_survive_shrinking():
    mask = np.zeros((512, 512), np.uint8)
    mask[:, 101] = 255
    assert (images.resize_mask(mask, (64, 64))[:, 12] == 255).all()


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 16, 64]), st.integers(0, 2**31))
def test_padding_reaches_the_multiple_and_keeps_the_picture(height, width, multiple, seed):
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    padded = images.pad_to_multiple(image, multiple)
    assert padded.shape[0] % multiple == 0
    assert padded.shape[1] % multiple == 0
    assert padded.shape[0] - height < multiple
    np.testing.assert_array_equal(padded[:height, :width], image)


@given(st.integers(0, 12), st.integers(0, 2**31))
def test_paste_changes_no_byte_outside_the_feather(feather, seed):
    rng = np.random.default_rng(seed)
    known, new = rng.integers(0, 256, (2, 30, 40, 3)).astype(np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    mask[10:16, 12:25] = 255
    mixed = images.paste(known, new, mask, feather)
    near = np.zeros((30, 40), bool)
    near[max(0, 10 - feather) : 16 + feather, max(0, 12 - feather) : 25 + feather] = True
    np.testing.assert_array_equal(mixed[~near], known[~near])
    np.testing.assert_array_equal(mixed[mask > 0], new[mask > 0])
    if feather:
        weight = images.feather_weight(mask, feather)
        assert 0 < weight[9, 15] < 1
    else:
        np.testing.assert_array_equal(mixed[mask == 0], known[mask == 0])


def test_resize_shrinks_by_averaging_and_grows():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = images.resize(board.astype(np.uint8), (16, 16))
    assert np.abs(small.astype(int) - 127).max() <= 1
    assert images.resize(small, (40, 50)).shape == (40, 50)


def test_tensors_and_bytes_are_inverse():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(images.to_uint8(images.to_tensor(image)), image)
