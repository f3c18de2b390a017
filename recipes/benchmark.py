"""Scores systems on lists into OUT/rows.jsonl, and prints the table.

    python recipes/benchmark.py reconstruction --codec DIR --cuts CUTS --judge DIR --out OUT
    python recipes/benchmark.py tts --list RESULTS.jsonl --judge DIR --out OUT
    python recipes/benchmark.py asr --list TRANSCRIPTS.jsonl --out OUT

Started again after an interruption it goes on where it stopped: what an utterance scored lies in
OUT/utterances/, one file per system and judge.
"""

import argparse
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from codec.audio import read_audio, write_audio
from eval.benchmark import (
    Provenance,
    Row,
    Utterance,
    append_lines,
    append_rows,
    digest_of,
    read_lines,
    read_rows,
    rows_of,
    score_asr,
    score_original,
    score_reconstruction,
    score_tts,
    table,
)
from eval.speaker import SpeakerEncoder
from eval.transcribe import Judge
from recipes.common import git_revision

logger = logging.getLogger(__name__)


class Judges(NamedTuple):
    """The models that score, and what the rows call them."""

    judge: Judge
    encoder: SpeakerEncoder | None
    judge_name: str
    speaker_name: str


class Task(NamedTuple):
    """One utterance that has still to be scored."""

    id: str
    score: Callable[[], Utterance]


def load_judges(args: argparse.Namespace) -> Judges:
    """The judge and, where one is named, the speaker encoder."""
    judge = Judge(args.judge, num_threads=args.threads, language=args.language)
    name = f"{args.judge.name}@{digest_of(args.judge / 'model.bin')} {judge.compute_type}"
    if args.speaker is None:
        return Judges(judge, None, name, "")
    encoder = SpeakerEncoder.from_folder(args.speaker)
    digest = digest_of(args.speaker / "model.safetensors")
    return Judges(judge, encoder, name, f"{args.speaker.name}@{digest}")


def score_all(folder: Path, tasks: Sequence[Task], key: str, label: str) -> list[Utterance]:
    """Scores what is not stored yet and stores it; a bad recording is left out and listed.

    `key` tells apart the systems, lists and judges that share a folder.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    stored = folder / "utterances" / f"{label}-{digest}.jsonl"
    done = {one.id: one for one in map(Utterance.from_json, read_lines(stored))}
    skipped: list[str] = []
    for task in tqdm(tasks, label, unit="utterance"):
        if task.id in done:
            continue
        try:
            done[task.id] = task.score()
        except (ValueError, OSError) as error:
            skipped.append(json.dumps({"id": task.id, "reason": str(error)}, ensure_ascii=False))
            continue
        append_lines(stored, [done[task.id].to_json()])
    if skipped:
        logger.warning("%d of %d utterances of %s skipped", len(skipped), len(tasks), label)
    (folder / f"skipped-{label}.jsonl").write_text(
        "".join(line + "\n" for line in skipped), encoding="utf-8"
    )
    scored = [done[task.id] for task in tasks if task.id in done]
    for metric in sorted({metric for one in scored for metric in one.missing}):
        count = sum(metric in one.missing for one in scored)
        logger.warning("%s is not defined for %d utterances of %s", metric, count, label)
    if not scored:
        raise ValueError(f"no utterance of {label} could be scored: {'; '.join(skipped[:2])}")
    return scored


def finish(out: Path, rows: Iterable[Row]) -> None:
    """Adds rows that are not there yet to OUT/rows.jsonl and prints the table of these rows."""
    new = list(rows)
    known = set(read_rows(out / "rows.jsonl"))
    append_rows(out / "rows.jsonl", [row for row in new if row not in known])
    print(table(new))


def benchmark_reconstruction(args: argparse.Namespace) -> None:
    """Originals and their reconstructions by one codec."""
    from codec import load_codec
    from codec.data import load_cut, read_cuts

    codec = load_codec(args.codec, device=args.device)
    num_codebooks = args.codebooks or codec.num_codebooks
    if not 1 <= num_codebooks <= codec.num_codebooks:
        raise ValueError(f"--codebooks must be 1 to {codec.num_codebooks}, got {num_codebooks}")
    judges = load_judges(args)
    cuts = list(read_cuts(args.cuts))[: args.limit]
    rate, digest = codec.sample_rate, codec.stamp.digest
    name = args.name or f"{args.codec.name}-{num_codebooks}"
    embed = judges.encoder.embed if judges.encoder is not None else None

    def original(cut: Any) -> Utterance:
        wave = load_cut(cut, rate)
        return score_original(cut.id, text_of(cut), wave, rate, judges.judge.transcribe)

    def reconstruction(cut: Any) -> Utterance:
        wave = load_cut(cut, rate)
        coded = reconstruct(codec, wave, num_codebooks)
        write_audio(args.out / "waves" / name / f"{safe_name(cut.id)}.wav", coded, rate)
        transcribe = judges.judge.transcribe
        return score_reconstruction(cut.id, text_of(cut), wave, coded, rate, transcribe, embed)

    base = f"{args.cuts.resolve()} {rate} {judges.judge_name} {args.language}"
    before = [Task(cut.id, lambda cut=cut: original(cut)) for cut in cuts]
    after = [Task(cut.id, lambda cut=cut: reconstruction(cut)) for cut in cuts]
    key = f"{base} {judges.speaker_name} {digest} {num_codebooks}"
    bits = sum(math.log2(size) for size in codec.codebook_sizes[:num_codebooks])
    constants = {"bitrate": codec.frame_rate * bits}
    kept = score_all(args.out, before, base, "original")
    coded = score_all(args.out, after, key, name)
    finish(
        args.out,
        rows_of(args.list_name, kept, origin(args, judges, "original", ""))
        + rows_of(args.list_name, coded, origin(args, judges, name, digest), constants),
    )


def reconstruct(codec: Any, wave: np.ndarray, num_codebooks: int) -> np.ndarray:
    """The wave after encoding and decoding, at its own length."""
    import torch

    with torch.inference_mode():
        batch = torch.from_numpy(wave)[None, None].to(codec.device)
        lengths = torch.tensor([wave.size], device=codec.device)
        codes = codec.encode(batch, lengths, num_codebooks=num_codebooks)
        decoded = codec.decode(codes.codes, codes.lengths)
    return decoded[0, 0, : wave.size].float().cpu().numpy()


def benchmark_tts(args: argparse.Namespace) -> None:
    """A list of spoken texts: what `slm tts --list` leaves, or any with id, text, audio, prompt."""
    judges = load_judges(args)
    embed = judges.encoder.embed if judges.encoder is not None else None

    def score(entry: dict[str, Any]) -> Utterance:
        failure, wave, prompt = entry.get("failure"), np.zeros(0, np.float32), None
        spoken = locate(entry["audio"], args.list)
        if failure is None and not spoken.is_file():
            raise ValueError(f"{spoken}: no such recording")
        try:
            wave = read_audio(spoken, args.rate)
        except ValueError as error:  # silence is a failure of the system, and counts as one
            failure = failure or str(error)
        if embed is not None and entry.get("prompt"):
            prompt = read_audio(locate(entry["prompt"], args.list, args.prompts), args.rate)
        return score_tts(
            entry["id"],
            entry["text"],
            wave,
            args.rate,
            judges.judge.transcribe,
            embed,
            None if prompt is None else (prompt, args.rate),
            failure,
        )

    entries = read_list(args.list, ("id", "text", "audio"))[: args.limit]
    tasks = [Task(entry["id"], lambda entry=entry: score(entry)) for entry in entries]
    name = args.name or args.list.resolve().parent.name
    key = f"{name} {digest_of(args.list)} {judges.judge_name} {judges.speaker_name} {args.language}"
    scored = score_all(args.out, tasks, f"{key} {args.rate}", name)
    finish(args.out, rows_of(args.list_name, scored, origin(args, judges, name, args.model_digest)))


def benchmark_asr(args: argparse.Namespace) -> None:
    """A list of transcripts: text and hypothesis, or what `slm asr` prints and --references."""
    entries = read_list(args.list, ("text",))[: args.limit]
    references: dict[str, str] | None = None
    if args.references is not None:
        listed = read_list(args.references, ("text",))
        references = {name_of(entry, args.references): entry["text"] for entry in listed}
    scored: list[Utterance] = []
    for entry in entries:
        name = name_of(entry, args.list)
        if references is None:
            spoken, heard = entry["text"], entry.get("hypothesis")
        else:
            spoken, heard = references.get(name), entry.get("hypothesis", entry["text"])
        if heard is None:
            raise ValueError(
                f"{args.list}: {name} has no hypothesis; --references names a list with the texts"
            )
        if spoken is None:
            raise ValueError(f"{args.references}: has no text for {name}")
        scored.append(score_asr(name, spoken, heard, args.language))
    name = args.name or args.list.stem
    where = Provenance(system=name, git=git_revision(), model=args.model_digest)
    finish(args.out, rows_of(args.list_name, scored, where))


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


def safe_name(name: str) -> str:
    """A file name for an id: no folder, and never a hidden file."""
    return name.replace("/", "-").lstrip(".") or "unnamed"


def origin(args: argparse.Namespace, judges: Judges, system: str, digest: str) -> Provenance:
    """What the rows of this run share."""
    return Provenance(
        system=system,
        git=git_revision(),
        model=digest,
        judge=judges.judge_name,
        speaker=judges.speaker_name,
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
    parser = argparse.ArgumentParser(description="Scores systems on lists.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = kinds.add_parser("reconstruction", parents=[shared, judged], help="a codec on cuts")
    kind.add_argument("--codec", type=Path, required=True, help="codec folder")
    kind.add_argument("--cuts", type=Path, required=True, help="list of cuts")
    kind.add_argument("--codebooks", type=int, help="use the first N (default: all)")
    kind.add_argument("--device", default="cpu", help="cpu or cuda")
    for name, what in (("tts", "spoken texts"), ("asr", "transcripts")):
        parents = [shared, judged] if name == "tts" else [shared]
        kind = kinds.add_parser(name, parents=parents, help=f"a list of {what}")
        kind.add_argument("--list", type=Path, required=True, help="JSON lines")
        kind.add_argument("--model-digest", default="", help="digest of the scored model")
        if name == "tts":
            kind.add_argument("--rate", type=int, default=16000, help="Hz to score at")
            kind.add_argument("--prompts", type=Path, help="folder that prompts' paths count from")
        else:
            kind.add_argument("--references", type=Path, help="list of audio or id, and text")
    args = parser.parse_args(argv)
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
    else:
        benchmark_asr(args)


if __name__ == "__main__":
    from recipes.common import run_program

    run_program(main)
