"""COCO as downloaded: annotation files become a compact index of arrays, shared by all workers.

The index is built once by a typed reader (about a second for the full instances file, where json
takes 13 s and 2.6 GB) and kept as .npy files that are opened as memory maps.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from controlfill.data.sample import Sample
from controlfill.errors import UserError
from controlfill.files import write_folder
from controlfill.images import open_image

VERSION = 1


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"")
    caption: str | None = None


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation] = []


@dataclass(frozen=True, kw_only=True)
class Index:
    """An annotation file as arrays: image i has the texts `bounds[i]` to `bounds[i + 1]`.

    A text is a segmentation (raw JSON) or a caption; text k is `text[offsets[k]:offsets[k + 1]]`.
    """

    ids: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    bounds: np.ndarray
    offsets: np.ndarray
    text: np.ndarray

    def texts(self, image: int) -> list[bytes]:
        """The texts of image number `image`."""
        first, last = self.bounds[image], self.bounds[image + 1]
        edges = self.offsets[first : last + 1]
        return [self.text[a:b].tobytes() for a, b in pairwise(edges)]

    def name(self, image: int) -> str:
        """The file name of image number `image`."""
        return bytes(self.names[image]).decode()


def open_index(file: Path) -> Index:
    """The index of an annotation file, built when it is new and kept in the user's cache."""
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; give the COCO annotation file, for example "
            "annotations/instances_train2017.json"
        )
    folder = cache_folder(file)
    if not folder.is_dir():
        index = build_index(file)
        try:
            with write_folder(folder) as temporary:
                for part in fields(Index):
                    np.save(temporary / f"{part.name}.npy", getattr(index, part.name))
        except (OSError, UserError):
            # A cache that can't be written costs a second at each start, nothing else.
            return index
    try:
        return Index(**{f.name: _map(folder / f"{f.name}.npy") for f in fields(Index)})
    except (OSError, ValueError):
        # Another process may be putting the same index there at this moment.
        return build_index(file)


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def cache_folder(file: Path) -> Path:
    """Where the index of `file` is kept; another size, time or place is another folder."""
    root = os.environ.get("CONTROLFILL_CACHE") or Path.home() / ".cache" / "controlfill"
    state = file.stat()
    key = f"{VERSION} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    return Path(root) / "coco" / hashlib.sha256(key.encode()).hexdigest()[:24]


def build_index(file: Path) -> Index:
    """Read an annotation file (instances or captions). Raises UserError when it is neither."""
    try:
        content = msgspec.json.decode(map_bytes(file), type=_File)
    except msgspec.MsgspecError as error:
        raise UserError(f"{file} is no COCO annotation file: {error}") from error
    found = content.annotations
    ids = np.array([image.id for image in content.images], np.int64)
    owners = find_places(ids, np.fromiter((a.image_id for a in found), np.int64, len(found)))
    order = np.argsort(owners, kind="stable")
    order = order[np.searchsorted(owners[order], 0) :]
    owners, known = owners[order], (found[i] for i in order.tolist())
    # Raw text is joined as it is: a memory view of each would take longer than all the rest.
    texts: list[Any] = [a.caption.encode() if a.caption else a.segmentation for a in known]
    return Index(
        ids=ids,
        sizes=np.array([(i.height, i.width) for i in content.images], np.int32).reshape(-1, 2),
        names=np.array([image.file_name.encode() for image in content.images], np.bytes_),
        bounds=np.searchsorted(owners, np.arange(len(content.images) + 1)),
        offsets=np.cumsum([0, *map(len, texts)], dtype=np.int64),
        text=np.frombuffer(b"".join(texts), np.uint8),
    )


def find_places(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` is in `ids`; -1 for those that are not."""
    if not len(ids):
        return np.full(len(wanted), -1)
    turn = np.argsort(ids, kind="stable")
    places = turn[np.searchsorted(ids, wanted, sorter=turn).clip(max=len(ids) - 1)]
    return np.where(ids[places] == wanted, places, -1)


def map_bytes(file: Path) -> bytes | mmap.mmap:
    """The bytes of a file as a memory map: the system takes them back when memory is short."""
    if not file.stat().st_size:
        return b""
    with file.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def draw_segmentation(raw: bytes, height: int, width: int) -> np.ndarray:
    """A segmentation (polygons, or RLE as lists or as text) as a mask uint8 (H, W).

    What annotation tools leave behind that encloses nothing is an empty mask.
    """
    try:
        return _draw(msgspec.json.decode(raw), height, width)
    except Exception:  # the decoder raises anything, bare Exception too, for damaged codes
        return np.zeros((height, width), np.uint8)


def _draw(shape: Any, height: int, width: int) -> np.ndarray:
    if isinstance(shape, dict):
        packed = isinstance(shape["counts"], str)
        unpacked: Any = coco_mask.frPyObjects
        codes: Any = shape if packed else unpacked(shape, height, width)
    elif shape := [polygon for polygon in shape or [] if len(polygon) >= 6]:
        codes = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    else:
        return np.zeros((height, width), np.uint8)
    return np.ascontiguousarray(coco_mask.decode(codes)) * np.uint8(255)


class CocoSource:
    """The pictures of a COCO folder, with objects from instances and prompts from captions.

    `missing` names the annotated pictures that are not in the folder; they are left out.
    """

    has_hints = False

    def __init__(
        self, image_dir: Path, ann_file: Path, captions_file: Path | None, at_least: int | None
    ) -> None:
        self.image_dir, self.at_least = image_dir, at_least
        self.index = open_index(ann_file)
        self.captions = open_index(captions_file) if captions_file else None
        there = {entry.name for entry in os.scandir(image_dir)}
        names = [self.index.name(i) for i in range(len(self.index.ids))]
        self.kept = np.array([i for i, name in enumerate(names) if name in there], np.int64)
        self.missing = [name for name in names if name not in there]
        if not len(self.kept):
            raise UserError(
                f"none of the {len(names)} pictures that {ann_file} names is in {image_dir}"
            )
        self.caption_place = (
            {int(id_): i for i, id_ in enumerate(self.captions.ids)} if self.captions else {}
        )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        image = int(self.kept[index])
        name = self.index.name(image)
        photo = open_image(self.image_dir / name, self.at_least)

        def objects() -> Sequence[np.ndarray]:
            height, width = (int(side) for side in self.index.sizes[image])
            return [draw_segmentation(raw, height, width) for raw in self.index.texts(image)]

        return Sample(image=photo.rgb, prompts=self._captions(image), objects=objects, name=name)

    def sizes(self) -> np.ndarray:
        """(N, 2) of height and width, as annotated."""
        return np.asarray(self.index.sizes[self.kept])

    def _captions(self, image: int) -> tuple[str, ...]:
        place = self.caption_place.get(int(self.index.ids[image]))
        if self.captions is None or place is None:
            return ()
        texts = (text.decode().strip() for text in self.captions.texts(place))
        return tuple(text for text in texts if text)
