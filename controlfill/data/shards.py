"""Tar shards in WebDataset's layout, streamed in a known order; the one door to webdataset.

The parts of a sample share a name: 00000007.jpg, 00000007.txt, 00000007.hint.png. webdataset opens
addresses, groups parts and writes tars; the order is ours, since a run that resumes must meet the
very samples that it would have met, which webdataset's own shuffling does not promise.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from controlfill.data.sample import Sample
from controlfill.data.tables import (
    EXTRA,
    Columns,
    fit_hint,
    join_words,
    open_named,
    split_words,
)
from controlfill.errors import UserError
from controlfill.files import read_json
from controlfill.images import SUFFIXES, as_mask
from controlfill.options import DataOptions

log = logging.getLogger(__name__)
INDEX = "index.json"
REMOTE = ("pipe:", "http://", "https://")
WILD = "{*?["
Decode = Callable[[], Sample]


def webdataset(part: str) -> Any:
    """A module of webdataset. Raises UserError when it is not installed."""
    try:
        return importlib.import_module(f"webdataset.{part}")
    except ImportError as error:
        raise UserError(f"tar shards need the package webdataset: {EXTRA}") from error


def names_shards(where: str) -> bool:
    """Whether `where` can only mean shards: an address, a .tar, or a pattern of them."""
    return where.startswith(REMOTE) or where.endswith(".tar") or any(sign in where for sign in WILD)


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder holds .tar files and no pictures or folders beside them."""
    there = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    others = any(e.is_dir() or Path(e.name).suffix.lower() in SUFFIXES for e in there)
    return not others and any(e.name.endswith(".tar") for e in there)


def expand(where: str) -> list[str]:
    """The files or addresses that `where` means, in order. Raises UserError where one is absent."""
    if where.startswith(REMOTE):
        return webdataset("shardlists").expand_urls(where)
    if Path(where).is_dir():
        return sorted(str(file) for file in Path(where).glob("[!.]*.tar"))
    # A list of names is told apart from a pattern by its braces: those say what must be there.
    named = webdataset("shardlists").expand_urls(where) if "{" in where else None
    files = named or sorted(glob.glob(where))
    absent = [file for file in files if not Path(file).is_file()]
    if absent or not files:
        raise UserError(
            f"{absent[0] if absent else where} does not exist; give a folder of .tar files, or a "
            "pattern such as 'shards/shard-{000000..000099}.tar'"
        )
    return files


class ShardStream:
    """Tar shards read from front to back, in an order that is a function of (seed, epoch) alone.

    Shards are permuted, then samples pass a shuffle buffer. Of local files only the headers are
    read for that, and a sample's bytes when it is decoded, so a buffer costs next to nothing;
    addresses (http:, pipe:) are streamed whole, and the buffer holds the bytes of its samples.

    `has_hints` says whether samples bring a conditioning picture, `length` how many there are
    (None for addresses), `missing` which shards end early.
    """

    def __init__(self, where: str, options: DataOptions) -> None:
        self.where, self.seed, self.buffer = where, options.seed, options.shuffle_buffer
        self.at_least, self.limit = options.least_side, options.max_train_samples
        self.is_remote = where.startswith(REMOTE)
        self.urls = expand(where)
        columns = Columns.of(options)
        kinds = sorted(suffix[1:] for suffix in SUFFIXES)
        self.caption = columns.caption
        self.keys = {
            "image": [*kinds, *_suffixes(columns.image, kinds)],
            "hint": [*_suffixes("hint", kinds), *_suffixes(columns.hint, kinds)],
            "mask": _suffixes("mask", kinds),
        }
        if self.is_remote and self.limit:
            raise UserError("--max_train_samples needs local shards; the lengths of these are open")
        self.index = {} if self.is_remote else _read_indexes(self.urls)

    @cached_property
    def counts(self) -> list[int]:
        """How many samples of each local shard are used: from index.json, else counted."""
        return self._count[0]

    @property
    def missing(self) -> list[str]:
        """Which shards end early, and why."""
        return [] if self.is_remote else self._count[1]

    @cached_property
    def _count(self) -> tuple[list[int], list[str]]:
        if len(self.index) < len(self.urls):
            log.info("counting the samples of %d shards", len(self.urls) - len(self.index))
        counts, broken, left = [], [], self.limit or float("inf")
        for url in self.urls:
            count, reason = self.index.get(url), None
            if not left:
                count = 0
            elif count is None:
                count, reason = self._count_shard(url)
            broken += [reason] if reason else []
            counts.append(int(min(count, left)))
            left -= counts[-1]
        if not sum(counts):
            reason = broken[0] if broken else "no picture (.jpg, .png, .webp) is in them"
            raise UserError(f"{self.where} holds no samples: {reason}")
        return counts, broken

    def _count_shard(self, url: str) -> tuple[int, str | None]:
        count = 0
        try:
            for _ in self._groups(url):
                count += 1
        except UserError as error:
            return count, f"{error}; its first {count} samples are used"
        return count, None

    @property
    def length(self) -> int | None:
        """Samples per epoch; None for addresses, which would have to be read for it."""
        return None if self.is_remote else sum(self.counts)

    def __len__(self) -> int:
        if self.is_remote:
            raise UserError(
                f"how many samples {self.where} holds is not known; say how long to train with "
                "--max_steps"
            )
        return sum(self.counts)

    @cached_property
    def has_hints(self) -> bool:
        """Whether samples bring a conditioning picture: so does the first one."""
        for url in self.urls:
            try:
                first = next(self._groups(url), None)
            except UserError:
                if self.is_remote:
                    raise
                continue
            if first is not None:
                return _key(first, self.keys["hint"]) is not None
        return False

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index` as stored, for a look at a few: its shard is read up to it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ends = np.cumsum(self.counts)
        shard = int(np.searchsorted(ends, index, side="right"))
        place = index - int(ends[shard]) + self.counts[shard]
        return next(itertools.islice(self._samples(shard), place, None))()

    def epoch(self, epoch: int) -> Iterator[tuple[int, Decode]]:
        """(number within the epoch, a function that decodes) for each sample of `epoch`, in order.

        The function raises UserError for a sample that can't be used.
        """
        rng = np.random.default_rng((self.seed, epoch))
        shards = rng.permutation(len(self.urls))
        samples = itertools.chain.from_iterable(self._samples(int(i)) for i in shards)
        return enumerate(shuffled(samples, self.buffer, rng))

    def _samples(self, shard: int) -> Iterator[Decode]:
        """The samples of one shard as stored; of a local one exactly as many as were counted."""
        groups = self._groups(self.urls[shard])
        if self.is_remote:
            yield from (partial(self._decode, group) for group in groups)
            return
        count, given = self.counts[shard], 0
        reason = f"{self.urls[shard]} has become shorter"
        try:
            # Never one group more than counted: what follows may be where the tar is broken.
            for group in itertools.islice(groups, count):
                yield partial(self._decode, group)
                given += 1
        except UserError as error:
            reason = str(error)
        for _ in range(count - given):
            yield partial(_refuse, reason)

    def _groups(self, url: str) -> Iterator[dict[str, Any]]:
        """The samples of a tar as their parts; names without a picture are no samples."""
        tools = webdataset("tariterators")
        members = _stream_members(url) if self.is_remote else _seek_members(url)
        try:
            for group in tools.group_by_keys(members):
                if _key(group, self.keys["image"]) is not None:
                    yield group
        except UserError:
            raise
        except Exception as error:  # tarfile, webdataset and pipes raise anything
            why = " ".join(str(error.args[0] if error.args else error).split())
            raise UserError(f"{url} can't be read to its end ({why})") from error

    def _decode(self, group: dict[str, Any]) -> Sample:
        name = f"{group['__url__'].rpartition('/')[2]}:{group['__key__']}"
        image, hint, mask = (_key(group, self.keys[part]) for part in ("image", "hint", "mask"))
        assert image, "groups without a picture are no samples"
        if self.has_hints and not hint:
            raise UserError(f"{name} has no conditioning picture, as the first sample has")
        photo = open_named(group[image](), None if mask else self.at_least, name)
        hole = given = None
        if mask:
            hole = as_mask(open_named(group[mask](), None, f"{name}.{mask}"), photo.size)
        if hint and self.has_hints:
            given = fit_hint(open_named(group[hint](), None, f"{name}.{hint}").rgb, photo.rgb, name)
        words = split_words(self._words(group, name))
        return Sample(image=photo.rgb, mask=hole, hint=given, name=name, **words)

    def _words(self, group: dict[str, Any], name: str) -> str:
        if "txt" in group:
            return join_words(group["txt"]().decode("utf-8", "replace").splitlines(), name)
        if "json" not in group:
            return ""
        try:
            told = json.loads(group["json"]())
        except ValueError as error:
            raise UserError(f"{name}.json is not JSON: {error}") from error
        return join_words(told.get(self.caption) if isinstance(told, dict) else None, name)


def _suffixes(name: str, kinds: Sequence[str]) -> list[str]:
    return [f"{name.lower()}.{kind}" for kind in kinds]


def _key(group: dict[str, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if key in group), None)


def _refuse(reason: str) -> Sample:
    raise UserError(reason)


def is_unchanged(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is as long as its line of the index says."""
    file = folder / shard["name"]
    return file.is_file() and file.stat().st_size == shard["bytes"]


def _read_indexes(files: Sequence[str]) -> dict[str, int]:
    """The number of samples of each file that an index.json beside it tells of."""
    counts: dict[Path, int] = {}
    wanted = {Path(file) for file in files}
    for folder in {file.parent for file in wanted}:
        index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
        # Other tools write files of that name too; theirs say nothing that is needed.
        if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
            continue
        if not index.get("whole"):
            raise UserError(
                f"the shards in {folder} are not finished; run the command that writes them again"
            )
        for shard in index["shards"]:
            file = folder / shard["name"]
            if file in wanted and not is_unchanged(folder, shard):
                raise UserError(
                    f"{file} is not what {INDEX} says; write it again, or delete {folder / INDEX}"
                )
            counts[file] = shard["samples"]
    return {file: counts[Path(file)] for file in files if Path(file) in counts}


def _seek_members(file: str) -> Iterator[dict[str, Any]]:
    """The files in a local tar by their headers alone; `data` reads their bytes when called."""
    with tarfile.open(file, "r:") as opened:
        tar: Any = opened
        while (member := tar.next()) is not None:
            tar.members = []  # it would keep every header it has ever seen
            if member.isreg():
                data = partial(_read_part, file, member.offset_data, member.size)
                yield {"fname": member.name, "data": data, "__url__": file}
        # tarfile takes a damaged header for the end; the true end is a block of zeros, or none.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged after {tar.offset} bytes")


def _read_part(file: str, offset: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _stream_members(url: str) -> Iterator[dict[str, Any]]:
    """The files in the tar at an address, which is read from front to back."""
    stream = webdataset("gopen").gopen(url)
    try:
        for member in webdataset("tariterators").tar_file_iterator(stream):
            yield {**member, "data": partial(bytes, member["data"]), "__url__": url}
        # A transfer that failed may look like the end of the tar; the command's exit code tells.
        while stream.read(1 << 20):
            pass
        stream.wait_for_child()
    finally:
        # Whoever stops early breaks the pipe, and hears of it.
        with contextlib.suppress(OSError):
            stream.close()


def shuffled(samples: Iterable[Decode], size: int, rng: np.random.Generator) -> Iterator[Decode]:
    """`samples` through a buffer of `size`, each time giving one of them at random."""
    buffer: list[Decode] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = sample
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
