"""Files are read tensor by tensor, written whole, and what is broken or malicious is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlfill.errors import UserError
from controlfill.models import weights as module
from controlfill.models.weights import open_weights, write_weights

STATE = {
    "half": torch.arange(3).half(), "wide": torch.randn(2, 3), "none": torch.zeros(0, 4),
    "number": torch.tensor(7), "brain": torch.randn(5).bfloat16(), "flag": torch.tensor([True]),
    "tiny": torch.randn(4).to(torch.float8_e4m3fn),
}  # fmt: skip


def same(a, b):
    """Equal to the last bit, in the same number format."""
    bits = [tensor.flatten().view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def shapes_of(state):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "old.ckpt", "pth"])
def test_every_kind_of_file_gives_the_same_tensors(suffix, tmp_path):
    file, new = tmp_path / f"x.{suffix}", suffix != "old.ckpt"
    # The old format has no numbers of 8 bits.
    state = STATE if new else {k: v for k, v in STATE.items() if k != "tiny"}
    if suffix == "safetensors":
        save_file(state, file, {"a": "b"})
    elif suffix == "pth":
        torch.save(state, file)
    else:
        whole = {"state_dict": state, "epoch": 3}
        torch.save(whole, file, _use_new_zipfile_serialization=new)
    with open_weights(file) as read:
        assert set(read.names) == set(state)
        assert "wide" in read
        assert "epoch" not in read
        assert read.metadata == ({"a": "b"} if suffix == "safetensors" else {})
        for name, tensor in state.items():
            assert (read.dtype(name), read.shape(name)) == (tensor.dtype, tuple(tensor.shape))
            assert same(read[name], tensor)


def test_written_files_are_what_the_library_reads(tmp_path):
    file = tmp_path / "new" / "x.safetensors"
    write_weights(file, shapes_of(STATE), reversed(STATE.items()), {"recipe": "a"})
    read = load_file(file)
    assert read.keys() == STATE.keys()
    assert all(same(read[name], tensor) for name, tensor in STATE.items())
    assert open_weights(file).metadata == {"format": "pt", "recipe": "a"}


@pytest.mark.parametrize("given", [["a"], ["a", "b", "b"], ["a", "b", "c"], ["a", "wrong"]])
def test_files_are_written_whole_or_not_at_all(given, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_text("before")
    promised = {name: (torch.float32, (2,)) for name in "ab"}
    tensors = ((n[:1] if n != "wrong" else "b", torch.zeros(2 + (n == "wrong"))) for n in given)
    with pytest.raises(ValueError, match=r"promised"):
        write_weights(file, promised, tensors, {})
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_as_bytes", fail)
    with pytest.raises(UserError, match="the disk is full"):
        write_weights(
            tmp_path / "x.safetensors", {"a": (torch.float32, (1,))}, [("a", torch.zeros(1))], {}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model", "adapter_model"])
@pytest.mark.parametrize("kind", ["plain", "fp16", "shards", "fp16 shards", "bin"])
def test_folders_of_one_network(stem, kind, tmp_path):
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    (tmp_path / "config.json").write_text("{}")
    if "shards" in kind:
        for n, (name, tensor) in enumerate(state.items()):
            save_file({name: tensor}, tmp_path / f"{n}.safetensors")
        index = f"{stem}.safetensors.index.{'fp16.json' if 'fp16' in kind else 'json'}"
        where = {"weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}
        (tmp_path / index).write_text(json.dumps(where))
    elif kind == "bin":
        torch.save(state, tmp_path / f"{stem}.bin")
    else:
        save_file(state, tmp_path / f"{stem}{'.fp16' if kind == 'fp16' else ''}.safetensors")
    with open_weights(tmp_path) as read:
        assert read.names == ("a", "b")
        assert torch.equal(read["a"], state["a"])
        assert (read.shape("b"), read.dtype("b")) == ((3,), torch.float32)


def test_what_is_missing_or_unknown_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="it holds no weights"):
        open_weights(tmp_path)
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="it holds a.safetensors, b.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "x.onnx").write_text("")
    with pytest.raises(UserError, match="is no weights file; .safetensors"):
        open_weights(tmp_path / "x.onnx")
    index = tmp_path / "model.safetensors.index.json"
    for text, words in [
        ('{"weight_map": {"a": "c.safetensors"}}', "c.safetensors is missing, a shard"),
        ('{"weight_map": {"a": "../c.safetensors"}}', "is missing, a shard"),
        ('{"weight_map": {"b": "a.safetensors"}}', "a.safetensors lacks b, which"),
        ('{"weight_map": {"a": ["a.safetensors"]}}', "a lies in .*, no file"),
        ('{"weight_map": {"a": "a.safetensors", "b": 1}}', "b lies in 1, no file"),
        ("{}", "is no index of shards"),
        ("{", "is not readable JSON"),
    ]:
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            open_weights(index)


def test_broken_files_are_one_line(tmp_path):
    save_file({"a": torch.randn(100)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for data in (whole[:-10], whole[:20], b"", whole + b"more", b"\xff" * 50):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="is a broken safetensors file") as caught:
            open_weights(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)
    torch.save({"a": torch.randn(1000)}, tmp_path / "x.ckpt")
    cut = (tmp_path / "x.ckpt").read_bytes()[:-2000]
    for data in (cut, b"", b"text"):
        (tmp_path / "x.ckpt").write_bytes(data)
        with pytest.raises(UserError, match="is no state dict of plain tensors"):
            open_weights(tmp_path / "x.ckpt")


def test_number_formats_that_are_unknown_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(UserError, match="a has the number format U16; known here are: F64"):
        open_weights(file)


class Bomb:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.pt", "x.bin"])
@pytest.mark.parametrize("old", [False, True])
def test_pickles_with_code_are_refused_and_run_nothing(name, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in [
        (Path.touch, (Path("exploded"),)),
        (eval, ("open('exploded', 'w')",)),
        (getattr(__import__("os"), "system"), ("touch exploded",)),  # noqa: B009
    ]:
        torch.save(
            {"state_dict": {"a": torch.ones(1), "b": Bomb(call)}}, name,
            _use_new_zipfile_serialization=not old,
        )  # fmt: skip
        with pytest.raises(UserError, match="is no state dict of plain tensors"):
            open_weights(Path(name))
        Path(name).write_bytes(pickle.dumps({"a": Bomb(call)}))
        with pytest.raises(UserError, match="is no state dict of plain tensors"):
            open_weights(Path(name))
    assert not Path("exploded").exists()


def test_what_the_released_checkpoints_hold_beside_tensors_is_passed_over(tmp_path, monkeypatch):
    import sys
    import types

    import numpy as np

    fake = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    fake.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": fake.__name__})
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    best = {fake.ModelCheckpoint: {"best": np.float64(0.5)}, "one": fake.ModelCheckpoint()}
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": best}, tmp_path / "x.ckpt")
    assert open_weights(tmp_path / "x.ckpt").names == ("a",)


def test_mapped_files_are_mapped_anew_before_they_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAPPED_BYTES", 100)
    state = {str(n): torch.full((20,), float(n)) for n in range(6)}
    torch.save(state, tmp_path / "x.ckpt")
    times = []
    plain = module.unpickle
    monkeypatch.setattr(module, "unpickle", lambda f: times.append(f) or plain(f))
    read = open_weights(tmp_path / "x.ckpt")
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert len(times) == 3
