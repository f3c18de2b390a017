"""Scores systems on lists into OUT/rows.jsonl, and prints the table.

    python recipes/benchmark.py reconstruction --codec DIR --cuts CUTS --judge DIR --out OUT
    python recipes/benchmark.py tts --list RESULTS.jsonl --judge DIR --out OUT
    python recipes/benchmark.py asr --list TRANSCRIPTS.jsonl --out OUT
    python recipes/benchmark.py tokens --codec DIR --train CUTS --dev CUTS --judge DIR --out OUT
    python recipes/benchmark.py speed --codec DIR --random mimi --out OUT

An interrupted run resumes: the scores of each utterance lie in OUT/utterances/, one file per system
and judge.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from codec.audio import read_audio, resample_wave, write_audio
from codec.io import sha256_of, sha256_of_tensors
from codec.json_lines import read_json_lines
from codec.program import ArgumentParser, counted
from codec.tokenize import text_of
from codec.training.run import git_revision
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    ScoredUtterance,
    rows_of,
    score_asr,
    score_reconstruction,
    score_tts,
    table,
)
from recipes.lib.run import finished, run_recipe
from recipes.scoring import tokens
from recipes.scoring.judges import (
    Judges,
    Task,
    digest_of_voice,
    load_judges,
    safe_name,
    score_all,
    state_of_files,
)
from recipes.scoring.rows import append_rows, read_rows
from recipes.scoring.speed import add_command, benchmark_speed

logger = logging.getLogger(__name__)


def report_rows(
    kind: str, out: Path, rows: Iterable[Row], columns: Sequence[str] | None = None
) -> None:
    """Appends new rows to OUT/rows.jsonl, and prints the table of `rows`.

    Args:
        columns: metrics of the table (default: all).
    """
    new = list(rows)
    known = set(read_rows(out / "rows.jsonl"))
    append_rows(out / "rows.jsonl", [row for row in new if row not in known])
    present = {row.metric for row in new}
    print(table(new, columns and [one for one in columns if one in present]))
    again = (
        f"python recipes/benchmark.py {kind} ... --out {out}   (adds the scores of another system)"
    )
    finished(f"scores of {counted(len(new), 'row')}", out / "rows.jsonl", again)


def benchmark_reconstruction(args: argparse.Namespace) -> None:
    """Scores recordings and their reconstructions by a codec.

    Raises:
        ValueError: a model, list or option is invalid, or no recording can be scored.
    """
    from codec import load_codec
    from codec.training.data import load_cut, read_cuts

    codec = load_codec(args.codec, device=args.device)
    num_codebooks = codec.num_codebooks if args.codebooks is None else args.codebooks
    if not 1 <= num_codebooks <= codec.num_codebooks:
        raise ValueError(f"--codebooks must be 1 to {codec.num_codebooks}, got {num_codebooks}")
    auxiliary: Any = getattr(codec, "auxiliary", None)
    if args.auxiliary:
        if auxiliary is None:
            raise ValueError(f"--auxiliary: {args.codec} has no auxiliary decoder; leave it out")
        num_codebooks = 1
    judges = judges_of(args)
    cuts = list(read_cuts(args.cuts))[: args.limit]
    rate, digest = codec.sample_rate, codec.stamp.digest
    if args.auxiliary:  # The stamp's digest is without that decoder.
        added = sha256_of_tensors(sorted(auxiliary.state_dict().items()))
        digest = sha256_of(f"{digest} {added}", 16)
    part = "auxiliary" if args.auxiliary else num_codebooks
    name = args.name or f"{Path(args.codec).name}-{part}"

    def original(cut: Any) -> ScoredUtterance:
        wave = load_cut(cut, rate)
        return score_asr(cut.id, text_of(cut), judges.transcribe(wave, rate))

    def reconstruction(cut: Any) -> ScoredUtterance:
        wave = load_cut(cut, rate)
        coded = reconstruct(codec, wave, num_codebooks, auxiliary=args.auxiliary)
        folder = args.out / "waves" / safe_name(name)
        write_audio(folder / f"{safe_name(cut.id)}.wav", np.nan_to_num(coded), rate)
        return score_reconstruction(
            cut.id, text_of(cut), wave, coded, rate, judges.transcribe, judges.embed
        )

    base = f"{sha256_of(args.cuts, 16)} {state_of_files(recordings_of(cuts))} {rate} "
    base += f"{judges.judge_name} {args.language}"
    before = [Task(cut.id, lambda cut=cut: original(cut)) for cut in cuts]
    after = [Task(cut.id, lambda cut=cut: reconstruction(cut)) for cut in cuts]
    key = f"{base} {judges.speaker_name} {digest} {num_codebooks}"
    bits = sum(math.log2(size) for size in codec.codebook_sizes[:num_codebooks])
    constants = {"bitrate": codec.frame_rate * bits}
    kept = score_all(args.out, before, base, "original")
    coded = score_all(args.out, after, key, name)
    report_rows(
        args.kind,
        args.out,
        rows_of(args.list_name, kept, origin(args, "original", judges))
        + rows_of(args.list_name, coded, origin(args, name, judges, model=digest), constants),
    )


def recordings_of(cuts: Iterable[Any]) -> list[Path]:
    """Returns the audio files of cuts."""
    recordings = [cut.recording for cut in cuts if getattr(cut, "recording", None) is not None]
    return [
        Path(source.source)
        for recording in recordings
        for source in recording.sources
        if source.type == "file"
    ]


def reconstruct(
    codec: Any, wave: Float[np.ndarray, " S"], num_codebooks: int, *, auxiliary: bool = False
) -> Float[np.ndarray, " s"]:
    """Returns a wave (S,) encoded and decoded, at its own length and rate.

    Args:
        auxiliary: decode the semantic codebook alone with LM-SPT's auxiliary decoder
            (arXiv 2506.16738).
    """
    import torch

    with torch.inference_mode():
        batch = torch.from_numpy(wave)[None, None].to(codec.device)
        lengths = torch.tensor([wave.size], device=codec.device)
        codes = codec.encode(batch, lengths, num_codebooks=num_codebooks)
        if not auxiliary:
            decoded = codec.decode(codes.codes, codes.lengths)
            return decoded[0, 0, : wave.size].float().cpu().numpy()
        decoded = codec.resynthesize(codes.codes, codes.lengths)[0, 0].float().cpu().numpy()
    rate = codec.config.lmspt.auxiliary.sample_rate
    return resample_wave(decoded, rate, codec.sample_rate)[: wave.size]


def benchmark_tts(args: argparse.Namespace) -> None:
    """Scores a list of synthesized texts: results.jsonl of `slm tts --list`, or any list with id,
    text, audio and prompt.

    Raises:
        ValueError: the list is invalid, or no item can be scored.
    """
    judges = judges_of(args)
    entries = read_entries(args.list, ("id", "text", "audio"))[: args.limit]
    tasks = [
        Task(entry["id"], lambda one=entry: score_entry(one, args, judges)) for entry in entries
    ]
    name = args.name or args.list.resolve().parent.name
    files = [locate(one["audio"], args.list) for one in entries if one["audio"] is not None]
    if judges.embed is not None:
        prompts = [one["prompt"] for one in entries if one.get("prompt")]
        files += [locate(prompt, args.list, args.prompts) for prompt in prompts]
    model = model_of(args)
    key = f"{name} {model} {sha256_of(args.list, 16)} {state_of_files(files)} {judges.judge_name}"
    key += f" {judges.speaker_name} {args.language} {args.rate}"
    scored = score_all(args.out, tasks, key, name)
    seed = min((one.seed for one in scored if one.seed is not None), default=0)
    where = origin(args, name, judges, model=model, seed=seed)
    report_rows(args.kind, args.out, rows_of(args.list_name, scored, where))


def score_entry(entry: dict[str, Any], args: argparse.Namespace, judges: Judges) -> ScoredUtterance:
    """Returns the scores of an entry. A missing, silent or non-finite wave is a failure."""
    failure, wave, prompt = entry.get("failure"), np.zeros(0, np.float32), None
    if entry["audio"] is None:
        failure = failure or "refused"
    else:
        try:
            wave = read_audio(locate(entry["audio"], args.list), args.rate)
        except ValueError as error:  # Missing, silent or NaN.
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
    """Scores a list of transcripts: text and hypothesis, or the output of `slm asr` and
    --references.

    Raises:
        ValueError: the list is invalid, or a text or hypothesis is missing.
    """
    entries = {entry_name(entry, args.list): entry for entry in read_entries(args.list, ("text",))}
    if args.references is None:
        pairs = {name: (one["text"], one.get("hypothesis")) for name, one in entries.items()}
        missing = [name for name, (_, hypothesis) in pairs.items() if hypothesis is None]
        if missing:
            raise ValueError(
                f"{args.list}: {missing[0]} has no hypothesis; --references names a list with "
                "the texts"
            )
    else:
        texts = {
            entry_name(entry, args.references): entry["text"]
            for entry in read_entries(args.references, ("text",))
        }
        foreign = [name for name in entries if name not in texts]
        if foreign:
            raise ValueError(f"{args.references}: has no text for {foreign[0]}")
        pairs = {name: (text, _hypothesis(entries.get(name))) for name, text in texts.items()}
    pairs = dict(list(pairs.items())[: args.limit])
    missing = sum(hypothesis is None for _, hypothesis in pairs.values())
    if missing:
        logger.warning("%d of %d have no transcript: deletions", missing, len(pairs))
    scored = [
        score_asr(name, text, hypothesis or "", args.language)
        for name, (text, hypothesis) in pairs.items()
    ]
    where = origin(args, args.name or args.list.stem, model=model_of(args))
    report_rows(args.kind, args.out, rows_of(args.list_name, scored, where, prefix=ASR_PREFIX))


def _hypothesis(entry: dict[str, Any] | None) -> str | None:
    return None if entry is None else entry.get("hypothesis", entry["text"])


def read_entries(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the entries of a JSON Lines list.

    Raises:
        ValueError: a line is no JSON, lacks a needed key or repeats an id; the list is empty.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, entry, _ in read_json_lines(path):
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(f"{path}, line {number}: lacks {', '.join(lacking)}")
        for key in {"text", "hypothesis", "audio", "prompt"} & entry.keys():
            if not isinstance(entry[key], str) and (key == "text" or entry[key] is not None):
                raise ValueError(f"{path}, line {number}: {key} is not a text: {entry[key]!r}")
        name = entry_name(entry, path)
        if name in seen:
            raise ValueError(f"{path}, line {number}: {name!r} is there twice")
        seen.add(name)
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path}: the list is empty")
    return entries


def entry_name(entry: dict[str, Any], path: Path) -> str:
    """Returns an entry's id, or its recording's name without the suffix.

    Args:
        path: the list, for the message.

    Raises:
        ValueError: the entry has neither.
    """
    if "id" not in entry and "audio" not in entry:
        raise ValueError(f"{path}: a line has neither id nor audio")
    return str(entry["id"]) if "id" in entry else Path(entry["audio"]).stem


def locate(name: str, path: Path, folder: Path | None = None) -> Path:
    """Returns a recording's path: `name` itself, relative to the list, or to `folder`."""
    places = [Path(name), path.parent / name] + ([folder / name] if folder else [])
    return next((place for place in places if place.is_file()), places[1])


def judges_of(args: argparse.Namespace) -> Judges:
    """Returns the judge and, if it is named, the speaker encoder."""
    return load_judges(args.judge, args.speaker, num_threads=args.threads, language=args.language)


def model_of(args: argparse.Namespace) -> str:
    """Returns the digest of the scored model; "" if the command line names none."""
    return digest_of_voice(args.voice) if args.voice is not None else args.model_digest


def origin(
    args: argparse.Namespace,
    system: str,
    judges: Judges | None = None,
    *,
    model: str = "",
    seed: int = 0,
) -> Provenance:
    """Returns the provenance of a run's rows; `config` is a digest of lists and options."""
    lists = [args.cuts] if args.kind == "reconstruction" else [args.list]
    if getattr(args, "references", None) is not None:
        lists.append(args.references)
    named = ("limit", "language", "rate", "codebooks", "auxiliary")
    options = {key: getattr(args, key, None) for key in named}
    settings = {"kind": args.kind, "lists": [sha256_of(path, 16) for path in lists], **options}
    return Provenance(
        system=system,
        seed=seed,
        git=git_revision(),
        config=sha256_of(json.dumps(settings, sort_keys=True), 16),
        model=model,
        judge=judges.judge_name if judges else "",
        speaker=judges.speaker_name if judges else "",
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl and waves")
    shared.add_argument("--name", help="name of the system in the rows")
    shared.add_argument("--list-name", help="name of the list in the rows (default: its file name)")
    shared.add_argument("--limit", type=int, help="score only the first N items")
    shared.add_argument("--language", default="en", help="default: en")
    judged = argparse.ArgumentParser(add_help=False)
    judged.add_argument("--judge", type=Path, required=True, help="Whisper folder (CTranslate2)")
    judged.add_argument("--speaker", type=Path, help="speaker encoder folder (default: none)")
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
    for name, what in (("tts", "synthesized texts"), ("asr", "transcripts")):
        parents = [shared, judged] if name == "tts" else [shared]
        kind = kinds.add_parser(name, parents=parents, help=f"a list of {what}")
        kind.add_argument("--list", type=Path, required=True, help="JSON lines")
        kind.add_argument("--voice", type=Path, help="folder of the voice, for its digest")
        kind.add_argument("--model-digest", default="", help="digest of another model")
        if name == "tts":
            kind.add_argument(
                "--rate",
                type=int,
                default=16000,
                help="in Hz, of scoring (default: 16000)",
            )
            kind.add_argument("--prompts", type=Path, help="folder of the prompts")
        else:
            kind.add_argument("--references", type=Path, help="list of audio or id, and text")
    tokens.add_command(kinds)
    add_command(kinds)
    args = parser.parse_args(argv)
    if args.kind in ("tokens", "speed"):
        return args
    if getattr(args, "auxiliary", False) and args.codebooks is not None:
        raise ValueError("--auxiliary decodes one codebook: leave --codebooks out")
    scored = args.cuts if args.kind == "reconstruction" else args.list
    args.list_name = args.list_name or scored.name.partition(".jsonl")[0]
    return args


def main(argv: Sequence[str]) -> None:
    """Scores one system on one list."""
    args = _parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.kind == "reconstruction":
        benchmark_reconstruction(args)
    elif args.kind == "tts":
        benchmark_tts(args)
    elif args.kind == "tokens":
        rows = tokens.benchmark_tokens(args)
        report_rows(args.kind, args.out, rows, tokens.TOKEN_COLUMNS)
    elif args.kind == "speed":
        report_rows(args.kind, args.out, benchmark_speed(args))
    else:
        benchmark_asr(args)


if __name__ == "__main__":
    run_recipe(main)
