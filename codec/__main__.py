"""The command `codec`: encode and decode recordings; import, export and round codecs.

codec info PATH
codec encode --codec DIR IN... --out TOKENS.parquet [--overwrite]
codec decode --codec DIR TOKENS.parquet --out DIR [--overwrite]
codec reconstruct --codec DIR [--codebooks N] IN... --out DIR [--overwrite]
codec import speechtokenizer|dmcodec|lmspt CONFIG CHECKPOINT OUT [--overwrite]
codec export speechtokenizer|lmspt DIR OUT [--overwrite]
codec halve DIR OUT [--overwrite]
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from codec.json_lines import to_json_line
from codec.program import ArgumentParser, run_program
from codec.tokens import CodecStamp, TokenRow, TokenShard, write_shard

if TYPE_CHECKING:
    from codec.models.base import SpeechCodec
    from codec.models.codec import Codec

logger = logging.getLogger("codec")
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; exits with a status of `run_program` if it does not succeed."""

    def command() -> None:
        arguments = _parser().parse_args(argv)
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
        arguments.run(arguments)

    run_program(command)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="codec",
        description="Encode recordings to discrete codes and decode them. Results go to standard "
        "output as JSON, logs to standard error.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="describe a codec, token shard or recording as JSON")
    info.add_argument(
        "path", metavar="PATH",
        help="codec folder, hub id, token shard(s), or a recording: its format and metadata",
    )  # fmt: skip
    info.add_argument(
        "--use", action="store_true", help="token shard: usage and perplexity of each codebook"
    )
    info.set_defaults(run=_info)

    encode = commands.add_parser("encode", help="encode recordings to a token shard")
    encode.set_defaults(run=_encode)
    decode = commands.add_parser("decode", help="decode a token shard to recordings")
    decode.add_argument("tokens", metavar="TOKENS.parquet", help="a shard or a folder of shards")
    decode.set_defaults(run=_decode)
    reconstruct = commands.add_parser("reconstruct", help="encode and decode recordings")
    reconstruct.add_argument(
        "--codebooks", type=int, metavar="N", help="decode the first N codebooks (default: all)"
    )
    reconstruct.set_defaults(run=_reconstruct)
    for command, existing in (
        (encode, "the token shard --out if it exists"),
        (decode, "existing recordings in --out"),
        (reconstruct, "existing recordings in --out"),
    ):
        command.add_argument("--overwrite", action="store_true", help=f"replace {existing}")
    for command in (encode, reconstruct):
        command.add_argument(
            "inputs", nargs="+", metavar="IN", type=Path, help="recordings or folders of them"
        )
    for command, out, what in (
        (encode, "TOKENS.parquet", "token shard to write"),
        (decode, "DIR", "folder for the recordings"),
        (reconstruct, "DIR", "folder for the recordings"),
    ):
        command.add_argument("--codec", required=True, metavar="DIR", help="folder or hub id")
        command.add_argument("--out", required=True, type=Path, metavar=out, help=what)
        command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    _add_conversions(commands)
    return parser


def _add_conversions(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands import, export and halve."""
    names = {"speechtokenizer": "SpeechTokenizer", "dmcodec": "DM-Codec", "lmspt": "LM-SPT"}
    about = "convert a published checkpoint to a codec folder"
    kinds = commands.add_parser("import", help=about, description=about.capitalize() + ".")
    sources = kinds.add_subparsers(required=True, metavar="KIND")
    for kind, name in names.items():
        config = "its YAML file, or JSON" if kind == "lmspt" else "its config.json"
        command = sources.add_parser(
            kind,
            help=f"a checkpoint of {name}",
            description=f"Convert a checkpoint of {name} to a codec folder; weights stay bit for "
            "bit the same.",
        )
        command.add_argument("config", type=Path, metavar="CONFIG", help=config)
        command.add_argument(
            "checkpoint",
            type=Path,
            metavar="CHECKPOINT",
            help="a state_dict or a trainer's checkpoint (torch.save), or .safetensors",
        )
        command.set_defaults(run=_import, kind=kind)
        _add_out(command)
    about = "convert a codec folder to another project's checkpoint"
    kinds = commands.add_parser("export", help=about, description=about.capitalize() + ".")
    targets = kinds.add_subparsers(required=True, metavar="KIND")
    descriptions = {
        "speechtokenizer": "Write config.json and SpeechTokenizer.pt for load_from_checkpoint of "
        "SpeechTokenizer and DM-Codec. For codecs of the family seanet only.",
        "lmspt": "Write the safetensors file for LM-SPT's get_model, named after the frame rate "
        "and the codebook sizes, and the YAML file for its package. For codecs of the family lmspt "
        "in its released form only.",
    }
    for kind, description in descriptions.items():
        command = targets.add_parser(
            kind, help=f"a checkpoint of {names[kind]}", description=description
        )
        command.add_argument("codec", metavar="DIR", help="codec folder or hub id")
        command.set_defaults(run=_export, kind=kind)
        _add_out(command)
    halve = commands.add_parser(
        "halve",
        help="round a codec to half precision, half the size on disk",
        description="Round a codec's weights to float16. Some codes change: export tokens with "
        "the rounded codec, and train on those.",
    )
    halve.add_argument("codec", metavar="DIR", help="codec folder or hub id")
    halve.set_defaults(run=_halve)
    _add_out(halve)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace existing files in OUT")


def _info(arguments: argparse.Namespace) -> None:
    from codec.audio import AUDIO_SUFFIXES, audio_info, audio_tags

    path = Path(arguments.path)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        shard = TokenShard.open(path)
        facts = {
            "kind": "token shard",
            "files": len(shard.files),
            "utterances": len(shard),
            "hours": round(float(shard.durations.sum()) / 3600, 4),
            "frames": int(shard.num_frames.sum()),
            "speakers": len(set(shard.speakers)),
            "codec": _facts(shard.stamp),
        }
        if arguments.use:
            facts["use"] = _usage(shard)
    elif arguments.use and not path.exists():
        raise ValueError(f"{path}: no such file or folder; --use needs a token shard")
    elif arguments.use:
        raise ValueError(f"{path}: --use is for token shards; codec encode makes one")
    elif path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
        header = audio_info(path)
        seconds = round(header.num_samples / header.sample_rate, 3)
        facts = {"kind": "recording", **header._asdict(), "seconds": seconds}
        facts["tags"] = audio_tags(path)
    else:
        codec = _load(arguments.path, "cpu")
        parameters = sum(parameter.numel() for parameter in codec.parameters())
        facts = {"kind": "codec", "parameters": parameters, **_facts(codec.stamp)}
    _print_json(facts)


def _facts(stamp: CodecStamp) -> dict[str, object]:
    bits = stamp.frame_rate * float(np.log2(stamp.codebook_sizes).sum())
    return {**asdict(stamp), "bits_per_second": round(bits, 1)}


def _usage(shard: TokenShard) -> dict[str, list[float]]:
    """Share of entries that occur, and perplexity (exp of their entropy), of each codebook."""
    sizes = shard.stamp.codebook_sizes
    counts = [np.zeros(size, np.int64) for size in sizes]
    for _, row in zip(_progress(range(len(shard))), shard, strict=True):
        for count, codes in zip(counts, row.codes, strict=True):
            count += np.bincount(codes, minlength=len(count))
    shares = [round(float((count > 0).mean()), 4) for count in counts]
    frequencies = [count[count > 0] / max(1, count.sum()) for count in counts]
    perplexities = [round(float(np.exp(-(f * np.log(f)).sum())), 1) for f in frequencies]
    return {"share": shares, "perplexity": perplexities}


def _encode(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix != ".parquet":
        raise ValueError(f"{arguments.out}: --out must be a .parquet file, the shard to write")
    _check_absent([arguments.out], arguments.overwrite, "file")
    recordings = list(_find(arguments.inputs))
    codec = _load(arguments.codec, arguments.device)
    skipped: list[str] = []

    def rows() -> Iterator[TokenRow]:
        for name, codes, seconds in _encode_all(codec, recordings, skipped):
            yield TokenRow(name, "", "", "", seconds, codes)
        # Another process may have written it in the meantime.
        _check_absent([arguments.out], arguments.overwrite, "file")

    write_shard(arguments.out, rows(), codec.stamp)
    _report(arguments.out, len(recordings), skipped)


def _decode(arguments: argparse.Namespace) -> None:
    from codec.io import check_out_folder

    check_out_folder(arguments.out)
    shard = TokenShard.open(arguments.tokens)
    targets = [_target(arguments.out, name) for name in shard.ids]
    _check_absent(targets, arguments.overwrite)
    codec = _load(arguments.codec, arguments.device)
    shard = TokenShard.open(arguments.tokens, expect=codec.stamp)
    for row, target in zip(shard, _progress(targets), strict=True):
        _write(codec, row.codes, row.duration, target)
    _report(arguments.out, len(shard), [])


def _reconstruct(arguments: argparse.Namespace) -> None:
    from codec.io import check_out_folder

    check_out_folder(arguments.out)
    if arguments.codebooks is not None and arguments.codebooks < 1:
        raise ValueError(f"--codebooks must be at least 1, got {arguments.codebooks}")
    recordings = list(_find(arguments.inputs))
    sources = {recording.path.resolve() for recording in recordings}
    targets = {recording.name: _target(arguments.out, recording.name) for recording in recordings}
    for target in targets.values():
        if target.resolve() in sources:
            raise ValueError(f"{target}: is one of the input recordings; choose another --out")
    _check_absent(targets.values(), arguments.overwrite)
    codec = _load(arguments.codec, arguments.device)
    books = codec.num_codebooks if arguments.codebooks is None else arguments.codebooks
    if books > codec.num_codebooks:
        raise ValueError(f"--codebooks must lie between 1 and {codec.num_codebooks}, got {books}")
    skipped: list[str] = []
    for name, codes, seconds in _encode_all(codec, recordings, skipped):
        _write(codec, codes[:books], seconds, targets[name])
    _report(arguments.out, len(recordings), skipped)


def _import(arguments: argparse.Namespace) -> None:
    from codec.interop.lmspt import import_lmspt
    from codec.interop.speechtokenizer import import_speechtokenizer
    from codec.io import WEIGHTS_FILE, atomic_files, check_out_folder

    check_out_folder(arguments.out)
    files = [arguments.out / name for name in ("config.json", WEIGHTS_FILE)]
    for source in (arguments.config, arguments.checkpoint):
        if source.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"{source}: is an input file; choose another OUT")
    _check_absent(files, arguments.overwrite)
    read = import_lmspt if arguments.kind == "lmspt" else import_speechtokenizer
    codec = read(arguments.config, arguments.checkpoint)
    with atomic_files(arguments.out) as temporary:
        codec.save_pretrained(temporary)
        if (arguments.out / "README.md").exists():
            (temporary / "README.md").unlink()
    codec.source = str(arguments.out)
    _print_json(_facts(codec.stamp))


def _export(arguments: argparse.Namespace) -> None:
    from codec.interop.lmspt import export_lmspt, lmspt_files
    from codec.interop.speechtokenizer import (
        CHECKPOINT_FILE,
        CONFIG_FILE,
        check_export_folder,
        export_speechtokenizer,
    )
    from codec.io import check_out_folder

    is_lmspt = arguments.kind == "lmspt"
    (check_out_folder if is_lmspt else check_export_folder)(arguments.out)
    codec = _load_own(arguments.codec, "exported")
    names = lmspt_files(codec.config) if is_lmspt else (CONFIG_FILE, CHECKPOINT_FILE)
    _check_absent([arguments.out / name for name in names], arguments.overwrite)
    write = export_lmspt if is_lmspt else export_speechtokenizer
    write(codec, arguments.out, overwrite=arguments.overwrite)
    _print_json({"out": str(arguments.out), "codec": _facts(codec.stamp)})


def _halve(arguments: argparse.Namespace) -> None:
    from codec.io import WEIGHTS_FILE, check_out_folder
    from codec.models.codec import save_half_precision, to_half_precision

    check_out_folder(arguments.out)
    _check_absent([arguments.out / WEIGHTS_FILE], arguments.overwrite)
    codec = _load_own(arguments.codec, "rounded")
    if codec.auxiliary is not None:
        codec = codec.without_auxiliary()
    save_half_precision(to_half_precision(codec), arguments.out)
    _print_json({"out": str(arguments.out), "codec": _facts(codec.stamp)})


class Recording(NamedTuple):
    """An input file and the name of its results."""

    path: Path
    name: str


def _find(inputs: Sequence[Path]) -> Iterator[Recording]:
    """Files are named by their stem; files in folders by their path inside, without suffix.

    If a name occurs again, -2, -3 and so on are appended.
    """
    from codec.audio import recordings_in

    taken: set[str] = set()
    for given in inputs:
        if not given.exists():
            raise ValueError(f"{given}: no such recording or folder")
        files = [given]
        if given.is_dir():
            files = [path for path in recordings_in(given) if path.is_file()]
            if not files:
                raise ValueError(f"{given}: no recording in this folder")
        for path in files:
            stem = path.relative_to(given).with_suffix("") if given.is_dir() else Path(path.stem)
            name, count = stem.as_posix(), 1
            while name in taken:
                count += 1
                name = f"{stem.as_posix()}-{count}"
            if count > 1:
                logger.warning(
                    "%s: the name %s is taken; its results are named %s", path, stem, name
                )
            taken.add(name)
            yield Recording(path, name)


def _encode_all(
    codec: "SpeechCodec", recordings: Sequence[Recording], skipped: list[str]
) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, codes (Q,T) and duration in seconds of each readable recording, in bounded memory.

    Unreadable ones are added to `skipped`. Raises `ValueError` if all are unreadable.
    """
    from codec.tokenize import encode_recording

    for recording in _progress(recordings):
        try:
            codes, seconds = encode_recording(recording.path, codec)
        except ValueError as error:
            skipped.append(str(error))
            if len(skipped) < len(recordings):
                continue
            others = f" (and {len(skipped) - 1} more unreadable)" if len(skipped) > 1 else ""
            raise ValueError(f"{error}{others}") from error
        yield recording.name, codes, seconds


def _write(codec: "SpeechCodec", codes: np.ndarray, seconds: float, target: Path) -> None:
    from codec.audio import write_audio

    def blocks() -> Iterator[np.ndarray]:
        left = round(seconds * codec.sample_rate)  # The last frame may extend beyond the end.
        for block in codec.decode_stream(codes.astype(np.int64)):
            yield block[:left]
            left -= len(block[:left])

    write_audio(target, blocks(), codec.sample_rate)


def _target(folder: Path, name: str) -> Path:
    from codec.io import path_of_id

    return path_of_id(folder, name, ".wav")


def _check_absent(targets: Iterable[Path], overwrite: bool, remedy: str = "folder") -> None:
    """Raises `ValueError` if a file to write exists already, unless `overwrite`.

    Args:
        remedy: what the user may choose another one of.
    """
    existing = [] if overwrite else [target for target in targets if target.exists()]
    if existing:
        others = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise ValueError(
            f"{existing[0]}: exists already{others}; choose another {remedy} or use --overwrite"
        )


def _report(out: Path, total: int, skipped: Sequence[str]) -> None:
    for reason in skipped:
        logger.warning("skipped: %s", reason)
    done = {"out": str(out), "recordings": total - len(skipped), "skipped": len(skipped)}
    print(to_json_line(done))


def _print_json(facts: dict[str, object]) -> None:
    print(json.dumps(facts, indent=2, ensure_ascii=False))


def _load(path: str, device: str) -> "SpeechCodec":
    from codec.models.codec import load_codec

    return load_codec(path, device=device)


def _load_own(path: str, done: str) -> "Codec":
    """An unfolded codec of this project. Raises `ValueError` for one of transformers."""
    from codec.models.codec import Codec, load_codec

    codec = load_codec(path, fold=False)
    if not isinstance(codec, Codec):
        raise ValueError(f"{path}: is a codec of transformers; only codecs of ours can be {done}")
    return codec


def _progress(items: Sequence[T]) -> Iterable[T]:
    from tqdm import tqdm

    return tqdm(items, disable=len(items) < 2 or not sys.stderr.isatty())


if __name__ == "__main__":
    main()
