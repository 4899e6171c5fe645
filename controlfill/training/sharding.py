"""Weights split over processes: what a run must know of FSDP2 and of DeepSpeed's ZeRO.

A launcher may leave every process only a part of each weight (FSDP2, ZeRO-3) or of each moment of
the optimizer (these and ZeRO-2). Here parts become a whole, and a whole is cut into parts, so that
files hold whole tensors and a run may go on with another launcher than it began with. What makes a
whole is done by all processes together: a process that leaves it out lets the others wait for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from controlfill.errors import UserError
from controlfill.options import FinetuneOptions, Precision, RunOptions
from controlfill.training.checkpoint import flatten_optimizer, load_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ControlNetModel

Tensors = dict[str, Tensor]
FSDP, DEEPSPEED = "FSDP", "DEEPSPEED"
# FSDP2 puts the weights of one of these together at a time.
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")


# -- the launch


def settle(accelerator: Accelerator, options: RunOptions) -> None:
    """Make the launcher's settings agree with `options`. Raises UserError for what can't be had."""
    # The launcher's own number of accumulated passes must not stand against the option.
    accelerator.gradient_accumulation_steps = options.gradient_accumulation_steps
    kind = accelerator.distributed_type.value
    if kind == "MEGATRON_LM":
        raise UserError(
            "this engine does not train with MEGATRON_LM; launch it with FSDP (fsdp_version: 2), "
            "DEEPSPEED or MULTI_GPU, as configs/accelerate shows"
        )
    if kind in (FSDP, DEEPSPEED) and isinstance(options, FinetuneOptions):
        raise UserError(
            f"finetune does not split weights over processes ({kind}); launch it with plain "
            "MULTI_GPU, as configs/accelerate/multi_gpu.yaml does"
        )
    if kind in (FSDP, DEEPSPEED) and options.use_8bit_adam:
        raise UserError(
            f"--use_8bit_adam keeps moments in blocks that {kind} can't split; leave it out, or "
            "launch with MULTI_GPU"
        )
    if kind == FSDP:
        _settle_fsdp(cast(Any, accelerator.state).fsdp_plugin)
    if kind == DEEPSPEED:
        _settle_deepspeed(cast(Any, accelerator.state).deepspeed_plugin, options)


def _settle_fsdp(plugin: Any) -> None:
    """Refuse what would change names or places of weights; gradients are summed in fp32."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    wrong = {
        "fsdp_version: 1": ("fsdp_version: 2", plugin.fsdp_version != 2),
        "fsdp_activation_checkpointing: true": (
            "--gradient_checkpointing", plugin.activation_checkpointing,
        ),
        "fsdp_offload_params: true": (
            "fsdp_offload_params: false", isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        ),
        # It would wrap lists of modules too, which nothing calls.
        "fsdp_auto_wrap_policy: SIZE_BASED_WRAP": (
            "TRANSFORMER_BASED_WRAP", plugin.auto_wrap_policy is size_based_auto_wrap_policy,
        ),
    }  # fmt: skip
    for name, (right, there) in wrong.items():
        if there:
            raise UserError(f"the launch file says {name}, which does not work here; use {right}")
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )


def _settle_deepspeed(plugin: Any, options: RunOptions) -> None:
    """Accumulation and clipping are DeepSpeed's to do; the number format stays that of autocast."""
    from transformers.integrations import unset_hf_deepspeed_config

    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    devices = [(zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")]
    if zero["stage"] not in (2, 3) or any(device not in (None, "none") for device in devices):
        raise UserError(
            f"DeepSpeed is told of zero_stage {zero['stage']} and offloading to {devices}; this "
            "engine trains with zero_stage 2 or 3 and offload devices none"
        )
    if config.get("fp16", {}).get("enabled") is True:
        raise UserError("fp16 is not trained with DeepSpeed here; use --mixed_precision bf16 or no")
    # Else transformers would split the base's text encoder too, which no engine puts together.
    unset_hf_deepspeed_config()
    config["train_micro_batch_size_per_gpu"] = options.batch_size
    config["gradient_accumulation_steps"] = options.gradient_accumulation_steps
    config["gradient_clipping"] = options.max_grad_norm
    # Its own bf16 would keep no fp32 weights in the network; autocast does, as everywhere else.
    if config.get("bf16", {}).pop("enabled", False) is True:
        config["torch_autocast"] = {
            "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        }  # fmt: skip


def precision_of(accelerator: Accelerator) -> Precision:
    """The number format of a forward pass."""
    if accelerator.distributed_type.value == DEEPSPEED:
        config = cast(Any, accelerator.state).deepspeed_plugin.deepspeed_config
        return "bf16" if "torch_autocast" in config else "no"
    return cast(Precision, accelerator.mixed_precision)


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """A forward pass in that format; Accelerate leaves it to DeepSpeed, which knows no base."""
    if accelerator.distributed_type.value == DEEPSPEED and precision_of(accelerator) == "bf16":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return cast(Any, accelerator.autocast())


def wrap(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare` for both, which may split them; moments that are there come along."""
    if accelerator.distributed_type.value not in (FSDP, DEEPSPEED):
        return accelerator.prepare(network, optimizer)
    moments = flatten_optimizer(optimizer)
    optimizer.state.clear()
    there = {type(module).__name__ for module in network.modules()}
    cast(Any, network)._no_split_modules = [name for name in BLOCKS if name in there]
    wrapped, prepared = accelerator.prepare(network, optimizer)
    if moments:
        load_moments(optimizer, network, moments)
    return wrapped, prepared


# -- a parameter and its parts


def entire(tensor: Tensor) -> Tensor:
    """`tensor` itself, put together if it is split the way FSDP2 does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(parameter: Tensor) -> Tensor:
    """What this process keeps of `parameter`: all of it where nothing is split."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def whole(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor like `parameter` of which every process gives its `part`."""
    if isinstance(parameter, DTensor):
        mesh, places = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(part, mesh, places, shape=shape, stride=stride).full_tensor()
    if not hasattr(parameter, "ds_tensor"):
        return part
    # ZeRO-3 cuts the flat tensor into equal parts and fills the last one up.
    zero = cast(Any, parameter)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: zero.ds_numel].view(zero.ds_shape)


def cut(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole `tensor` that this process keeps of one like `parameter`."""
    if isinstance(parameter, DTensor):
        return _distribute(tensor, parameter).to_local()
    if not hasattr(parameter, "ds_tensor"):
        return tensor
    size = part_of(parameter).numel()
    filled = tensor.new_zeros(size * dist.get_world_size())
    filled[: tensor.numel()] = tensor.flatten()
    return filled[size * dist.get_rank() :][:size]


def _distribute(tensor: Tensor, parameter: DTensor) -> DTensor:
    placed = tensor.to(parameter.device)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements)


# -- a network and its optimizer


def learning(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of `network` that learn, and their names."""
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def is_split(network: nn.Module) -> bool:
    """Whether this process has only parts of the weights, so that it can predict nothing alone."""
    return any(part_of(p) is not p for p in network.parameters())


def gather(network: nn.Module, parts: Mapping[str, Tensor] | None, keep: bool) -> Tensors:
    """Whole tensors by name, on the CPU: the weights, or what `parts` are parts of.

    Processes that don't `keep` them help and get nothing.
    """
    tensors: Tensors = {}
    for name, parameter in learning(network):
        part = part_of(parameter).detach() if parts is None else parts[name]
        tensor = whole(part, parameter)
        if keep:
            tensors[name] = tensor.cpu().contiguous()
    return tensors


def cut_all(tensors: Mapping[str, Tensor], network: nn.Module) -> Tensors:
    """The parts of whole `tensors` that this process keeps, by the names of the weights."""
    return {name: cut(tensors[name], p) for name, p in learning(network)}


def unsplit(network: nn.Module) -> ControlNetModel:
    """A network of the same kind that nothing has wrapped, without memory for its weights."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        return cast(Any, ControlNetModel).from_config(dict(cast(Any, network).config))


def whole_copy(
    network: nn.Module, parts: Mapping[str, Tensor] | None, device: torch.device, keep: bool
) -> nn.Module | None:
    """A network to look at, with whole weights of its own; None where it is not kept."""
    tensors = gather(network, parts, keep)
    if not keep:
        return None
    copy: Any = unsplit(network)
    copy.load_state_dict(tensors, assign=True)
    return copy.to(device).requires_grad_(False).eval()


def gather_moments(optimizer: torch.optim.Optimizer, network: nn.Module, keep: bool) -> Tensors:
    """What `flatten_optimizer` gives for an optimizer that no process shares with another."""
    parameters = list(network.parameters())
    if _is_zero(parameters[0]):
        return _gather_zero(optimizer, parameters, keep)
    tensors: Tensors = {}
    for key, value in flatten_optimizer(optimizer).items():
        tensor = entire(value)
        if keep:
            tensors[key] = tensor.cpu().contiguous()
    return tensors


def load_moments(
    optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizer of a wrapped `network` whole moments; it keeps its part of them."""
    parameters = list(network.parameters())
    if _is_zero(parameters[0]):
        _load_zero(optimizer, parameters, tensors)
        return
    placed = {}
    for key, tensor in tensors.items():
        parameter = parameters[int(key.partition(".")[0])]
        split = isinstance(parameter, DTensor) and tensor.shape == parameter.shape
        placed[key] = _distribute(tensor, cast(DTensor, parameter)) if split else tensor
    load_optimizer(optimizer, placed)


# -- ZeRO's optimizers, which keep one flat tensor for many parameters


def _is_zero(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")


def _gather_zero(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], keep: bool
) -> Tensors:
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        safe_get_full_optimizer_state,
    )

    state = next(iter(optimizer.state.values()))
    tensors: Tensors = {}
    for place, parameter in enumerate(parameters):
        for name, value in state.items():
            single = value.dim() == 0
            tensor = value if single else safe_get_full_optimizer_state(parameter, name)
            if keep:
                tensors[f"{place}.{name}"] = tensor.cpu().contiguous().clone()
    return tensors


def _load_zero(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        lazy_init_hp_params_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    names = [key.partition(".")[2] for key in tensors if key.startswith("0.")]
    third: Any = getattr(parameters[0], "_z3_optimizer", None)
    flats = third.fp32_partitioned_groups_flat if third else optimizer.param_groups[0]["params"]
    # The optimizer would make its state at its first step; here it has made steps already.
    for flat in flats:
        for name in names:
            first = tensors[f"0.{name}"]
            single = first.dim() == 0
            optimizer.state[flat][name] = first.to(flat) if single else torch.zeros_like(flat)
        if third is None:
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.state)
    for key, tensor in tensors.items():
        place, _, name = key.partition(".")
        parameter = parameters[int(place)]
        if tensor.dim() == 0:
            continue
        if third is None:
            safe_set_full_optimizer_state(parameter, tensor, name)
        else:
            safe_set_local_optimizer_state(parameter, cut(tensor, parameter), name)
