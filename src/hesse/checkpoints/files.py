"""Files of a model folder: membership, JSON, and new files that appear only when they are complete."""

import hashlib
import json
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hesse.errors import CheckpointError, reason

LARGEST_JSON = 1 << 28  # bytes: ten times the largest known index or tokenizer
READ_AT_ONCE = 1 << 22
DEEPEST_JSON = 64  # levels: transformers copies a config by recursion
# The hub's cache keeps large files that several models share under these names, directly below the cache.
SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        CheckpointError: the file is missing, too large, nested too deeply, or does not hold a JSON object.
    """
    try:
        if not path.is_file():  # reading a pipe or a device would never end
            raise FileNotFoundError
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(
                f"{path} has more than {LARGEST_JSON:,} bytes, which no such file needs: copy it again"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing: give the folder of a complete Hugging Face model") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number with thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: copy it again")
    if not _is_shallow(content):
        raise CheckpointError(f"{path} is nested more than {DEEPEST_JSON} levels deep: copy it again")
    return content


def _is_shallow(content: Any) -> bool:
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def is_plain_name(name: object) -> bool:
    """True if `name` is a plain file name, not a path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def belongs(path: Path, folder: Path) -> bool:
    """True if `path`, with links resolved, lies in the model folder `folder` or in the folder's entry of a hub cache.

    The cache keeps `models--owner--name/snapshots/<revision>/` as links to `models--owner--name/blobs/`, and files that
    several models share as links to `blobs/` in the cache's root.
    """
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    if home.parent.name != "snapshots" or not home.parent.parent.name.startswith("models--"):
        return False
    entry = home.parent.parent
    if target.is_relative_to(entry / "blobs"):
        return True
    shared = entry.parent / "blobs"
    return target.is_relative_to(shared) and SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix()) is not None


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """Yield a new file next to `path`; rename it to `path` at the end, or remove it after an error.

    The file has the permissions of a new file under the umask, even if the writer replaces it by a file of its own.
    Errors of the file system are not caught.
    """
    unfinished = name_beside(path, "unfinished")
    unfinished.touch(exist_ok=False)
    permissions = stat.S_IMODE(unfinished.stat().st_mode)
    try:
        yield unfinished
        unfinished.chmod(permissions)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def name_beside(path: Path, mark: str) -> Path:
    """Return an unguessable name in the folder of `path`, so that nobody can place a link there in a shared folder.

    Create the file or folder by a call that fails if the name exists. `tempfile` is not used, because its files are
    readable only by their owner, whatever the umask.
    """
    return path.absolute().parent / f".{path.name}.{mark}-{secrets.token_urlsafe(6)}"


def tensor_entries(path: Path) -> tuple[dict[str, Any], int]:
    """Read a safetensors header: return the type, shape and place of each tensor, and the offset of the data.

    The file must have been checked by the library, or written by it.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length
