"""Sources: where samples come from. `open_source` finds the right one for what the user named."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np

from controlfill.data.coco import CocoSource
from controlfill.data.masks import make_recipe
from controlfill.data.sample import Preparation, Sample, Source
from controlfill.data.shards import ShardStream, is_shard_folder, names_shards
from controlfill.data.skin_world import SKIN_WORLDS, SkinSource
from controlfill.data.tables import HUB_PREFIX, TABLES, Columns, HubSource, TableSource, read_sizes
from controlfill.data.worlds import HELD_OUT, Picture, World, open_world
from controlfill.errors import UserError
from controlfill.images import SUFFIXES, as_mask, find_masks, find_pictures, open_image
from controlfill.options import DataOptions

WORLD_PREFIX = "world:"
WORLD_EPOCH = 1_000_000


class WorldSource:
    """Pictures of a procedural world from seed `first` on, drawn at `side` pixels."""

    has_hints = False

    def __init__(self, world: World, side: int, first: int = 0, count: int = WORLD_EPOCH) -> None:
        self.world, self.side, self.first, self.count = world, side, first, count

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int) -> Picture:
        """Picture number `index` with its truth."""
        return self.world.draw(self.first + index, (self.side, self.side))

    def __getitem__(self, index: int) -> Sample:
        picture = self.picture(index)
        return Sample(
            image=picture.image,
            prompt=picture.truth.caption,
            objects=lambda: [picture.object_mask],
            name=f"seed {self.first + index}",
        )

    def sizes(self) -> np.ndarray:
        """(N, 2) of height and width: all are squares of one side."""
        return np.full((self.count, 2), self.side, np.int32)


class FolderSource:
    """The pictures below a folder, captions in .txt files of the same name, masks in a folder."""

    has_hints = False

    def __init__(self, image_dir: Path, mask_dir: Path | None, at_least: int | None) -> None:
        self.image_dir, self.mask_dir, self.at_least = image_dir, mask_dir, at_least
        self.files = find_pictures(image_dir)
        if not self.files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise UserError(f"{image_dir} holds no pictures ({kinds})")
        self.masks = self._find_masks(mask_dir) if mask_dir else {}

    def _find_masks(self, mask_dir: Path) -> dict[Path, Path]:
        """The mask of each picture: the same relative name, any picture suffix."""
        masks = find_masks(self.files, self.image_dir, mask_dir)
        bare = [f.name for f, mask in masks.items() if mask is None]
        if bare:
            raise UserError(
                f"{len(bare)} of {len(masks)} pictures have no mask of the same name in "
                f"{mask_dir}, the first is {bare[0]}"
            )
        return {f: mask for f, mask in masks.items() if mask is not None}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        photo = open_image(file, None if self.masks else self.at_least)
        mask = as_mask(open_image(self.masks[file]), photo.size) if self.masks else None
        words = file.with_suffix(".txt")
        lines = words.read_text("utf-8", "replace").splitlines() if words.is_file() else []
        return Sample(
            image=photo.rgb,
            mask=mask,
            prompts=tuple(line.strip() for line in lines if line.strip()),
            name=str(file.relative_to(self.image_dir)),
        )

    def sizes(self) -> np.ndarray:
        """(N, 2) of height and width, read from the files' headers."""
        return read_sizes(iter(self.files))


class Subset:
    """The first `count` pictures of a source."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.missing: list[str] = getattr(source, "missing", [])
        self.has_hints: bool = getattr(source, "has_hints", False)
        self.signs: str = getattr(source, "signs", "")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.source[index]

    def sizes(self) -> np.ndarray | None:
        """(N, 2) of height and width; None where the source doesn't know."""
        sizes = getattr(self.source, "sizes", None)
        return None if sizes is None else sizes()[: self.count]


def open_source(where: str, options: DataOptions, *, held_out: bool = False) -> Source:
    """The source at `where`.

    `world:NAME`, a COCO folder (with an ann_file), a folder with a table, a plain folder of
    pictures, a Hugging Face dataset `hf:NAME`, or tar shards, which give a ShardStream. `held_out`
    gives a world's pictures for measuring instead of those for training. Raises UserError.
    """
    check_companions(where, options)
    source = _open(where, options, held_out)
    check_kind(where, options, source)
    most = options.max_train_samples
    if most is None or isinstance(source, ShardStream) or most >= len(source):
        return source
    if isinstance(source, WorldSource):
        return WorldSource(source.world, source.side, source.first, most)
    return Subset(source, most)


def _open(where: str, options: DataOptions, held_out: bool) -> Source:
    if where.startswith(WORLD_PREFIX):
        return _open_world(where.removeprefix(WORLD_PREFIX), options.image_size, held_out)
    if where.startswith(HUB_PREFIX):
        return HubSource(where, Columns.of(options), options.least_side)
    if Path(where).is_dir():
        return _open_folder(Path(where), options)
    if names_shards(where):
        return ShardStream(where, options)
    raise UserError(f"{where} is no folder; give a folder of pictures, or world:shapes")


def _open_world(name: str, side: int, held_out: bool) -> Source:
    """The world called `name`: of shapes, or of keyboard skins."""
    first = HELD_OUT if held_out else 0
    if name in SKIN_WORLDS:
        return SkinSource(SKIN_WORLDS[name], first, WORLD_EPOCH, held_out)
    return WorldSource(open_world(name), side, first)


def _open_folder(folder: Path, options: DataOptions) -> Source:
    """The source that a folder is, by what lies in it."""
    if options.ann_file:
        return CocoSource(folder, options.ann_file, options.captions_file, options.least_side)
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table:
        return TableSource(table, Columns.of(options), options.least_side)
    if is_shard_folder(folder):
        return ShardStream(str(folder), options)
    return FolderSource(folder, options.mask_dir, options.least_side)


def check_companions(where: str, options: DataOptions) -> None:
    """Raise UserError for data options that would have no effect together."""
    given = companions(options)
    if given and where.startswith(WORLD_PREFIX):
        raise UserError(f"--{given[0]} goes with a folder of pictures, not with {where}")
    if options.captions_file and not options.ann_file:
        raise UserError("--captions_file goes with --ann_file; plain folders have .txt captions")
    if options.ann_file and options.mask_dir:
        raise UserError("--mask_dir and --ann_file both say what to mask; give one of them")


def companions(options: DataOptions) -> list[str]:
    """The options given that only make sense beside a folder of pictures."""
    return [n for n in ("ann_file", "captions_file", "mask_dir") if getattr(options, n)]


def check_kind(where: str, options: DataOptions, source: Source) -> None:
    """Raise UserError for options that this kind of source would not look at."""
    given = companions(options)
    has_columns = isinstance(source, (TableSource, HubSource, ShardStream))
    if given and has_columns:
        raise UserError(f"--{given[0]} goes with a plain folder of pictures, which {where} is not")
    default = {f.name: f.default for f in fields(DataOptions) if f.name.endswith("_column")}
    named = [name for name, value in default.items() if getattr(options, name) != value]
    if named and not has_columns:
        raise UserError(f"--{named[0]} goes with tables, datasets and shards, not with {where}")


def make_preparation(options: DataOptions) -> Preparation:
    """The crop, flip and masks that `options` ask for."""
    return Preparation(
        side=options.image_size,
        recipe=make_recipe(options.mask_kinds, options.mask_area),
        crop=options.crop,
        random_flip=options.random_flip,
    )
