"""UNets and ControlNets: what diffusers calls their tensors, and what Stable Diffusion did."""

from __future__ import annotations

import re
from collections.abc import Iterable

from controlfill.models.layout import Row

# The original numbers its blocks through all resolutions: `input_blocks.4.1` is the attention of
# the second resolution's first layer. Block 0 is the first convolution.
FIXED = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "class_embedding.linear_1.": "label_emb.0.0.",
    "class_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "controlnet_mid_block.": "middle_block_out.0.",
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
}
RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
# The convolution of a downsampler is a layer of its own name, of an upsampler one called `conv`.
BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
)
HINT = re.compile(r"controlnet_cond_embedding\.(blocks\.(\d+)|conv_out)\.")


class UnetNames:
    """The original names of a UNet's or ControlNet's modules; all of its `names` tell its depth."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        found = [m for name in names if (m := BLOCK.match(name))]
        places = {(m[1], int(m[2]), m[3], int(m[4])) for m in found}
        layers = [
            n for side, block, what, n in places if (side, block, what) == ("down", 0, "resnets")
        ]
        self.per_block = max(layers, default=1) + 2
        self.attended = {
            block for side, block, what, _ in places if (side, what) == ("up", "attentions")
        }
        hints = [int(m[2]) for name in names if (m := HINT.match(name)) and m[2]]
        self.hints = max(hints, default=-1) + 1

    def original(self, name: str) -> str | None:
        """The original name of the tensor or module `name`; None where it has none."""
        head, tail = self.head(name)
        if head is None:
            return None
        if ".resnets." not in name:
            return head + tail
        start = next((old for old in RESNET if tail.startswith(old)), None)
        return None if start is None else head + RESNET[start] + tail[len(start) :]

    def head(self, name: str) -> tuple[str | None, str]:
        """The original name of the block or layer that `name` stands in, and the rest of `name`."""
        for old, new in FIXED.items():
            if name.startswith(old):
                return new, name[len(old) :]
        if found := BLOCK.match(name):
            tail = name[found.end() :]
            down = found[3] == "downsamplers"
            return self._block(found), tail.removeprefix("conv.") if down else tail
        if found := HINT.match(name):
            # A sigmoid-weighted unit stands between each two convolutions.
            number = self.hints if found[2] is None else int(found[2])
            return f"input_hint_block.{2 * (number + 1)}.", name[found.end() :]
        if found := re.match(r"controlnet_down_blocks\.(\d+)\.", name):
            return f"zero_convs.{found[1]}.0.", name[found.end() :]
        return None, ""

    def _block(self, found: re.Match[str]) -> str:
        side, block, what, number = found[1], int(found[2]), found[3], int(found[4])
        if side == "down":
            first = 1 + block * self.per_block
            if what == "downsamplers":
                return f"input_blocks.{first + self.per_block - 1}.0.op."
            return f"input_blocks.{first + number}.{int(what == 'attentions')}."
        first = block * self.per_block
        if what == "upsamplers":
            return f"output_blocks.{first + self.per_block - 1}.{1 + (block in self.attended)}."
        return f"output_blocks.{first + number}.{int(what == 'attentions')}."


def unet_rows(names: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The rows of a UNet or ControlNet with these diffusers `names`, and names that have none."""
    names = list(names)
    table, rows, unknown = UnetNames(names), [], []
    for name in names:
        original = table.original(name)
        if original is None:
            unknown.append(name)
        else:
            rows.append(Row(name, original))
    return rows, unknown
