"""Where results go: TensorBoard, wandb, the hub with its model card."""

import sys
import types
from dataclasses import replace

import pytest
from conftest import finish

from controlfill.errors import UserError
from controlfill.training import hub
from controlfill.training.optim import make_optimizer


class StandIn:
    """What the hub's client does, remembered."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, name, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", name, exist_ok))
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, folder_path, commit_message))


def test_the_model_goes_to_the_hub_with_its_card(small_run, monkeypatch):
    import huggingface_hub

    client = StandIn()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    finish(replace(small_run, push_to_hub=True, hub_model_id="filler", max_steps=1))
    (folder,) = small_run.output_dir.glob("*/final_model")
    assert client.calls == [
        ("create", "filler", True),
        ("upload", "me/filler", str(folder), "controlfill training"),
    ]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: embedded\n")
    assert "conditioning: `masked-image/1`" in card
    assert "pipe.inpaint(" in card
    assert folder.parent.name in card
    assert "{" not in card.replace("{}", "")


def test_a_refusal_of_the_hub_keeps_the_model(tmp_path):
    with pytest.raises(UserError, match="no token.*the model is in"):
        hub.push(tmp_path, "x", StandIn(ValueError("no token")))


def test_wandb_hears_curves_and_panels(small_run, monkeypatch):
    heard = []
    run = types.SimpleNamespace(log=heard.append, finish=lambda: heard.append("finished"))
    module = types.SimpleNamespace(init=lambda **about: heard.append(about) or run, Image=len)
    monkeypatch.setitem(sys.modules, "wandb", module)
    finish(replace(small_run, report_to="all", log_images_steps=4))
    about, *rest = heard
    assert about["id"].startswith("controlnet_inpainting_")
    assert about["config"]["batch_size"] == 2
    assert [r["step"] for r in rest if "train/loss" in r] == [2, 4]
    assert [r["step"] for r in rest if "panels" in r] == [4]
    assert heard[-1] == "finished"
    assert list(small_run.output_dir.glob("*/logs/events.*"))


def test_missing_extras_are_named(small_run, monkeypatch):
    for module in ("wandb", "bitsandbytes", "bitsandbytes.optim", "xformers"):
        monkeypatch.setitem(sys.modules, module, None)
    for change, words in (
        ({"report_to": "wandb"}, r"pip install 'controlfill\[wandb\]'"),
        ({"use_8bit_adam": True}, r"pip install 'controlfill\[bnb\]'"),
    ):
        with pytest.raises(UserError, match=words):
            finish(replace(small_run, **change))


def test_xformers_is_asked_for_by_its_extra(small_run):
    with pytest.raises(UserError, match=r"pip install 'controlfill\[xformers\]'"):
        finish(replace(small_run, enable_xformers_memory_efficient_attention=True))


def test_8_bit_adam_is_taken_from_bitsandbytes(small_run, monkeypatch):
    import torch

    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            made.append(options)
            super().__init__(parameters, **options)

    stand_in = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=stand_in))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    make_optimizer(torch.nn.Linear(2, 2), replace(small_run, use_8bit_adam=True))
    assert made == [{"lr": 1e-3, "weight_decay": 0.01}]
