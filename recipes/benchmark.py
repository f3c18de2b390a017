"""Scores systems on lists into OUT/rows.jsonl, and prints the table.

    python recipes/benchmark.py reconstruction --codec DIR --cuts CUTS --judge DIR --out OUT
    python recipes/benchmark.py tts --list RESULTS.jsonl --judge DIR --out OUT
    python recipes/benchmark.py asr --list TRANSCRIPTS.jsonl --out OUT
    python recipes/benchmark.py speed --codec DIR --random mimi --out OUT

Started again after an interruption it goes on where it stopped: what an utterance scored lies in
OUT/utterances/, one file per system and judge.
"""

import argparse
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codec.audio import read_audio, resample, write_audio
from codec.io import sha256_of
from codec.program import ArgumentParser
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    Utterance,
    append_rows,
    digest_of,
    read_rows,
    rows_of,
    score_asr,
    score_original,
    score_reconstruction,
    score_tts,
    table,
)
from recipes.lib.run import git_revision
from recipes.scoring.judges import (
    Judges,
    Task,
    digest_of_voice,
    load_judges,
    safe_name,
    score_all,
    state_of_files,
)
from recipes.scoring.speed import add_command, benchmark_speed

logger = logging.getLogger(__name__)


def finish(out: Path, rows: Iterable[Row]) -> None:
    """Adds rows that are not there yet to OUT/rows.jsonl and prints the table of these rows."""
    new = list(rows)
    known = set(read_rows(out / "rows.jsonl"))
    append_rows(out / "rows.jsonl", [row for row in new if row not in known])
    print(table(new))


def benchmark_reconstruction(args: argparse.Namespace) -> None:
    """Originals and their reconstructions by one codec."""
    from codec import load_codec
    from codec.training.data import load_cut, read_cuts

    codec = load_codec(args.codec, device=args.device)
    num_codebooks = codec.num_codebooks if args.codebooks is None else args.codebooks
    if not 1 <= num_codebooks <= codec.num_codebooks:
        raise ValueError(f"--codebooks must be 1 to {codec.num_codebooks}, got {num_codebooks}")
    if args.auxiliary:
        if getattr(codec, "auxiliary", None) is None:
            raise ValueError(f"--auxiliary: {args.codec} has no auxiliary decoder")
        num_codebooks = 1
    judges = judges_of(args)
    cuts = list(read_cuts(args.cuts))[: args.limit]
    rate, digest = codec.sample_rate, codec.stamp.digest
    if args.auxiliary:  # The stamp's digest leaves that decoder out.
        digest = sha256_of(f"{digest} {digest_of_module(codec.auxiliary)}", 16)
    part = "auxiliary" if args.auxiliary else num_codebooks
    name = args.name or f"{Path(args.codec).name}-{part}"

    def original(cut: Any) -> Utterance:
        wave = load_cut(cut, rate)
        return score_original(cut.id, text_of(cut), wave, rate, judges.transcribe)

    def reconstruction(cut: Any) -> Utterance:
        wave = load_cut(cut, rate)
        coded = reconstruct(codec, wave, num_codebooks, auxiliary=args.auxiliary)
        folder = args.out / "waves" / safe_name(name)
        write_audio(folder / f"{safe_name(cut.id)}.wav", np.nan_to_num(coded), rate)
        return score_reconstruction(
            cut.id, text_of(cut), wave, coded, rate, judges.transcribe, judges.embed
        )

    base = f"{digest_of(args.cuts)} {state_of_files(recordings_of(cuts))} {rate} "
    base += f"{judges.judge_name} {args.language}"
    before = [Task(cut.id, lambda cut=cut: original(cut)) for cut in cuts]
    after = [Task(cut.id, lambda cut=cut: reconstruction(cut)) for cut in cuts]
    key = f"{base} {judges.speaker_name} {digest} {num_codebooks}"
    bits = sum(math.log2(size) for size in codec.codebook_sizes[:num_codebooks])
    constants = {"bitrate": codec.frame_rate * bits}
    kept = score_all(args.out, before, base, "original")
    coded = score_all(args.out, after, key, name)
    finish(
        args.out,
        rows_of(args.list_name, kept, origin(args, "original", judges))
        + rows_of(args.list_name, coded, origin(args, name, judges, model=digest), constants),
    )


def digest_of_module(module: Any) -> str:
    """Of its tensors, by their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def recordings_of(cuts: Iterable[Any]) -> list[Path]:
    """The files behind cuts of one recording each."""
    recordings = [cut.recording for cut in cuts if getattr(cut, "recording", None) is not None]
    return [
        Path(source.source)
        for recording in recordings
        for source in recording.sources
        if source.type == "file"
    ]


def reconstruct(
    codec: Any, wave: np.ndarray, num_codebooks: int, *, auxiliary: bool = False
) -> np.ndarray:
    """The wave after encoding and decoding, at its own length and rate.

    `auxiliary` is LM-SPT's decoder of the semantic codebook alone.
    """
    import torch

    with torch.inference_mode():
        batch = torch.from_numpy(wave)[None, None].to(codec.device)
        lengths = torch.tensor([wave.size], device=codec.device)
        codes = codec.encode(batch, lengths, num_codebooks=num_codebooks)
        if not auxiliary:
            decoded = codec.decode(codes.codes, codes.lengths)
            return decoded[0, 0, : wave.size].float().cpu().numpy()
        spoken = codec.resynthesize(codes.codes, codes.lengths)[0, 0].float().cpu().numpy()
    coded = resample(spoken, codec.config.lmspt.auxiliary.sample_rate, codec.sample_rate)
    return coded[: wave.size]


def benchmark_tts(args: argparse.Namespace) -> None:
    """A list of spoken texts: what `slm tts --list` leaves, or any with id, text, audio, prompt."""
    judges = judges_of(args)
    entries = read_list(args.list, ("id", "text", "audio"))[: args.limit]
    tasks = [
        Task(entry["id"], lambda one=entry: score_spoken(one, args, judges)) for entry in entries
    ]
    name = args.name or args.list.resolve().parent.name
    files = [locate(one["audio"], args.list) for one in entries if one["audio"] is not None]
    if judges.embed is not None:
        prompts = [one["prompt"] for one in entries if one.get("prompt")]
        files += [locate(prompt, args.list, args.prompts) for prompt in prompts]
    model = model_of(args)
    key = f"{name} {model} {digest_of(args.list)} {state_of_files(files)} {judges.judge_name}"
    key += f" {judges.speaker_name} {args.language} {args.rate}"
    scored = score_all(args.out, tasks, key, name)
    seed = min((one.seed for one in scored if one.seed is not None), default=0)
    where = origin(args, name, judges, model=model, seed=seed)
    finish(args.out, rows_of(args.list_name, scored, where))


def score_spoken(entry: dict[str, Any], args: argparse.Namespace, judges: Judges) -> Utterance:
    """The scores of one line. What the system did not say, or not audibly, it failed to say."""
    failure, wave, prompt = entry.get("failure"), np.zeros(0, np.float32), None
    if entry["audio"] is None:
        failure = failure or "refused"
    else:
        try:
            wave = read_audio(locate(entry["audio"], args.list), args.rate)
        except ValueError as error:  # Nothing there, silence or NaN.
            failure = failure or str(error)
    if wave.size and judges.embed is not None and entry.get("prompt"):
        prompt = read_audio(locate(entry["prompt"], args.list, args.prompts), args.rate)
    scored = score_tts(
        entry["id"],
        entry["text"],
        wave,
        args.rate,
        judges.transcribe,
        judges.embed,
        None if prompt is None else (prompt, args.rate),
        failure,
    )
    return replace(scored, seed=entry.get("seed"))


def benchmark_asr(args: argparse.Namespace) -> None:
    """A list of transcripts: text and hypothesis, or what `slm asr` prints and --references."""
    heard = {name_of(entry, args.list): entry for entry in read_list(args.list, ("text",))}
    if args.references is None:
        pairs = {name: (one["text"], one.get("hypothesis")) for name, one in heard.items()}
        lacking = [name for name, (_, hypothesis) in pairs.items() if hypothesis is None]
        if lacking:
            raise ValueError(
                f"{args.list}: {lacking[0]} has no hypothesis; --references names a list with "
                "the texts"
            )
    else:
        texts = {
            name_of(entry, args.references): entry["text"]
            for entry in read_list(args.references, ("text",))
        }
        foreign = [name for name in heard if name not in texts]
        if foreign:
            raise ValueError(f"{args.references}: has no text for {foreign[0]}")
        pairs = {name: (text, _hypothesis(heard.get(name))) for name, text in texts.items()}
    pairs = dict(list(pairs.items())[: args.limit])
    lost = sum(hypothesis is None for _, hypothesis in pairs.values())
    if lost:
        logger.warning("%d of %d have no transcript: all their words are lost", lost, len(pairs))
    scored = [
        score_asr(name, spoken, hypothesis or "", args.language)
        for name, (spoken, hypothesis) in pairs.items()
    ]
    where = origin(args, args.name or args.list.stem, model=model_of(args))
    finish(args.out, rows_of(args.list_name, scored, where, prefix=ASR_PREFIX))


def _hypothesis(entry: dict[str, Any] | None) -> str | None:
    return None if entry is None else entry.get("hypothesis", entry["text"])


def read_list(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON Lines list whose lines have the needed keys, with every id once."""
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(f"{path}, line {number}: lacks {', '.join(lacking)}")
        name = name_of(entry, path)
        if name in seen:
            raise ValueError(f"{path}, line {number}: {name!r} is there twice")
        seen.add(name)
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path}: the list is empty")
    return entries


def name_of(entry: dict[str, Any], path: Path) -> str:
    """An entry's id, or its recording's name without the suffix."""
    if "id" not in entry and "audio" not in entry:
        raise ValueError(f"{path}: a line has neither id nor audio")
    return str(entry["id"]) if "id" in entry else Path(entry["audio"]).stem


def locate(name: str, path: Path, folder: Path | None = None) -> Path:
    """A list's recording: as it stands, beside the list, or in `folder`."""
    places = [Path(name), path.parent / name] + ([folder / name] if folder else [])
    return next((place for place in places if place.is_file()), places[1])


def text_of(cut: Any) -> str:
    """Words of a cut."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions).strip()


def judges_of(args: argparse.Namespace) -> Judges:
    """The judge and, where one is named, the speaker encoder."""
    return load_judges(args.judge, args.speaker, num_threads=args.threads, language=args.language)


def model_of(args: argparse.Namespace) -> str:
    """The digest of the scored model; "" where the command line says nothing of it."""
    return digest_of_voice(args.voice) if args.voice is not None else args.model_digest


def origin(
    args: argparse.Namespace,
    system: str,
    judges: Judges | None = None,
    *,
    model: str = "",
    seed: int = 0,
) -> Provenance:
    """What the rows of this run share. Its configuration: the lists' contents and the options."""
    lists = [args.cuts] if args.kind == "reconstruction" else [args.list]
    if getattr(args, "references", None) is not None:
        lists.append(args.references)
    named = ("limit", "language", "rate", "codebooks", "auxiliary")
    options = {key: getattr(args, key, None) for key in named}
    settings = {"kind": args.kind, "lists": [digest_of(path) for path in lists], **options}
    return Provenance(
        system=system,
        seed=seed,
        git=git_revision(),
        config=sha256_of(json.dumps(settings, sort_keys=True), 16),
        model=model,
        judge=judges.judge_name if judges else "",
        speaker=judges.speaker_name if judges else "",
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl and waves")
    shared.add_argument("--name", help="what the rows call the system")
    shared.add_argument("--list-name", help="what the rows call the list (default: its file name)")
    shared.add_argument("--limit", type=int, help="score only the first N")
    shared.add_argument("--language", default="en", help="default: en")
    judged = argparse.ArgumentParser(add_help=False)
    judged.add_argument("--judge", type=Path, required=True, help="Whisper folder (CTranslate2)")
    judged.add_argument("--speaker", type=Path, help="speaker encoder folder; none: no similarity")
    judged.add_argument("--threads", type=int, default=2, help="of the judge (default: 2)")
    parser = ArgumentParser(description="Scores systems on lists.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = kinds.add_parser("reconstruction", parents=[shared, judged], help="a codec on cuts")
    kind.add_argument("--codec", required=True, metavar="DIR", help="folder or hub id")
    kind.add_argument("--cuts", type=Path, required=True, help="list of cuts")
    kind.add_argument("--codebooks", type=int, help="use the first N (default: all)")
    kind.add_argument(
        "--auxiliary", action="store_true", help="LM-SPT's decoder of the semantic codebook alone"
    )
    kind.add_argument("--device", default="cpu", help="cpu or cuda")
    for name, what in (("tts", "spoken texts"), ("asr", "transcripts")):
        parents = [shared, judged] if name == "tts" else [shared]
        kind = kinds.add_parser(name, parents=parents, help=f"a list of {what}")
        kind.add_argument("--list", type=Path, required=True, help="JSON lines")
        kind.add_argument("--voice", type=Path, help="folder of the voice: rows note its digest")
        kind.add_argument("--model-digest", default="", help="digest of a model that is no voice")
        if name == "tts":
            kind.add_argument("--rate", type=int, default=16000, help="Hz to score at")
            kind.add_argument("--prompts", type=Path, help="folder that prompts' paths count from")
        else:
            kind.add_argument("--references", type=Path, help="list of audio or id, and text")
    add_command(kinds)
    args = parser.parse_args(argv)
    if args.kind == "speed":
        return args
    if getattr(args, "auxiliary", False) and args.codebooks is not None:
        raise ValueError("--auxiliary hears the semantic codebook alone: leave --codebooks out")
    scored = args.cuts if args.kind == "reconstruction" else args.list
    args.list_name = args.list_name or scored.name.partition(".jsonl")[0]
    return args


def main(argv: Sequence[str]) -> None:
    """Scores one system on one list."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.kind == "reconstruction":
        benchmark_reconstruction(args)
    elif args.kind == "tts":
        benchmark_tts(args)
    elif args.kind == "speed":
        finish(args.out, benchmark_speed(args))
    else:
        benchmark_asr(args)


if __name__ == "__main__":
    from recipes.lib.run import run_program

    run_program(main)
