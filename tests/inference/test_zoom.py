"""A zoom is a film of pictures that hold each other, without a visible frame."""

import sys

import numpy as np
import pytest

from controlfill import cli
from controlfill.images import open_image, save_image
from controlfill.inference.zoom import frame_at, inner_size
from controlfill.options import ZoomOptions


def keys(factor, size=(60, 80), count=3):
    """Key pictures of a smooth landscape, each holding the one before in its middle."""
    from controlfill.images import resize

    rng = np.random.default_rng(0)
    made = [resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), size)]
    for _ in range(count - 1):
        outer = resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), size)
        height, width = inner_size(size, factor)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        outer[top : top + height, left : left + width] = resize(made[-1], (height, width))
        made.append(outer)
    return made


@pytest.mark.parametrize("factor", [1.25, 2.0, 3.3])
def test_whole_numbers_show_the_keys(factor):
    pictures = keys(factor)
    for number, picture in enumerate(pictures):
        frame = frame_at(pictures, float(number), factor).astype(int)
        # As soft as every other frame, or the film would flicker; but in its place.
        assert np.abs(frame - picture).mean() < 1.5
        assert frame.shape == picture.shape


def test_between_them_no_frame_is_seen():
    """Where the inner picture ends, neighbours differ no more than elsewhere."""
    pictures = keys(2.0)
    flat = [np.full_like(pictures[0], 90), pictures[1].copy(), pictures[2]]
    height, width = inner_size((60, 80), 2.0)
    flat[1][15:45, 20:60] = 90
    for at in np.linspace(0.05, 0.95, 10):
        frame = frame_at(flat, float(at), 2.0).astype(int)
        share = np.array([height, width]) / (60, 80)
        half = (share / share ** (1 - at) * (60, 80) / 2).astype(int)
        # Both pictures show the same plain grey there, so nothing of the border may be left.
        inner = frame[30 - half[0] + 2 : 30 + half[0] - 2, 40 - half[1] + 2 : 40 + half[1] - 2]
        assert np.abs(inner - 90).max() <= 1


def test_motion_is_even():
    pictures = keys(2.0)
    a, b = (frame_at(pictures, at, 2.0).astype(int) for at in (0.999, 1.001))
    assert np.abs(a - b).mean() < 3


# imageio-ffmpeg leaves the pipes of its ended processes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_writes_a_film_and_its_pictures(pipe, photo, tmp_path, capsys, monkeypatch):
    import imageio_ffmpeg

    monkeypatch.setattr(cli, "load_pipeline", lambda options: pipe)
    save_image(tmp_path / "i.png", photo)
    argv = ["zoom", str(tmp_path / "i.png"), str(tmp_path / "o.mp4"), "--num_zooms", "2"]
    argv += ["--seconds_per_zoom", "0.5", "--fps", "10", "--num_inference_steps", "1"]
    argv += ["--output_dir", str(tmp_path / "keys"), "--zoom_factor", "1.5"]
    assert cli.run([*argv, "--zoom_in"]) == 0, capsys.readouterr().err
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "o.mp4"))
    about = next(reader)
    frames = [np.frombuffer(frame, np.uint8).reshape(44, 70, 3) for frame in reader]
    assert about["size"] == (70, 44)
    assert about["fps"] == 10
    assert len(frames) == 11
    last = open_image(tmp_path / "keys" / "zoom_02.png").rgb
    # It is played backwards; film is not exact.
    assert np.abs(frames[0].astype(int) - last).mean() < 12
    assert np.abs(frames[-1].astype(int) - photo[:44]).mean() < 12
    first = open_image(tmp_path / "keys" / "zoom_01.png").rgb
    height, width = inner_size((44, 70), 1.5)
    from controlfill.images import resize

    top, left = (44 - height) // 2, (70 - width) // 2
    small = resize(photo[:44], (height, width))
    assert (first[top : top + height, left : left + width] == small).all()
    assert not (first == last).all()


def test_mistakes_are_one_line(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_pipeline", lambda options: pipe)
    save_image(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8))
    assert cli.run(["zoom", str(tmp_path / "dot.png"), str(tmp_path / "o.mp4")]) == 2
    assert "too small for a video" in capsys.readouterr().err
    save_image(tmp_path / "two.png", np.zeros((2, 2, 3), np.uint8))
    assert cli.run(["zoom", str(tmp_path / "two.png"), str(tmp_path / "o.mp4")]) == 2
    assert "too small to be zoomed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert cli.run(["zoom", str(tmp_path / "two.png"), str(tmp_path / "o.mp4")]) == 2
    assert "controlfill[video]" in capsys.readouterr().err
    assert not (tmp_path / "o.mp4").exists()


def test_options_have_bounds(tmp_path, capsys):
    save_image(tmp_path / "i.png", np.zeros((8, 8, 3), np.uint8))
    argv = ["zoom", str(tmp_path / "i.png"), str(tmp_path / "o.mp4"), "--zoom_factor", "1"]
    assert cli.run(argv) == 2
    assert "--zoom_factor is 1.0; at least 1.01" in capsys.readouterr().err
    assert ZoomOptions(image=tmp_path, out=tmp_path).num_zooms == 4
