"""An ONNX graph as a frozen torch module with true gradients; it knows the ops of text readers.

Batch norms become scale and shift: on CPUs torch 2.13 gives their input a wrong gradient at batch
size 1 when it comes back transposed, and comparing outputs can't show that.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Attributes = dict[str, Any]
Constants = dict[str, Tensor | float]
# Later opsets pass axes as inputs; no reader uses them yet.
NEWEST_OPSET = 12


@dataclass(frozen=True, kw_only=True)
class Step:
    """One op: its inputs by name, its output, and the values nobody needs after it."""

    op: str
    attributes: Attributes
    inputs: tuple[str, ...]
    output: str
    last_use: tuple[str, ...] = ()

    def run(self, *inputs: Any) -> Tensor:
        """The op's output."""
        return OPS[self.op](self.attributes, *inputs)


class OnnxGraph(nn.Module):
    """The part of a graph of one input that makes the values named `outputs`.

    Floats are buffers and move with the module, without being saved with it. Whole numbers are
    sizes and axes: they stay on the CPU, since reading them must not wait for a device. Raises
    NotImplementedError that names an op it does not know.
    """

    def __init__(self, model: ModelProto, outputs: Sequence[str]) -> None:
        super().__init__()
        check_opset(model)
        constants, steps, names = fold(model)
        self.input = input_of(model)
        self.outputs = tuple(names.get(name, name) for name in outputs)
        steps = merge_affine(needed(steps, self.outputs), constants, self.outputs)
        self.steps = needed([with_numbers(step, constants) for step in steps], self.outputs)
        self.sizes: dict[str, Tensor | float] = {}
        self.weights: dict[str, str] = {}
        used = {name for step in self.steps for name in step.inputs}
        for number, name in enumerate(sorted(used & constants.keys())):
            self._keep(name, constants[name], f"weight_{number}")

    def _keep(self, name: str, value: Tensor | float, buffer: str) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            self.weights[name] = buffer
            self.register_buffer(buffer, value, persistent=False)
        else:
            self.sizes[name] = value

    def forward(self, x: Tensor) -> list[Tensor]:
        """The values of `outputs` for the input `x`."""
        values: dict[str, Any] = {self.input: x, "": None, **self.sizes}
        values.update((name, getattr(self, buffer)) for name, buffer in self.weights.items())
        for step in self.steps:
            values[step.output] = step.run(*(values[name] for name in step.inputs))
            for name in step.last_use:
                del values[name]
        return [values[name] for name in self.outputs]


def check_opset(model: ModelProto) -> None:
    """Raise NotImplementedError for opsets whose ops are called otherwise."""
    version = max(entry.version for entry in model.opset_import)
    if version > NEWEST_OPSET:
        raise NotImplementedError(f"ONNX opset {version}; opsets up to {NEWEST_OPSET} are known")


def input_of(model: ModelProto) -> str:
    """The name of the graph's only input."""
    weights = {entry.name for entry in model.graph.initializer}
    (name,) = (entry.name for entry in model.graph.input if entry.name not in weights)
    return name


def fold(model: ModelProto) -> tuple[Constants, list[Step], dict[str, str]]:
    """What is known beforehand, the steps that are left, and what copies are copies of."""
    constants: Constants = {entry.name: as_tensor(entry) for entry in model.graph.initializer}
    steps: list[Step] = []
    names: dict[str, str] = {}
    for node in model.graph.node:
        step = step_of(node, names)
        if step.op == "Identity":
            names[step.output] = step.inputs[0]
        elif all(name in constants or not name for name in step.inputs):
            constants[step.output] = step.run(*(constants.get(name) for name in step.inputs))
        else:
            steps.append(step)
    return constants, steps, names


def step_of(node: NodeProto, names: dict[str, str]) -> Step:
    """A node as a step; `names` says what its inputs are copies of. Raises NotImplementedError."""
    from onnx import helper

    (output,) = node.output
    if node.op_type not in OPS:
        raise NotImplementedError(f"the ONNX op {node.op_type} (for {output!r}) is not known")
    return Step(
        op=node.op_type,
        attributes={entry.name: helper.get_attribute_value(entry) for entry in node.attribute},
        inputs=tuple(names.get(name, name) for name in node.input),
        output=output,
    )


def as_tensor(entry: Any) -> Tensor:
    """A TensorProto as a tensor."""
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(entry).copy())


def needed(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    """The steps that `outputs` hang on, each knowing which values it is the last to use."""
    made = {step.output for step in steps}
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if step.output in wanted:
            last = tuple(name for name in dict.fromkeys(step.inputs) if name in made - wanted)
            wanted.update(step.inputs)
            kept.append(replace(step, last_use=last))
    return kept[::-1]


def merge_affine(steps: Sequence[Step], constants: Constants, outputs: Sequence[str]) -> list[Step]:
    """The steps with the scales and shifts that follow convolutions put into their weights."""
    uses = Counter([*outputs, *(name for step in steps for name in step.inputs)])
    kept: dict[str, Step] = {}
    for step in steps:
        found = affine_of(step, constants)
        conv = kept.get(found[0]) if found else None
        if found and conv and conv.op == "Conv" and uses[conv.output] == 1:
            del kept[conv.output]
            kept[step.output] = reweigh(conv, found[1:], step.output, constants)
        else:
            kept[step.output] = step
    return list(kept.values())


def affine_of(step: Step, constants: Constants) -> tuple[str, Tensor, Tensor] | None:
    """Input, scale and shift of an op that does nothing else to each channel, else None."""
    if step.op == "BatchNormalization":
        weights = [torch.as_tensor(constants[name]) for name in step.inputs[1:]]
        return step.inputs[0], *norm_of(step.attributes, *weights)
    known = [name for name in step.inputs if is_per_channel(constants.get(name))]
    if step.op not in ("Add", "Mul") or len(known) != 1:
        return None
    (x,) = (name for name in step.inputs if name != known[0])
    value = torch.as_tensor(constants[known[0]]).flatten()
    if step.op == "Mul":
        return x, value, torch.zeros_like(value)
    return x, torch.ones_like(value), value


def is_per_channel(value: Tensor | float | None) -> bool:
    """Whether a constant has one value, or one for each channel of (N, C, H, W)."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.numel() == 1 or (value.ndim >= 3 and value.shape[-3] == value.numel())


def reweigh(conv: Step, affine: tuple[Tensor, Tensor], output: str, constants: Constants) -> Step:
    """A convolution that scales and shifts too; its weights are added to `constants`."""
    weight, *bias = (torch.as_tensor(constants[name]).double() for name in conv.inputs[1:])
    scale, shift = (part.double().expand(len(weight)) for part in affine)
    moved = bias[0] * scale + shift if bias else shift
    names = f"{output}.weight", f"{output}.bias"
    values = weight * scale[:, None, None, None], moved
    constants.update((name, value.float()) for name, value in zip(names, values, strict=True))
    return replace(conv, inputs=(conv.inputs[0], *names), output=output)


def with_numbers(step: Step, constants: Constants) -> Step:
    """A pointwise step with plain numbers, added to `constants`, for tensors of one value.

    x ** 2.0 is a square, x ** tensor(2.0) a slow power.
    """
    names = list(step.inputs)
    for place, name in enumerate(step.inputs if step.op in POINTWISE else ()):
        value = constants.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape in ((), (1,)):
            names[place] = f"{name}.number"
            constants[names[place]] = value.item()
    return replace(step, inputs=tuple(names))


def norm_of(
    a: Attributes, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of (x - mean) / sqrt(variance + epsilon) * weight + bias."""
    scale = weight / (variance + a.get("epsilon", 1e-5)).sqrt()
    return scale, bias - mean * scale


def batch_norm(a: Attributes, x: Tensor, *weights: Tensor) -> Tensor:
    """A batch norm at rest, as scale and shift."""
    scale, shift = norm_of(a, *weights)
    return x * scale[:, None, None] + shift[:, None, None]


def margins(a: Attributes, x: Tensor) -> tuple[int, int, int, int]:
    """Rows and columns to be added: above, left, below, right."""
    if a.get("auto_pad") != b"SAME_UPPER":
        above, left, below, right = a.get("pads", (0, 0, 0, 0))
        return above, left, below, right
    sums = [
        max((ceil(size / stride) - 1) * stride + (kernel - 1) * gap + 1 - size, 0)
        for size, stride, kernel, gap in zip(
            x.shape[2:], a["strides"], a["kernel_shape"], a.get("dilations", (1, 1)), strict=True
        )
    ]
    return sums[0] // 2, sums[1] // 2, sums[0] - sums[0] // 2, sums[1] - sums[1] // 2


def conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution; uneven margins are added first."""
    above, left, below, right = margins(a, x)
    if (above, left) != (below, right):
        x = F.pad(x, (left, right, above, below))
        above = left = 0
    stride, gaps = a.get("strides", 1), a.get("dilations", 1)
    return F.conv2d(x, weight, bias, stride, (above, left), gaps, a.get("group", 1))


def max_pool(a: Attributes, x: Tensor) -> Tensor:
    """The largest value of each window."""
    above, left, below, right = margins(a, x)
    if above or left or below or right:
        x = F.pad(x, (left, right, above, below), value=-torch.inf)
    return F.max_pool2d(x, a["kernel_shape"], a["strides"])


def average_pool(a: Attributes, x: Tensor) -> Tensor:
    """The mean of each window."""
    return F.avg_pool2d(
        x, a["kernel_shape"], a["strides"], margins(a, x)[:2],
        count_include_pad=bool(a.get("count_include_pad", 0)),
    )  # fmt: skip


def clip(a: Attributes, x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Values cut at `low` and `high`."""
    return x.clamp(low, high)


def cut(
    a: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Slices along some axes."""
    along = range(len(starts)) if axes is None else axes.tolist()
    index = [slice(None)] * x.ndim
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for axis, *span in zip(along, starts.tolist(), ends.tolist(), strides, strict=True):
        index[axis] = slice(*span)
    return x[tuple(index)]


def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """The same values in another shape; 0 keeps a side."""
    return x.reshape([x.shape[i] if side == 0 else side for i, side in enumerate(shape.tolist())])


def unsqueeze(a: Attributes, x: Tensor) -> Tensor:
    """With sides of length 1 at `axes`."""
    for axis in sorted(a["axes"]):
        x = x.unsqueeze(axis)
    return x


def pointwise(function: Callable[[Any, Any], Any]) -> Callable[..., Tensor]:
    """A function of two values, tensors or numbers, as an op."""
    return lambda a, left, right: function(left, right)


POINTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Clip"}
# The numbers that ONNX gives the types sizes come in.
WHOLE = {6: torch.int32, 7: torch.int64}
OPS: dict[str, Callable[..., Tensor]] = {
    "Add": pointwise(operator.add),
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": lambda a, x: x.to(WHOLE[a["to"]]),
    "Clip": clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Constant": lambda a: as_tensor(a["value"]),
    "Conv": conv,
    "Div": pointwise(operator.truediv),
    "Erf": lambda a, x: x.erf(),
    "GlobalAveragePool": lambda a, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "Identity": lambda a, x: x,
    "MatMul": pointwise(operator.matmul),
    "MaxPool": max_pool,
    "Mul": pointwise(operator.mul),
    "Pow": pointwise(operator.pow),
    "ReduceMean": lambda a, x: x.mean(a["axes"], keepdim=bool(a.get("keepdims", 1))),
    "Relu": lambda a, x: x.relu(),
    "Reshape": reshape,
    "Shape": lambda a, x: torch.tensor(x.shape),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": cut,
    # Up to opset 12 it normalises all axes from the named one on.
    "Softmax": lambda a, x: x.flatten(a.get("axis", 1)).softmax(-1).view(x.shape),
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": lambda a, x: x.squeeze(tuple(a["axes"])),
    "Sub": pointwise(operator.sub),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": unsqueeze,
}
