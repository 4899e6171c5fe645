"""Files that are written whole or not at all, and the header of safetensors files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlfill.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")


@contextmanager
def refuse_full_disk(path: Path) -> Iterator[None]:
    """Turn the many shapes of "the disk is full" into one UserError that names `path`."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in FULL
        if full or any(words in str(error) for words in FULL_WORDS):
            raise UserError(
                f"the disk is full: {path} could not be written ({error}); free some space and "
                "go on, nothing written before is lost"
            ) from error
        raise


def write_whole(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it, fsync, rename."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary file to fill; it becomes `path` only when the block ends well."""
    path = Path(path)
    with refuse_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _fsync(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes `path` only when the block ends well.

    What stood at `path` is replaced after the new folder is safely on disk. A process killed at any
    moment leaves either the old folder, the new one, or a name that starts with ".tmp-".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    try:
        with refuse_full_disk(path):
            yield temporary
            for file in sorted(temporary.rglob("*")):
                os.chmod(file, 0o755 if file.is_dir() else 0o644)
                _fsync(file)
            os.chmod(temporary, 0o755)
            _swap(temporary, path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_empty(folder: Path, what: str) -> None:
    """Raise UserError when `folder`, which `what` shall be written to, holds something already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new folder for the {what}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the {what}")


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path`, moving what stood there aside first."""
    old = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    if path.exists():
        os.replace(path, old / path.name)
    try:
        os.replace(new, path)
    except OSError:
        if (old / path.name).exists():
            os.replace(old / path.name, path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders that a killed process left in `folder`."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises UserError when it is missing or broken."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, read without loading a tensor.

    Raises UserError when the file is no safetensors file.
    """
    try:
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError("its header is longer than 100 MB")
            return json.loads(file.read(length)).get("__metadata__", {})
    except (OSError, ValueError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
