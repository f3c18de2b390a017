"""codec/io.py: files and folders are complete or as they were, and obey the umask."""

import errno
import fcntl
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_slm import quiet, save_base, save_shard

from codec import io, load_codec, write_audio
from codec.io import (
    MAX_NAME_BYTES,
    FileLock,
    WriteError,
    atomic_file,
    atomic_files,
    atomic_folder,
    check_id,
    check_source,
    hub_reason,
    is_write_failure,
    parse_json,
    parse_yaml,
    path_of_id,
    sha256_of,
    sha256_of_tensors,
    write_errors,
)
from codec.json_lines import append_json_lines
from codec.tokens import TokenShard
from codec.training.config import OptimConfig
from codec.training.run import start_run
from slm.config import ARConfig, LoRAConfig, NARConfig
from slm.models.ar import SpeechLM
from slm.models.nar import NAR

pytestmark = quiet()


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    """The permissions of all files below a folder."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_every_atomic_writer_obeys_the_umask(tmp_path: Path, umask: int) -> None:
    tensors = {"weight": torch.zeros(2)}
    with atomic_file(tmp_path / "file" / "new" / "a.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_files(tmp_path / "files") as temporary:
        save_file(tensors, temporary / "a.safetensors")
        lock = tmp_path / "files" / ".writing"
        assert lock.stat().st_mode & 0o777 == 0o666 & ~umask
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
        save_file(tensors, temporary / "below" / "a.safetensors")
    FileLock(tmp_path / "lock").close()
    found = {name: modes(tmp_path / name) for name in ("file", "files", "folder", "lock")}
    assert found == {name: {0o666 & ~umask} for name in found}


def test_a_writers_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".writing").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        atomic_files(tmp_path / "out").__enter__()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("writer", [atomic_files, atomic_folder])
def test_a_folder_has_one_writer_at_a_time(tmp_path: Path, writer, monkeypatch) -> None:
    folder = tmp_path / "export"
    with writer(folder) as partial:
        (partial / "model").write_text("of the first")
        with pytest.raises(ValueError, match="export: another process is writing this folder"):
            writer(folder).__enter__()
    assert (folder / "model").read_text() == "of the first"
    plain, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        """Before the lock is taken, its holder ends and removes it."""
        calls.append(descriptor)
        if len(calls) == 1:
            next(tmp_path.rglob(".*writing")).unlink()
        plain(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with writer(folder) as partial:
        (partial / "model").write_text("of the second")
        with pytest.raises(ValueError, match="another process is writing"):
            writer(folder).__enter__()
    assert len(calls) == 3
    assert (folder / "model").read_text() == "of the second"
    with writer(folder) as partial:
        (partial / "model").touch()
        next(tmp_path.rglob(".*writing")).unlink()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "model"]


@pytest.mark.parametrize("limit", [None, 20_000], ids=["failing writer", "full disk"])
def test_a_folder_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, limit: int | None
) -> None:
    folder = tmp_path / "voice" / "nar"
    with atomic_folder(folder) as partial:
        (partial / "kept").write_text("whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with atomic_folder(folder) as partial:
            (partial / "torn").write_text("half")
            if limit is None:
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            save_file({"weight": torch.zeros(100_000)}, partial / "model.safetensors")

    try:
        with pytest.raises(OSError, match="nar: cannot be written"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.parent.iterdir()] == ["nar"]
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with atomic_folder(folder) as partial:
        (partial / "new").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_everything_that_is_written_obeys_the_umask(
    tmp_path: Path, umask: int, tiny_codec_folder: Path
) -> None:
    """Codec, NAR, AR with its tokenizer, token shard, recording, checkpoint."""
    codec = load_codec(tiny_codec_folder)
    codec.save_pretrained(tmp_path / "codec")
    save_shard(tmp_path / "tokens" / "train.parquet", 2)
    stamp = TokenShard.open(tmp_path / "tokens").stamp
    save_base(tmp_path / "base")
    for name, lora in (("adapter", LoRAConfig(rank=2)), ("full", None)):
        lm = SpeechLM.create(ARConfig(base=str(tmp_path / "base"), lora=lora), stamp, seed=0)
        lm.save(tmp_path / name)
    NAR(
        NARConfig(codebook_sizes=(4, 4), num_layers=1, num_heads=2, width=8, feedforward=8)
    ).save_pretrained(tmp_path / "nar")
    write_audio(tmp_path / "audio" / "a.wav", np.zeros(100, dtype=np.float32), 16_000)
    accelerator = Accelerator(cpu=True)
    run = start_run(OptimConfig(), tmp_path / "run", seed=0, accelerator=accelerator)
    accelerator.prepare(torch.nn.Linear(2, 2))
    run.log({"loss": 1.0}, 1)
    run.save(1)
    run.close()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    wrong = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
        for path in tmp_path.rglob("*")
        if path.is_file() and "base" not in path.parts  # Written by the test's own helper.
        if path.stat().st_mode & 0o777 != 0o666 & ~umask
    }
    assert not wrong


def test_temporary_files_of_killed_processes_go_at_the_next_write(tmp_path: Path) -> None:
    """Those of processes that run, and of other machines for a day, stay."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    here, other = io._machine(), "01234567"
    ended = [f".a.jsonl.{here}-{pid}-140.tmp", f".b.{here}-{os.getpid()}-140.tmp.wav"]
    folder, forgotten = f".partial.{here}-{pid}-1.tmp", f".f.{other}-{pid}-1.tmp"
    link, day = tmp_path / f".l.{here}-{pid}-1.tmp", 24 * 3600
    link.symlink_to(tmp_path / "nowhere")
    stays = [f".c.{here}-{os.getppid()}-1.tmp", f".d.{other}-{pid}-1.tmp", ".e.tmp", "a.jsonl"]
    for name in (*ended, forgotten, *stays):
        (tmp_path / name).touch()
    os.utime(tmp_path / forgotten, 2 * (time.time() - day - 5,))
    os.utime(tmp_path / stays[1], 2 * (time.time() - day + 600,))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "half").touch()
    with atomic_file(tmp_path / "new") as temporary:
        temporary.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stays, "new"])
    (tmp_path / ended[0]).touch()  # A folder is looked through once in each process.
    with atomic_files(tmp_path) as temporary:
        assert io.TEMPORARY.fullmatch(temporary.name)
        (temporary / "newer").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*stays, "new", "newer", ended[0]]
    )


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path: Path) -> None:
    """Between the two renames neither the new nor the earlier one has the name."""
    (tmp_path / ".voice.old").mkdir()
    (tmp_path / ".voice.old" / "kept").touch()
    (tmp_path / ".voice.partial").mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "voice"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["voice"]
    assert (tmp_path / "voice" / "kept").exists()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(errno.ENOSPC, "anything"), "No space left on device"),
        (OSError(errno.EDQUOT, "anything"), "quota exceeded"),
        (SafetensorError("I/O error: (os error 28)"), "I/O error"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1"), "pos 1"),
        (LookupError("a library's own"), "a library's own"),
    ],
)
def test_a_failed_write_names_file_and_reason(error: Exception, shown: str, tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match=rf"a/b\.wav: cannot be written \(.*{shown}.*make room"),
        write_errors(tmp_path / "a" / "b.wav", LookupError),
    ):
        raise error


def test_a_full_disk_is_named_where_the_library_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with (
        pytest.raises(WriteError, match=r"\(No space left on device: System error\.\)"),
        write_errors(tmp_path, LookupError),
    ):
        raise LookupError("System error.")
    monkeypatch.setattr(io.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with (
        pytest.raises(WriteError, match=r"cannot be written \(System error\.\)"),
        write_errors(tmp_path, LookupError),
    ):
        raise LookupError("System error.")


def test_a_full_disk_does_not_prevent_a_lock(tmp_path: Path) -> None:
    """What is written under the lock fails then, and names its file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        held = FileLock(tmp_path)
        with pytest.raises(ValueError, match="another process is running in this folder"):
            FileLock(tmp_path)
        held.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_holder_of_a_lock_is_named_in_one_line(tmp_path: Path) -> None:
    held = FileLock(tmp_path)
    (tmp_path / ".lock").write_bytes(b"3\n\xff")
    with pytest.raises(ValueError, match="folder \\(pid 3 \ufffd\\); wait"):
        FileLock(tmp_path)
    held.close()


def test_errors_of_reading_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "input.wav"), ValueError("os error")):
        with pytest.raises(type(error)), atomic_file(tmp_path / "out"):
            raise error


def test_other_errors_are_no_full_disk() -> None:
    assert not is_write_failure(RuntimeError("CUDA out of memory"))
    assert not is_write_failure(KeyError("weight"))


def test_a_digest_is_of_bytes_of_text_or_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"green")
    digests = {sha256_of("green"), sha256_of(b"green"), sha256_of(tmp_path / "file")}
    assert len(digests) == 1
    assert sha256_of("green", 8) == digests.pop()[:8]


def test_a_digest_of_tensors_is_of_names_and_bytes_in_the_given_order() -> None:
    one, two = torch.arange(3), torch.ones(2, 2)
    both = b"one" + one.numpy().tobytes() + b"two" + two.numpy().tobytes()
    assert sha256_of_tensors([("one", one), ("two", two)], 64) == sha256_of(both)
    assert sha256_of_tensors([("two", two), ("one", one)], 64) != sha256_of(both)
    assert len(sha256_of_tensors([("one", one)])) == 16
    # A view, and a parameter.
    assert sha256_of_tensors([("w", torch.nn.Parameter(two.T))]) == sha256_of_tensors([("w", two)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "has 300 bytes; a file name has up to 196"),
        ("\u00e4" * 120, "has 240 bytes"),
        ("/".join(["x" * 190] * 10), "has 1900 bytes"),
        ("a\0b", "has a zero byte"),
        ("\ud800", "has half of a surrogate pair"),
        ("/", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("/passwd", "leads out of the folder"),
        ("..", "leads out of the folder"),
        ("a/../../b", "leads out of the folder"),
        ("", "names no file"),
        ("a/", "names no file"),
        ("a/.", "names no file"),
    ],
)
def test_an_id_that_is_no_file_of_the_folder_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_id(name, ".wav")
    assert len(str(caught.value)) < 140


def test_long_ids_are_shown_in_part() -> None:
    for length, shown in ((38, "'/" + 38 * "x" + "'"), (40, "'/" + 39 * "x" + "'...")):
        with pytest.raises(ValueError, match=f"the id {re.escape(shown)} leads"):
            check_id("/" + length * "x")
    # The longest one, and as many bytes in all as five of them.
    check_id("/".join(["x" * MAX_NAME_BYTES] * 5))


def test_a_symbolic_link_is_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "link-to-out"
    for name in ("out", "elsewhere", "out/inside"):
        (tmp_path / name).mkdir()
    folder.symlink_to(tmp_path / "out")
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    (folder / "near").symlink_to(folder / "inside")
    (folder / "loop").symlink_to(folder / "loop")
    for name in ("a", "new/a", "near/a", "..a", "a..b"):
        assert path_of_id(folder, name, ".wav") == folder / f"{name}.wav"
    with pytest.raises(ValueError, match=r"away: a symbolic link that leads out of .*; remove it"):
        path_of_id(folder, "away/a", ".wav")


def test_json_and_yaml_have_a_limited_depth() -> None:
    for parse in (parse_json, parse_yaml):
        assert parse("[" * 99 + "]" * 99)
        for depth in (101, 100_000):
            with pytest.raises(ValueError, match="nested too deeply"):
                parse("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match="Expecting"):
        parse_json("[1")


def test_aliases_of_yaml_are_limited() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: [*x, *x]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    for text in ("\n".join(lines), "a: &a [*a]", "&a {b: *a}"):
        with pytest.raises(ValueError, match="aliases"):
            parse_yaml(text)
    for text in ("a: [", "!!python/object/apply:os.getcwd []", "{[]: 1}", "2001-99-99"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_yaml(text)


def test_the_number_of_values_is_limited() -> None:
    hundred, thousand = f"&a [{'x, ' * 99}]", f"&b [&s x, {'*s, ' * 999}]"
    below = f"{hundred}, {thousand}, {'*b, ' * 98}{'*a, ' * 7}"
    assert len(parse_yaml(f"[{below}{'x, ' * 100}]")) == 207  # With aliases 100,000 values.
    with pytest.raises(ValueError, match="has more than 100000 values"):
        parse_yaml(f"[{below}{'x, ' * 101}]")


def test_the_lock_of_a_folder_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="lock"):
        FileLock(tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "kept"


PARTS = st.sampled_from(["..", ".", "", "a", "\0", "\ud800", "x" * 250, "~", "\\..\\"])


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.text(max_size=20) | st.lists(PARTS, max_size=8).map("/".join))
def test_any_id_is_refused_or_lies_in_the_folder(name: str) -> None:
    folder = Path("/nowhere/out")
    try:
        path = path_of_id(folder, name, ".wav")
    except ValueError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(folder)
    assert path.name.endswith(".wav")
    assert len(os.fsencode(path.name)) <= 200


def test_files_of_a_folder_arrive_together_or_not_at_all(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "below"
    old.mkdir()
    for folder in (old, new):
        with pytest.raises(KeyError), atomic_files(folder) as temporary:
            {}[(temporary / "a").touch()]
    assert [*old.iterdir()] == []
    assert not new.exists()
    for folder in (old, new):
        with atomic_files(folder) as temporary:
            (temporary / "a").touch()
        assert [path.name for path in folder.iterdir()] == ["a"]
    with pytest.raises(ValueError, match="is a file"), atomic_files(old / "a"):
        pass


@pytest.mark.parametrize("error", [KeyError("weight"), FileNotFoundError(2, "No such file")])
def test_errors_that_are_no_full_disk_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "new"):
        raise error
    assert caught.value is error
    assert [*tmp_path.iterdir()] == []


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "new" / "run")
    with pytest.raises(ValueError, match=rf"another process .* \(pid {os.getpid()}\)"):
        FileLock(tmp_path / "new" / "run")
    lock.close()
    lock.close()
    with FileLock(tmp_path / "new" / "run"):
        pass
    FileLock(tmp_path / "new" / "run").close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_file_systems_without_locks_are_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    io._warn_once_of_no_locks.cache_clear()
    for _ in range(2):
        with FileLock(tmp_path / "run") as lock:
            append_json_lines(tmp_path / "run" / "metrics.jsonl", [{"step": 1}])
            with atomic_folder(tmp_path / "run" / "voice") as partial:
                (partial / "card").touch()
            with atomic_files(tmp_path / "run" / "ar") as partial:
                (partial / "weights").touch()
        lock.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    assert sorted(path.name for path in (tmp_path / "run").glob("*")) == [
        *(".lock", "ar", "metrics.jsonl", "voice"),
    ]
    [line] = caplog.messages
    assert f"no file locks ({os.strerror(number)})" in line


def test_what_is_neither_a_folder_nor_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "codec" / "deep").mkdir(parents=True)
    for name in ("owner/name", "name", "here", "here/codec", "here/codec/deep", "codec/here"):
        check_source(name)
    for name in ("a/b/c", "/missing", "../missing", "here/other"):
        with pytest.raises(ValueError, match="no such folder") as caught:
            check_source(name)
        assert ("is a folder here" in str(caught.value)) == (name == "here/other")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HFValidationError("x"), "not a hub id"),
        (LocalEntryNotFoundError("x"), "cannot be reached"),
        (OSError(errno.ENOSPC, "No space left"), r"cannot be stored \(No space left\)"),
        (OSError(errno.ECONNREFUSED, "refused"), "cannot be reached"),
        (RuntimeError("x"), "cannot be reached"),
    ],
)
def test_the_reason_of_the_hub(error: Exception, reason: str) -> None:
    assert re.search(reason, hub_reason(error))
