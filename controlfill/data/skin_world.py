"""Procedural keyboard skins as training data: pictures, hints, captions and labels, all exact.

Seeds of training and of measuring draw themes of different words, so what is measured was not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from controlfill.data.geometry import Label
from controlfill.data.sample import Sample
from controlfill.skins.draw import edge_hint, glyph_hint, is_han, label_boxes
from controlfill.skins.layout import Layout, Size, open_layout
from controlfill.skins.themes import draw_font, draw_skin, draw_theme

# Height and width of the skins; training cuts them with --crop patch, or makes them smaller.
CANVAS: Size = (320, 512)


@dataclass(frozen=True, kw_only=True)
class SkinWorld:
    """Which keyboards a world shows, and whether the hint shows the labels that they carry.

    A share of the keyboards is `bare`: no labels, neither on the keys nor in the hint.
    """

    layouts: tuple[str, ...] = ("qwerty-26", "t9")
    glyphs: bool = True
    bare: float = 0.0


class SkinSource:
    """Skins of a world from seed `first` on."""

    has_hints = True

    def __init__(self, world: SkinWorld, first: int, count: int, held_out: bool = False) -> None:
        self.world, self.first, self.count, self.held_out = world, first, count, held_out
        self.layouts = [open_layout(name).at(CANVAS) for name in world.layouts]
        labels = (slot.label for layout in self.layouts for slot in layout.labelled)
        self.signs = "".join(sorted(set("".join(labels)))) if world.bare < 1 else ""
        # Latin fonts have no Chinese signs; then the system's own choice stands for all labels.
        self.one_font = any(map(is_han, self.signs))

    def __len__(self) -> int:
        return self.count

    def layout_of(self, index: int) -> Layout:
        """The keyboard of picture number `index`."""
        rng = np.random.default_rng((self.first + index, 3))
        return self.layouts[int(rng.integers(len(self.layouts)))]

    def __getitem__(self, index: int) -> Sample:
        seed, layout = self.first + index, self.layout_of(index)
        font = None if self.one_font else draw_font(seed)
        skin = draw_skin(draw_theme(seed, self.held_out), layout, font)
        bare = np.random.default_rng((seed, 4)).uniform() < self.world.bare
        labels = [] if bare else label_boxes(layout, font)
        glyphs = self.world.glyphs and not bare
        return Sample(
            image=skin.bare if bare else skin.image,
            hint=glyph_hint(layout, font) if glyphs else edge_hint(layout),
            prompt=skin.theme.caption,
            labels=tuple(Label(text=text, box=box) for text, box in labels),
            name=f"seed {seed}",
        )

    def sizes(self) -> np.ndarray:
        """(N, 2) of height and width: all have one size."""
        return np.tile(np.array(CANVAS, np.int32), (self.count, 1))


SKIN_WORLDS = {
    "skins": SkinWorld(),
    "skins-edges": SkinWorld(glyphs=False),
    "skins-bare": SkinWorld(bare=1.0),
    "skins-mixed": SkinWorld(bare=1 / 3),
    "skins-zh": SkinWorld(layouts=("t9-zh",)),
}
