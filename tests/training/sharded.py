"""Trains on CPUs what a launch file splits over GPUs, and writes what each process ended with.

accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 2 \
    tests/training/sharded.py OUT '[{}, {"resume_from_checkpoint": "*/checkpoint-2"}]'
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import save_file
from two import options_of

from controlfill.training import run as running
from controlfill.training.sharding import gather, part_of


def allow_cpus() -> None:
    """Let Accelerate split weights over processes without GPUs; all else is its own code.

    It would find no backend here, and turns FSDP on beside the backends of GPUs only.
    """
    init = AcceleratorState.__init__

    def with_gloo(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, backend="gloo", **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = with_gloo


def options_in(out: Path):
    """Small steps: large ones of Adam would blow the rounding of tiny gradients up."""
    return replace(
        options_of(out), learning_rate=1e-5, lr_warmup_steps=0, max_steps=4, log_images_steps=4
    )


def train(number: int, options) -> None:
    """Train, and write the whole weights that this process can see, and how much it keeps."""
    prepare, runs = running.prepare, []

    def keep(*arguments):
        runs.append(prepare(*arguments))
        return runs[0]

    running.prepare = keep
    losses = [float(step.loss) for step in running.train(options)]
    running.prepare = prepare
    network = runs[0].network
    kept = sum(part_of(p).numel() for p in network.parameters())
    about = {"losses": json.dumps(losses), "kept": str(kept)}
    weights = gather(network, None, keep=True)
    file = options.output_dir / f"{number}-rank-{os.environ['RANK']}.safetensors"
    save_file({name: w.clone() for name, w in weights.items()}, file, about)


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    allow_cpus()
    for number, changes in enumerate(json.loads(sys.argv[2])):
        resume = changes.pop("resume_from_checkpoint", None)
        found = str(next(out.glob(resume))) if resume else None
        train(number, replace(options_in(out), resume_from_checkpoint=found, **changes))


if __name__ == "__main__":
    main()
