"""Weights split over processes: the numbers, files and resumes of whole ones; what is refused."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import DistributedType
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, final_weights, finish, same_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from controlfill.diffusion.objective import step_rng
from controlfill.errors import UserError
from controlfill.options import TrainOptions
from controlfill.training.batches import Places, make_batches
from controlfill.training.checkpoint import OPTIMIZER, flatten_optimizer, load_optimizer
from controlfill.training.loop import make_accelerator, make_team
from controlfill.training.optim import Average, learning_rate, make_optimizer, set_learning_rate
from controlfill.training.run import prepare
from controlfill.training.sharding import settle

SCRIPT = ROOT / "tests" / "training" / "sharded.py"
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
WEIGHTS, EMA = "diffusion_pytorch_model.safetensors", "ema.safetensors"
no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def options_in(out):
    """The options of the launched script."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import sharded
    finally:
        sys.path.pop(0)
    return sharded.options_in(out)


def launch(kind, out, trainings):
    """Run the script on two processes by the launch file `kind`; they must not hang."""
    file = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
        "--num_processes", "2", "--num_cpu_threads_per_process", "1", "--mixed_precision", "no",
        "--main_process_port", "0", str(SCRIPT), str(out), json.dumps(trainings),
    ]  # fmt: skip
    there = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **there}, capture_output=True, text=True,
        timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(
    scope="module",
    params=[
        "fsdp2",
        pytest.param("deepspeed_zero2", marks=no_deepspeed),
        pytest.param("deepspeed_zero3", marks=no_deepspeed),
    ],
)
def launched(request, tmp_path_factory):
    """The launch file, and what it left: a run, a branch that goes on from its middle, and `alone`,
    begun by one process with whole weights."""
    out = tmp_path_factory.mktemp(request.param)
    finish(replace(options_in(out / "alone"), max_steps=1, save_steps=1, log_images_steps=0))
    trainings = [
        {}, {"resume_from_checkpoint": "controlnet_*/checkpoint-2"},
        {
            "resume_from_checkpoint": "alone/*/checkpoint-1", "max_steps": 2,
            "log_images_steps": 0,
        },
    ]  # fmt: skip
    launch(request.param, out, trainings)
    return request.param, out


def run_of(folder):
    """The first run in a folder."""
    return sorted(folder.glob("controlnet_inpainting_*"))[0]


def learn(options, ranks, start, stop, resume=None):
    """Weights, moments and averages after the steps that `ranks` processes would make, in one."""
    run = prepare(options, make_team(make_accelerator(options)))
    network, micro = run.network, options.gradient_accumulation_steps
    optimizer = make_optimizer(network, options)
    if resume is not None:
        network.load_state_dict(load_file(resume / WEIGHTS))
        load_optimizer(optimizer, load_file(resume / OPTIMIZER))
    average = Average(network, options.ema_decay)
    if resume is not None:
        average.load(load_file(resume / EMA))
    objective, places = run.objective(), range(start * micro, stop * micro)
    loaders = [
        iter(make_batches(run.data.learn, Places(run.data.order, rank, ranks).between(
            start * micro, stop * micro), run.spec, 0))
        for rank in range(ranks)
    ]  # fmt: skip
    for number in places:
        for rank, loader in enumerate(loaders):
            rng = step_rng(options.seed, rank, number)
            loss = objective(network, next(loader).to("cpu"), rng).mean()
            (loss / micro / ranks).backward()
        if (number + 1) % micro:
            continue
        nn.utils.clip_grad_norm_(network.parameters(), options.max_grad_norm)
        set_learning_rate(optimizer, learning_rate(number // micro, run.total, options))
        optimizer.step()
        optimizer.zero_grad()
        average.update(network, number // micro + 1)
    return network.state_dict(), flatten_optimizer(optimizer), average.weights


def far(ours, wanted):
    """The largest difference between two sets of tensors."""
    assert ours.keys() == wanted.keys()
    return max(float((ours[n] - wanted[n]).abs().max()) for n in ours)


def apart(ours, wanted, name):
    """The length of the difference of all moments `name`, as a share of theirs."""
    names = [n for n in wanted if n.endswith(name)]
    wrong = torch.stack([(ours[n] - wanted[n]).norm() for n in names]).norm()
    return float(wrong / torch.stack([wanted[n].norm() for n in names]).norm())


def check_learned(folder, learned):
    """A checkpoint holds what was learned."""
    weights, moments, averages = learned
    assert far(load_file(folder / WEIGHTS), weights) < 1e-6
    assert far(load_file(folder / EMA), averages) < 1e-6
    ours = load_file(folder / OPTIMIZER)
    assert ours.keys() == moments.keys()
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert apart(ours, moments, f".{name}") < 1e-3


def test_two_processes_with_parts_are_one_with_the_doubled_batch(launched, tmp_path):
    _, out = launched
    last = run_of(out) / "checkpoint-4"
    check_learned(last, learn(options_in(tmp_path), 2, 0, 4))
    before = load_file(run_of(out) / "checkpoint-2" / WEIGHTS)
    assert far(load_file(last / WEIGHTS), before) > 5e-6  # steps are larger than what is allowed
    final = load_file(run_of(out) / "final_model" / WEIGHTS)
    assert same_weights(final, load_file(last / EMA))


def test_a_process_keeps_a_part_and_all_agree_on_the_whole(launched):
    kind, out = launched
    ranks, kept = [], []
    for rank in range(2):
        with safe_open(out / f"0-rank-{rank}.safetensors", framework="pt") as file:
            kept.append(int(file.metadata()["kept"]))
        ranks.append(load_file(out / f"0-rank-{rank}.safetensors"))
    assert same_weights(*ranks)
    assert same_weights(ranks[0], load_file(run_of(out) / "checkpoint-4" / WEIGHTS))
    total = sum(w.numel() for w in ranks[0].values())
    # ZeRO-2 splits moments and gradients only.
    share = 1.0 if kind == "deepspeed_zero2" else 0.501
    assert all(share - 0.01 < k / total <= share for k in kept)


def test_panels_and_validation_are_there_and_nothing_waits_for_ever(launched):
    _, out = launched
    assert (run_of(out) / "logs" / "panels.png").is_file()
    assert json.loads((run_of(out) / "checkpoint-4" / "config.json").read_text())[
        "_class_name"
    ] == "ControlNetModel"  # fmt: skip
    assert (run_of(out) / "final_model" / "controlnet.safetensors").is_file()


def test_resumed_equals_uninterrupted_to_the_last_bit(launched):
    _, out = launched
    whole, branch = sorted(out.glob("controlnet_inpainting_*"))
    for name in (WEIGHTS, EMA, OPTIMIZER):
        folders = (whole / "checkpoint-4", branch / "checkpoint-4")
        assert same_weights(*(load_file(f / name) for f in folders))
    assert same_weights(*(load_file(run / "final_model" / WEIGHTS) for run in (whole, branch)))


def test_parts_go_on_from_what_was_whole(launched, tmp_path):
    _, out = launched
    options = replace(options_in(tmp_path), max_steps=2)
    resume = run_of(out / "alone") / "checkpoint-1"
    check_learned(run_of(out / "alone") / "checkpoint-2", learn(options, 2, 1, 2, resume))


def test_what_was_split_goes_on_whole(launched, tmp_path):
    _, out = launched
    shutil.copytree(run_of(out) / "checkpoint-2", tmp_path / "checkpoint-2")
    options = replace(options_in(tmp_path / "on"), max_steps=3, log_images_steps=0)
    finish(replace(options, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    _, _, averages = learn(options, 1, 2, 3, tmp_path / "checkpoint-2")
    assert same_weights(final_weights(tmp_path / "on"), averages)


# -- launch files and what is refused


def launch_arguments(file):
    """What `accelerate launch` makes of a file."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(file), "--main_process_port", "0", "x.py"])
    arguments.nondefault = {}
    arguments.deepspeed_fields_from_accelerate_config = ""
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_launch_file_is_read_and_begins_with_its_command(file):
    command = f"accelerate launch --config_file configs/accelerate/{file.name}"
    assert any(command in line for line in file.read_text().splitlines()[:2])
    config = load_config_from_file(str(file))
    arguments = launch_command_parser().parse_args(["x.py"])
    for name, value in {**config.fsdp_config, **config.deepspeed_config}.items():
        assert hasattr(arguments, name), f"{name}: {value} means nothing to accelerate launch"


def told(kind, **state):
    """An Accelerator of a `kind` of launch, as far as it is asked."""
    return Namespace(distributed_type=kind, state=Namespace(**state), gradient_accumulation_steps=1)


def plugin_of(file, monkeypatch):
    """What the launched processes would hold in hands, told by their environment."""
    arguments = launch_arguments(file)
    if arguments.use_fsdp:
        there, make = prepare_multi_gpu_env(arguments), FullyShardedDataParallelPlugin
    else:
        there, make = prepare_deepspeed_cmd_env(arguments)[1], DeepSpeedPlugin
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    return make()


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_the_launch_files_that_split_are_accepted(name, monkeypatch):
    options = TrainOptions(
        image_dir="x", batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.25
    )
    plugin = plugin_of(ROOT / "configs" / "accelerate" / f"{name}.yaml", monkeypatch)
    if name == "fsdp2":
        plugin.set_mixed_precision("bf16")
        accelerator = told(DistributedType.FSDP, fsdp_plugin=plugin)
        settle(accelerator, options)
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    else:
        plugin.set_mixed_precision("bf16")
        accelerator = told(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
        settle(accelerator, options)
        config = plugin.deepspeed_config
        assert config["zero_optimization"]["stage"] == int(name[-1])
        assert config["train_micro_batch_size_per_gpu"] == 3
        assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (5, 0.25)
        assert config["torch_autocast"]["dtype"] == "bfloat16"
        assert "enabled" not in config["bf16"]
    assert accelerator.gradient_accumulation_steps == 5


def fsdp(**changes):
    """A launch with FSDP2, but for `changes`."""
    changes = {"fsdp_version": 2, **changes}
    return told(DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin(**changes))


def deepspeed(**changes):
    """A launch with DeepSpeed's ZeRO-2, but for `changes`."""
    config = {"zero_optimization": {"stage": 2}, **changes}
    return told(DistributedType.DEEPSPEED, deepspeed_plugin=Namespace(deepspeed_config=config))


@pytest.mark.parametrize(
    ("make", "change", "words"),
    [
        (told, {"kind": DistributedType.MEGATRON_LM}, "does not train with MEGATRON_LM"),
        (fsdp, {"fsdp_version": 1, "mixed_precision_policy": None}, "fsdp_version: 1"),
        (fsdp, {"activation_checkpointing": True}, "use --gradient_checkpointing"),
        (fsdp, {"cpu_offload": True}, "use fsdp_offload_params: false"),
        (fsdp, {"auto_wrap_policy": "SIZE_BASED_WRAP"}, "use TRANSFORMER_BASED_WRAP"),
        (deepspeed, {"zero_optimization": {"stage": 1}}, "zero_stage 2 or 3"),
        (
            deepspeed, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload devices none",
        ),
        (deepspeed, {"fp16": {"enabled": True}}, "use --mixed_precision bf16 or no"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_can_not_be_had_is_one_line(make, change, words, recwarn):
    with pytest.raises(UserError, match=words) as caught:
        settle(make(**change), TrainOptions(image_dir="x"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [fsdp, deepspeed])
def test_moments_in_blocks_are_not_split(make):
    with pytest.raises(UserError, match="--use_8bit_adam keeps moments in blocks"):
        settle(make(), TrainOptions(image_dir="x", use_8bit_adam=True))
