"""Atomic writers of files and folders, file names from ids, digests, locks, and checks of a model's
folder.

Imports no torch, as codec/tokens.py, which depends on it.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EROFS
from functools import cache
from pathlib import Path
from types import TracebackType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from codec.program import one_line

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
MAX_NAME_BYTES = 200
"""Of a file name made from an id; file systems have 255, some of which temporary names need."""
DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
"""What reading a damaged file raises: its values have other types, sizes and names."""
MAX_DEPTH = 100
"""Of lists and dictionaries in JSON and YAML."""
MAX_NODES = 100_000
"""Values of a YAML file."""
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-\d+\.tmp(\.\w+)?")
"""A temporary name: digest of the machine's name, process, thread."""
MAX_TEMPORARY_SECONDS = 24 * 3600
"""A temporary file that was not modified for this long has no writer, on any machine."""


class WriteError(OSError):
    """A file or folder cannot be written, because the disk is full for instance."""


@contextmanager
def write_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of writers, most of which do not name the file, into `WriteError` with one line
    that names `path` and the reason. Others pass.

    Args:
        kinds: classes of errors, besides those that `is_write_failure` recognizes, by which a
            library reports a failed write.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)
        is_other = not isinstance(error, OSError | ValueError) and is_write_failure(error)
        if is_full or is_other or isinstance(error, kinds):
            raise WriteError(
                f"{path}: cannot be written ({write_reason(error, path)}); make room on the disk "
                "and start again"
            ) from error
        raise


def write_reason(error: Exception, path: Path) -> str:
    """Returns why `path` cannot be written, also where the library that wrote it reports an unknown
    error on a full disk."""
    number = error.errno if isinstance(error, OSError) else None
    text = getattr(error, "error_string", error)  # Of soundfile: without the temporary name.
    reason = os.strerror(number) if number else " ".join(str(text).split())[:200]
    existing = next(each for each in (path, *path.parents) if each.exists())
    full = os.strerror(ENOSPC)
    if shutil.disk_usage(existing).free < 2**16 and full not in reason:
        return f"{full}: {reason}"
    return reason


_swept: set[str] = set()
_sweeping = threading.Lock()


def temporary_name(path: Path, suffix: str = "") -> Path:
    """Returns a hidden temporary name in the folder of `path`, which must exist. The first call for
    a folder removes the temporary files there of processes that have ended (killed, for instance).

    Args:
        suffix: after ".tmp", for writers that derive the format from the name.
    """
    with _sweeping:  # Before this process has any there: all of its number are of earlier ones.
        folder = str(path.parent.resolve())
        if folder not in _swept:
            _remove_leftovers(path.parent)
            _swept.add(folder)
    writer = f"{_machine()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name.removesuffix(suffix)}.{writer}.tmp{suffix}")


def _remove_leftovers(folder: Path) -> None:
    for each in os.scandir(folder):
        found = TEMPORARY.fullmatch(each.name)
        if found is None:
            continue
        with suppress(OSError):  # Another process has removed it, or another user owns it.
            age = time.time() - each.stat(follow_symlinks=False).st_mtime
            has_ended = found[1] == _machine() and not _is_running(int(found[2]))
            if not has_ended and age < MAX_TEMPORARY_SECONDS:
                continue
            if each.is_dir(follow_symlinks=False):
                shutil.rmtree(each, ignore_errors=True)
            else:
                os.unlink(each)


def _machine() -> str:
    return sha256_of(platform.node(), 8)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name in the folder of `path`; its file is then synced and renamed.

    `path` is absent or complete at any moment, even if the process is killed. After an error the
    temporary file is removed and an earlier `path` is unchanged. Two writers of one file do not
    share a temporary name.

    Raises:
        WriteError: the disk is full.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with write_errors(path):
            yield temporary
            apply_umask(temporary)
            fsync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder; its files move into `folder` once all of them are written.

    Files of other names stay. After an error `folder` is unchanged.

    Raises:
        ValueError: `folder` is a file, or another writer is at work in it.
        WriteError: the disk is full.
    """
    check_out_folder(folder)
    is_new = not folder.exists()
    try:
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Inside: `folder` may be the only folder of its disk that can be written to.
            with _only_writer(folder, folder / ".writing"):
                temporary = temporary_name(folder / "partial")
                temporary.mkdir()
                try:
                    yield temporary
                    files = sorted(temporary.iterdir())
                    for file in files:
                        apply_umask(file)
                        fsync(file)
                    for file in files:
                        os.replace(file, folder / file.name)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder, which replaces `folder` at the end.

    After an error it is removed, and an earlier `folder` is unchanged.

    Raises:
        ValueError: `folder` is a file, or another writer is at work on it.
        WriteError: the disk is full.
    """
    check_out_folder(folder)
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder, folder.with_name(f".{folder.name}.writing")):
            yield from _replacing(folder)


def _replacing(folder: Path) -> Iterator[Path]:
    """`atomic_folder`, for the only writer."""
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not folder.exists():  # A process was killed between the two renames.
        old.rename(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            apply_umask(path)
            fsync(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _only_writer(folder: Path, file: Path) -> Iterator[None]:
    """Holds the lock of a file, which is removed at the end.

    Raises:
        ValueError: another process or thread holds it.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            lock_file(descriptor, wait=False)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"{folder}: another process is writing this folder; wait for it, or choose another "
                "folder"
            ) from None
        # Its holder may have removed it before it was locked here.
        if _is_file_of(descriptor, file):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def lock_file(descriptor: int, *, wait: bool) -> None:
    """Locks an open file until it is closed. File systems without locks, as some mounts of Lustre
    and of object stores are, get none: the first time, a warning states it.

    Raises:
        BlockingIOError: another process or thread holds the lock, and `wait` is false.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:  # ENOLCK, ENOSYS, ENOTSUP, and others of such mounts.
        _warn_once_of_no_locks(error.strerror)


@cache
def _warn_once_of_no_locks(reason: str) -> None:
    logger.warning(
        "this file system has no file locks (%s): start no two programs that write one folder",
        reason,
    )


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def apply_umask(path: Path) -> None:
    """Sets the permissions of a new file by the umask; safetensors writes 0600."""
    umask = os.umask(0o077)  # It can only be read by setting it.
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def apply_umask_to_weights(folder: str | Path) -> None:
    """`apply_umask` of the safetensors files that a library has written into a folder."""
    for path in Path(folder).glob("*.safetensors"):
        apply_umask(path)


def check_id(name: str, suffix: str = "") -> None:
    """Raises `ValueError` for an id that is no path inside a folder, or too long for a file name.

    Args:
        suffix: of the file.
    """
    shown = repr(name) if len(name) <= 40 else f"{name[:40]!r}..."
    parts = name.split("/")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        raise ValueError(f"the id {shown} has half of a surrogate pair") from None
    if "\0" in name:
        raise ValueError(f"the id {shown} has a zero byte")
    if (parts[0] == "" and len(parts) > 1) or ".." in parts:
        raise ValueError(f"the id {shown} leads out of the folder")
    if parts[-1] in ("", "."):
        raise ValueError(f"the id {shown} names no file")
    longest = MAX_NAME_BYTES - len(suffix)
    if max(sizes) > longest or sum(sizes) > 5 * longest:
        raise ValueError(f"the id {shown} has {sum(sizes)} bytes; a file name has up to {longest}")


def path_of_id(folder: Path, name: str, suffix: str = "") -> Path:
    """Returns the file of an id in a folder: FOLDER/NAME and the suffix.

    Raises:
        ValueError: as `check_id`, and if a symbolic link leads out of the folder.
    """
    check_id(name, suffix)
    target = folder / f"{name}{suffix}"
    if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{target.parent}: a symbolic link that leads out of {folder}; remove it")
    return target


def fsync(path: Path) -> None:
    """Writes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_write_failure(error: BaseException) -> bool:
    """Whether an error reports a failed write; torch and safetensors have no class for it."""
    parts = ("pytorchstreamwriter", "unexpected pos", "file write failed", "iostream", "os error")
    return isinstance(error, OSError) or (
        isinstance(error, Exception) and any(part in str(error).lower() for part in parts)
    )


def sha256_of(source: bytes | str | Path, digits: int = 64) -> str:
    """The first hex digits of the SHA-256 of bytes, of a text in UTF-8, or of a file (`Path`)."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:digits]
    content = source.encode() if isinstance(source, str) else source
    return hashlib.sha256(content).hexdigest()[:digits]


def sha256_of_tensors(named: Iterable[tuple[str, "Tensor"]], digits: int = 16) -> str:
    """The first hex digits of the SHA-256 over names in UTF-8 and the tensors' bytes, in the given
    order. Tensors must have a data type that numpy has."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:digits]


class FileLock:
    """The lock of a folder, held until it is closed or deleted, or the process ends.

    Raises:
        ValueError: another process holds it; the message has its process id.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # A symbolic link could lead to any file.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._descriptor: int | None = None
        self._descriptor = os.open(folder / ".lock", flags, 0o666)
        try:
            lock_file(self._descriptor, wait=False)
        except BlockingIOError:
            holder = one_line(os.read(self._descriptor, 32).decode(errors="replace")) or "unknown"
            raise ValueError(
                f"{folder}: another process is running in this folder (pid {holder}); wait for it, "
                "end it, or choose another folder"
            ) from None
        with suppress(OSError):  # A full disk; what is written there fails with its name.
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, str(os.getpid()).encode())
        # A forked data worker that outlives a killed parent must not keep the lock.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (held := reference()) and held.close())

    def close(self) -> None:
        """Releases the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = close

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested more than MAX_DEPTH times.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(value)
    return value


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value of JSON, with tuples for lists, has the type of a dataclass's field."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits_type(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        kinds = options
        if isinstance(value, tuple) and options[1:] == (Ellipsis,):
            kinds = options[:1] * len(value)
        return (
            isinstance(value, tuple)
            and len(value) == len(kinds)
            and all(map(fits_type, value, kinds))
        )
    kinds = (int, float) if hint is float else hint
    # bool is a subclass of int in Python.
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def check_depth(value: Any) -> None:
    """Raises `ValueError` for lists and dictionaries nested more than MAX_DEPTH times: functions
    that call themselves for each would end with an error of the interpreter."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the safe loader.

    Raises:
        ValueError: it is no YAML, is nested more than MAX_DEPTH times, or has more than MAX_NODES
            values, of which aliases make many from few.
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        _count_nodes(root, {})
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    check_depth(value)
    return value


def _count_nodes(node: Any, counts: dict[int, int]) -> int:
    """Values of a node of YAML, with those of its aliases. `counts`: of nodes that are known."""
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = MAX_NODES + 1  # Of an alias inside of its own node.
    content = getattr(node, "value", None)
    children = content if isinstance(content, list) else []
    parts = [
        each for child in children for each in (child if isinstance(child, tuple) else [child])
    ]
    counts[id(node)] = count = 1 + sum(_count_nodes(part, counts) for part in parts)
    if count > MAX_NODES:
        raise ValueError(f"has more than {MAX_NODES} values, or aliases of them")
    return count


def check_source(name: str | Path) -> None:
    """Raises `ValueError` for a model that is neither a folder nor a possible hub id.

    A path whose first part is a folder (or the root), or of more than two parts, is not looked up
    on the hub.
    """
    path = Path(name)
    if len(path.parts) > 2 and not path.exists():
        raise ValueError(f"{name}: no such folder; give a hub id (owner/name) or a folder")
    if len(path.parts) > 1 and Path(path.parts[0]).is_dir() and not path.exists():
        owner, is_id = path.parts[0], len(path.parts) == 2 and path.parts[0] not in ("..", "/")
        why = f" ({owner} is a folder here, so it is not looked up on the hub)" if is_id else ""
        raise ValueError(f"{name}: no such folder; give a hub id (owner/name) or a folder{why}")


def hub_reason(error: Exception) -> str:
    """Returns why the hub did not provide a model, without the names of its library's classes."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return "that is not a hub id, owner/name"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such model, or access is restricted"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "its model has no such file"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EACCES, EROFS):
        return f"its files cannot be stored ({error.strerror})"
    return "it cannot be reached, and the model is not in the cache"


def check_config_file(file: Path) -> None:
    """Raises `ValueError` when config.json is missing or no JSON object."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: no config.json there; is it the folder of a codec?")
    try:
        is_object = isinstance(parse_json(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError(f"{file}: corrupted file (not a JSON object); copy it again")


def check_trainable(config: dict[str, Any], name: str | Path) -> None:
    """Raises `ValueError` for a config.json of transformers: all of theirs name a model_type."""
    if "model_type" in config:
        raise ValueError(
            f"{name}: is a model of transformers ({config['model_type']}): load_codec uses it; it "
            "cannot be trained here"
        )


def check_out_folder(folder: Path) -> None:
    """Raises `ValueError` for a folder to write that is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder to write")
