"""Hostile variants of valid files, as strategies of hypothesis."""

import base64
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

CANARY = "canary"
"""Name of the file and of the folder whose existence shows that code of a file was run."""
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf")),
)
TEXTS = (
    *("", " ", "..", "../../outside", "/etc/passwd", "a/../../b", "link/x", "link", "\0", "a\0b"),
    *("x" * 300, "x" * 5000, "\ud800", "\u202e\u200b\ufeff", "\u0041\u030a" * 50, "\n", "-1"),
    *("{}", "[", "null", "${oc.env:HOME}", "${a}", "*a", "&a [*a]", "!!python/name:os.system"),
    *(f"touch {CANARY}", f"__import__('os').mkdir('{CANARY}')", "canary_module", "os.system"),
    *("command", "url", "http://127.0.0.1:9/x", "file:/etc/passwd", "(a+)+$", "(.*a){20}", "all"),
    *("LORA", "PREFIX_TUNING", "float64", "int8", "cuda", "meta", "llama", "bert", "gpt2"),
)


class Canary:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


def any_value(draw: Draw) -> Any:
    """A value of JSON."""
    kind = draw(st.integers(0, 8))
    if kind < 3:
        return draw(st.sampled_from(NUMBERS))
    if kind < 6:
        return draw(st.sampled_from(TEXTS))
    if kind == 6:
        return draw(st.sampled_from([None, True, False, [], {}, [[]], [{}], {"": None}]))
    if kind == 7:
        value: Any = draw(st.sampled_from([[], {}, 1, "a"]))
        for _ in range(draw(st.sampled_from([1, 5, 60, 400]))):
            value = [value] if draw(st.sampled_from([True, False])) else {"a": value}
        return value
    return draw(st.text(max_size=8)) if draw(st.booleans()) else draw(st.integers())


def changed_tree(draw: Draw, tree: Any) -> Any:
    """A tree of JSON with one to three changes, in place."""
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return any_value(draw)
        parent, key = draw(st.sampled_from(places[:2000]))
        kind = draw(st.integers(0, 9))
        with suppress(IndexError, KeyError):
            if kind == 0:
                del parent[key]
            elif kind == 1 and isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
            elif kind == 2:
                other, name = draw(st.sampled_from(places[:2000]))
                parent[key] = deepcopy(other[name])
            elif kind == 3 and isinstance(parent[key], list):
                parent[key] = parent[key] * draw(st.sampled_from([0, 2, 1000]))
            elif kind == 4 and isinstance(parent[key], int | float):
                parent[key] = parent[key] * draw(st.sampled_from([-1, 0.5, 2, 3, 1000, 2**20]))
            elif kind == 5:
                parent[key] = [parent[key]]
            else:
                parent[key] = any_value(draw)
    return tree


def _places(tree: Any) -> Any:
    """Containers and keys of all values of a tree that is no deeper than 20."""
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if not isinstance(node, dict | list):
            continue
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield node, key
            if depth < 20:
                waiting.append((value, depth + 1))


def changed_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes with one to four changes, most of them near the beginning or the end."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        area = draw(st.integers(0, 5))
        low, high = (0, size) if area == 0 else (0, 64) if area < 3 else (0, 512)
        if area == 5:
            low, high = max(0, size - 600), size
        place = draw(st.integers(low, max(low, min(high, size) - 1)))
        kind = draw(st.integers(0, 8))
        width = draw(st.sampled_from([1, 2, 4, 8]))
        if kind == 0:
            del content[place:]
        elif kind == 1:
            del content[place : place + draw(st.sampled_from([1, 2, 4, 16, 100]))]
        elif kind == 2:
            content[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == 3:
            content[place : place + 64] = bytes(64)
        elif kind == 4 and place < size:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == 5:
            content[place:place] = content[place : place + 64] * draw(st.sampled_from([1, 20]))
        elif kind == 6:
            content[place : place + width] = draw(st.binary(min_size=width, max_size=width))
        else:
            number = draw(st.sampled_from([each for each in NUMBERS if isinstance(each, int)]))
            order = draw(st.sampled_from(["little", "big"]))
            content[place : place + width] = (number % 256**width).to_bytes(width, order)
    return bytes(content)


def changed_file(draw: Draw, data: bytes, name: str) -> bytes:
    """A file with changes to its bytes, or by its format (that of the name's suffix)."""
    if draw(st.integers(0, 2)) == 0:
        return changed_bytes(draw, data)
    change = next((one for end, one in FORMATS.items() if name.endswith(end)), changed_bytes)
    return change(draw, data)


def _json(draw: Draw, data: bytes) -> bytes:
    if draw(st.integers(0, 30)) == 0:
        return b"[" * 100_000
    return json.dumps(changed_tree(draw, json.loads(data))).encode()


def _json_lines(draw: Draw, data: bytes) -> bytes:
    lines = [json.loads(line) for line in data.splitlines()]
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n"]))
    return "".join(json.dumps(line) + end for line in changed_tree(draw, lines)).encode()


def _gzipped(change: Callable[[Draw, bytes], bytes]) -> Callable[[Draw, bytes], bytes]:
    return lambda draw, data: gzip.compress(change(draw, gzip.decompress(data)), 1)


def _yaml(draw: Draw, data: bytes) -> bytes:
    kind = draw(st.integers(0, 7))
    if kind == 0:  # Aliases of aliases: a kilobyte for gigabytes.
        names = "abcdefghijklmnop"
        lines = [f"{names[0]}: &{names[0]} [x, x, x, x, x, x, x, x]"]
        for old, new in pairwise(names):
            lines.append(f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]")
        return "\n".join(lines).encode() + b"\n" + data
    if kind == 1:
        return data + draw(st.sampled_from(TEXTS)).encode("utf-8", "surrogatepass") + b": 1\n"
    tree = changed_tree(draw, yaml.safe_load(data))
    try:
        return yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return data


def _safetensors(draw: Draw, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw(st.booleans()):
        header = changed_tree(draw, header)
    else:  # Valid files of other tensors.
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        kind = draw(st.integers(0, 4))
        shape = header[name]["shape"]
        if kind == 0:
            header[draw(st.sampled_from(TEXTS))] = header.pop(name)
        elif kind == 1:
            header[name]["shape"] = shape[::-1] if len(set(shape)) > 1 else [1, *shape]
        elif kind == 2:
            start, stop = header[name]["data_offsets"]
            number = draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0]))
            count = (stop - start) // 4
            body = body[:start] + struct.pack("<f", number) * count + body[start + 4 * count :]
        elif kind == 3:
            header[name]["dtype"] = draw(
                st.sampled_from(["F32", "I32", "U32", "F16", "BF16", "I64", "BOOL", "F8_E4M3"])
            )
        else:
            header[name]["shape"] = [0, *shape]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _zip(draw: Draw, data: bytes) -> bytes:
    """A zip archive with changed members, such as a checkpoint of torch."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = draw(st.sampled_from(old.namelist()))
        renamed = draw(st.sampled_from([chosen, *HOSTILE_MEMBERS]))
        for name in old.namelist():
            content = old.read(name)
            if name == chosen and renamed == chosen:
                content = changed_bytes(draw, content)
            with suppress(ValueError, IndexError):
                new.writestr(renamed if name == chosen else name, content)
    return out.getvalue()


HOSTILE_MEMBERS = (
    *("../outside", "/outside", "a/../../outside", "..", ".", "", "link/x", "package/../../../x"),
    *("x" * 300, "a\\..\\b", "C:\\x"),
)


def _tar(draw: Draw, data: bytes) -> bytes:
    """A tar archive with members that lead out of its folder: names, links, devices."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as old,
        tarfile.open(fileobj=out, mode="w:gz") as new,
    ):
        for member in old.getmembers():
            for _ in range(draw(st.integers(1, 2))):
                info = tarfile.TarInfo(draw(st.sampled_from([member.name, *HOSTILE_MEMBERS])))
                info.type = draw(
                    st.sampled_from(
                        [
                            *(tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE),
                            *(tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE),
                        ]
                    )
                )
                info.linkname = draw(
                    st.sampled_from(["..", "../outside", "/etc", "/etc/passwd", "link", "a", "."])
                )
                info.mode = draw(st.sampled_from([0o644, 0o000, 0o4755]))
                info.size = 4 if info.isfile() else 0
                new.addfile(info, io.BytesIO(b"text"))
    return out.getvalue()


def _torch(draw: Draw, data: bytes) -> bytes:
    """A checkpoint of torch with other objects, or with changed bytes inside."""
    import torch

    try:
        state = torch.load(io.BytesIO(data), weights_only=True)
    except UnpicklingError:  # It has arrays of numpy.
        return _zip(draw, data)
    if draw(st.booleans()):
        return _zip(draw, data)
    tensors = state.get("generator", state)
    name = draw(st.sampled_from(list(tensors)))
    shape = tensors[name].shape if isinstance(tensors[name], torch.Tensor) else (1,)
    tensors[name] = draw(
        st.sampled_from(
            [
                Canary(), None, "text", 2**70, [Canary()], {"a": Canary()}, torch.zeros(3),
                torch.zeros(shape, dtype=torch.int8), torch.zeros(shape).to_sparse(),
                torch.zeros(1).expand(2**40), torch.empty(2**40, device="meta"),
                torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.complex64),
                torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
            ]
        )
    )  # fmt: skip
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=draw(st.booleans()))
    return out.getvalue()


def _parquet(draw: Draw, data: bytes) -> bytes:
    """A Parquet file with other metadata or columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    facts = {key.decode(): json.loads(value) for key, value in table.schema.metadata.items()}
    kind = draw(st.integers(0, 3))
    if kind == 0:
        facts = {"": 0, **changed_tree(draw, facts)}
    elif kind == 1:
        name = draw(st.sampled_from(table.column_names))
        values = changed_tree(draw, table[name].to_pylist())
        table = table.drop_columns([name])
        with suppress(pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
            table = table.append_column(name, pa.array(values))
    elif kind == 2:
        name = draw(st.sampled_from(table.column_names))
        other = draw(st.sampled_from([pa.int8(), pa.float32(), pa.binary(), pa.large_string()]))
        with suppress(pa.ArrowException):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(other))
    else:
        table = table.select(draw(st.permutations(table.column_names))[: draw(st.integers(0, 7))])
    with suppress(ValueError, AttributeError, TypeError):
        facts = {str(key): json.dumps(value) for key, value in facts.items()}
        table = table.replace_schema_metadata(facts)
    out = io.BytesIO()
    options = {"compression": draw(st.sampled_from(["none", "snappy", "gzip", "zstd"]))}
    pq.write_table(table, out, use_dictionary=draw(st.booleans()), **options)
    return out.getvalue()


def _bpe(draw: Draw, data: bytes) -> bytes:
    """An acoustic BPE model whose SentencePiece model has other bytes."""
    record = json.loads(data)
    if draw(st.integers(0, 3)) == 0:
        return _json(draw, data)
    model = changed_bytes(draw, base64.b64decode(record["sentencepiece"]))
    return json.dumps({**record, "sentencepiece": base64.b64encode(model).decode()}).encode()


def _text(draw: Draw, data: bytes) -> bytes:
    """Pieces of a text in any order, with signs of markup between them."""
    text = data.decode()
    pieces = [
        *TEXTS,
        *text.split("\n"),
        *text.split(),
        "<break",
        'time="9e9s"',
        "/>",
        "[",
        "](",
        ")",
    ]
    pieces += ["\t", "\n", "1" * 30, "<" * 50, "[" * 50, "$", "\u00b2", "http://", "a@b.c", "12:61"]
    many = draw(st.lists(st.sampled_from(pieces), max_size=25))
    joined = draw(st.sampled_from([" ", "", "\n"])).join(many)
    return (joined * draw(st.sampled_from([1, 1, 1, 30]))).encode("utf-8", "replace")


FORMATS: dict[str, Callable[[Draw, bytes], bytes]] = {
    "bpe.json": _bpe,
    ".json": _json,
    ".jsonl": _json_lines,
    ".jsonl.gz": _gzipped(_json_lines),
    ".yaml": _yaml,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".bin": _torch,
    ".pkl": _torch,
    ".parquet": _parquet,
    ".whl": _zip,
    ".tgz": _tar,
    ".txt": _text,
    ".tsv": _text,
}
"""Changes by the end of a file's name."""


def changed_files(draw: Draw, folder: Path, names: list[str]) -> list[str]:
    """Changes one or two of the files of a folder; returns their names."""
    chosen = {draw(st.sampled_from(names)) for _ in range(draw(st.integers(1, 2)))}
    for name in sorted(chosen):
        path = folder / name
        path.write_bytes(changed_file(draw, path.read_bytes(), name))
    return sorted(chosen)
