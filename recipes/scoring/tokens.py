"""Scores the tokens of codecs, SLMTokBench and more: `python recipes/benchmark.py tokens`.

What is computed is stored below OUT and reused: tokens/ (codes), probes/ (weights of trained
probes), steps/ (scores of a probe, SNMI) and utterances/ (scores of waves).
"""

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from safetensors.torch import load_file, save_file

from codec import load_codec
from codec.audio import resample_wave, write_audio
from codec.io import FileLock, atomic_file, sha256_of
from codec.json_lines import read_json_lines, write_json_lines
from codec.models.base import SpeechCodec
from codec.models.codec import check_device
from codec.tokenize import export_tokens, parts_of, summarize
from codec.tokens import CodecStamp, TokenRow, TokenShard
from codec.training.data import load_cut, read_cuts
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    ScoredUtterance,
    all_libraries,
    score_asr,
    score_tts,
)
from eval.mutual_information import estimate_of, information_bounds, sequence_information
from eval.text import whisper_normalize
from eval.text_probe import Probe, ProbeConfig, ProbeCorpus, train_probe, untrained_probe
from eval.token_stability import unchanged_codes
from recipes.lib.config import check_seed_of_recipe
from recipes.scoring.judges import Judges, safe_name
from recipes.scoring.lists import columns_of_cut
from recipes.scoring.options import (
    Columns,
    JudgeOptions,
    ScoredSystem,
    check_options,
    chosen,
    judge_options,
    named,
    origin_of,
    report_rows,
    sample_options,
    write_clips,
)
from recipes.scoring.reconstruction import decode_codes
from recipes.scoring.rows import ORIGINAL
from recipes.scoring.scores import score_all

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)

PART = "tokens"
SETTINGS = {
    "small": ProbeConfig(
        hidden=128,
        embedding=128,
        epochs=10,
        batch_frames=3000,
        learning_rate=5e-3,
        min_frame_rate=25.0,
    ),
    "paper": ProbeConfig(),
}
PREFIX = "probe_"
"""Prefix of the probe's error rates: they are not comparable with an ASR judge's."""
CHANGES = ("noise", "gain", "resampling", "shift")
"""Changes of a recording whose effect on the codes is measured."""
TOKEN_COLUMNS = (
    *("probe_cer", "probe_wer", "mi_vclub", "mi_info_nce", "wer", "cer", "similarity"),
    *("snmi", "snmi_chance", *(f"kept_{change}" for change in CHANGES), "codebooks", "bitrate"),
)
"""Metrics of the printed table; rows.jsonl has more."""
SNR_DB = 20.0
GAIN_DB = -6.0
SHIFT_SECONDS = 0.005


class TokenList(NamedTuple):
    """Codes of a list."""

    name: str
    shard: TokenShard
    cuts: Mapping[str, "Cut"]
    """Recordings by id; empty where token shards are given."""


class TokenSystem(NamedTuple):
    """A codec and the codes of all lists."""

    name: str
    stamp: CodecStamp
    codec: SpeechCodec | None
    train: TokenList
    dev: list[TokenList]

    @property
    def counts(self) -> list[int]:
        """Numbers of codebooks that are scored: the first, and all."""
        return sorted({1, self.stamp.num_codebooks})


class ProbePlan(NamedTuple):
    """A probe to train."""

    path: Path
    """Of its weights."""
    digest: str
    """Of everything that the weights depend on."""
    config: ProbeConfig
    vectors: list[Float[torch.Tensor, "_ D"]] | None
    """The codec's, where the probe has no embeddings of its own."""


class Step(NamedTuple):
    """Results of a step."""

    utterances: list[ScoredUtterance]
    constants: dict[str, float]
    """Numbers of the list."""


def add_tokens_command(kinds: Any) -> None:
    """Adds `tokens` to the subparsers of benchmark.py."""
    about = "what the tokens of codecs hold: SLMTokBench, SNMI and stability"
    command = kinds.add_parser(
        PART, help=about, description=about.capitalize() + ".",
        parents=[sample_options(), judge_options()],
    )  # fmt: skip

    def add(flag: str, text: str, **options: Any) -> None:
        command.add_argument(flag, help=text, **options)

    add("--codec", "folder or hub id; repeatable", action="append", default=[],
        metavar="[NAME=]DIR")  # fmt: skip
    lists = "list of cuts, or token shards (then what needs waves is left out)"
    add("--train", f"{lists} to train the probe", type=Path, required=True)
    add("--dev", f"{lists} to score; repeatable", action="append", required=True,
        metavar="[NAME=]LIST")  # fmt: skip
    add("--train-limit", "train on the first N items only", type=int)
    add("--setting", "small: a few hours and one core; paper: SpeechTokenizer's network, a hundred "
        "hours and a GPU (default: small)", choices=SETTINGS, default="small")  # fmt: skip
    add("--embeddings", "of the probe: own, trained with it, or the codec's vectors, frozen "
        "(default: own)", choices=("own", "codec"), default="own")  # fmt: skip
    add("--epochs", "default: that of --setting", type=int)
    add("--hidden", "default: that of --setting", type=int)
    add("--negatives", "other utterances per text in the bounds of mutual information "
        "(default: 100)", type=int, default=100)  # fmt: skip
    add("--device", "cpu or cuda", default="cpu")


def benchmark_tokens(args: argparse.Namespace) -> None:
    """Scores each codec with its first codebook and with all, on each list.

    Codebooks 2 and on have rows of the share of codes that stay, as systems `NAME codebook Q`.

    Raises:
        ValueError: an option, a list or a model is invalid.
    """
    _check_arguments(args)
    judges, columns = JudgeOptions.of(args).load(), Columns(args)
    rows: list[Row] = []
    judged_systems: list[ScoredSystem] = []
    with FileLock(args.out / "tokens"):
        for number, system in enumerate(_systems(args)):
            shared = sorted(_ids(system.dev) & set(system.train.shard.ids))
            if shared:
                raise ValueError(f"--dev: {shared[0]} is in --train as well ({len(shared)} such)")
            waves = system.codec is not None and all(one.cuts for one in system.dev)
            judged = waves and args.judge is not None
            if judged and not number:
                judged_systems += _score_originals(args, columns, system, judges)
            if waves:
                rows += _score_stability(args, columns, system)
            for count in system.counts:
                rows += _score_text(args, columns, system, count)
                if judged:
                    judged_systems += _score_resynthesis(args, columns, system, count, judges)
    rows += [row for each in judged_systems for row in each.rows()]
    report_rows(PART, args.out, rows, TOKEN_COLUMNS)
    write_clips(args, judged_systems)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for invalid arguments, before any file is read."""
    for key in ("epochs", "hidden", "train_limit", "negatives"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1, got {value}")
    check_options(args)
    check_seed_of_recipe(args.seed, "--seed")
    check_device(args.device)
    if args.speaker is not None and args.judge is None:
        raise ValueError("--speaker: similarity is scored together with --judge; name both")
    names = [name for name, _ in _lists(args)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--dev: two lists have the name {name}; write NAME=LIST")
    codecs = [name for name, _ in map(named, args.codec)]
    for name in codecs:
        if codecs.count(name) > 1:
            raise ValueError(f"--codec: two have the name {name}; write NAME=DIR")


def _lists(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Names and paths of the dev lists."""
    return [(name, Path(path)) for name, path in map(named, args.dev)]


def _systems(args: argparse.Namespace) -> Iterator[TokenSystem]:
    """Yields the codecs with the codes of all lists, which it encodes if they are cuts.

    Raises:
        ValueError: lists are of two kinds, there is no codec or too many, or it is not theirs.
    """
    lists = [("train", args.train), *_lists(args)]
    if len({path.is_dir() or path.suffix == ".parquet" for _, path in lists}) > 1:
        raise ValueError("--train and --dev: name lists of cuts, or token shards, not both")
    if lists[0][1].is_dir() or lists[0][1].suffix == ".parquet":
        yield _system_of_shards(args, lists)
        return
    if not args.codec:
        raise ValueError("--codec: name a codec that encodes the lists of cuts")
    cuts = {path: list(read_cuts(path)) for _, path in lists}
    for name, source in map(named, args.codec):
        codec = load_codec(source, device=args.device)
        stamp = codec.stamp
        encoded = []
        for number, (list_name, path) in enumerate(lists):
            own = chosen(cuts[path], args) if number else cuts[path][: args.train_limit]
            digest = sha256_of(f"{sha256_of(path)} {[cut.id for cut in own]}", 8)
            folder = args.out / "tokens" / f"{safe_name(name)}-{stamp.digest[:8]}"
            folder /= f"{safe_name(list_name)}-{digest}"
            logger.info("encoding %s with %s", path, name)
            export_tokens(own, codec, folder)
            summarize(folder, len(parts_of(own)))
            shard = TokenShard.open(folder, expect=stamp)
            encoded.append(TokenList(list_name, shard, {cut.id: cut for cut in own}))
        yield TokenSystem(name, stamp, codec, encoded[0], encoded[1:])


def _system_of_shards(args: argparse.Namespace, lists: Sequence[tuple[str, Path]]) -> TokenSystem:
    if len(args.codec) > 1:
        raise ValueError("--codec: token shards are of one codec; name lists of cuts")
    codec, stamp = None, TokenShard.open(lists[0][1]).stamp
    name = Path(stamp.id).name
    for given, source in map(named, args.codec):
        codec, name = load_codec(source, device=args.device), given
        stamp = codec.stamp
    shards = [TokenList(one, TokenShard.open(path, expect=stamp), {}) for one, path in lists]
    return TokenSystem(name, stamp, codec, shards[0], shards[1:])


def _ids(lists: Sequence[TokenList]) -> set[str]:
    return {one for each in lists for one in each.shard.ids}


def _rows_with_text(shard: TokenShard, indices: Iterable[int]) -> list[TokenRow]:
    """The rows of a shard at `indices`, without those that have no transcript.

    Raises:
        ValueError: none of them has a transcript.
    """
    rows = [shard[index] for index in indices if shard.texts[index].strip()]
    if not rows:
        raise ValueError(
            f"{shard.files[0].parent}: has no transcripts; name cuts with transcripts, or their "
            "tokens (recipes/export_tokens.py)"
        )
    return rows


def _scored_rows(args: argparse.Namespace, one: TokenList) -> list[TokenRow]:
    """The rows of --limit or --sample that have a transcript."""
    return _rows_with_text(one.shard, chosen(range(len(one.shard)), args))


def _corpus(rows: Sequence[TokenRow], count: int) -> ProbeCorpus:
    return ProbeCorpus([row.codes[:count] for row in rows], [row.text for row in rows])


def _score_text(
    args: argparse.Namespace, columns: Columns, system: TokenSystem, count: int
) -> list[Row]:
    """Rows of the probe, the bounds of mutual information and SNMI with `count` codebooks."""
    label, plan = f"{system.name}-{count}", _probe_plan(args, system, count)
    probe = cache(lambda: _trained_probe(plan, args, system, count))
    bits = sum(math.log2(size) for size in system.stamp.codebook_sizes[:count])
    constants = {"codebooks": float(count), "bitrate": system.stamp.frame_rate * bits}
    libraries = f"{all_libraries()}, torch {torch.__version__}"
    origin = _origin(args, label, system, seed=args.seed, probe=plan.digest)
    rows: list[Row] = []
    for one in system.dev:
        utterances = _scored_rows(args, one)
        key = f"{_digests(one)} {args.limit} {args.sample} {args.seed} {args.language} {libraries}"
        step = _stored(
            args.out / "steps", f"{label} {one.name} probe",
            f"{plan.digest} {args.negatives} {key}",
            lambda utterances=utterances: _probe_scores(probe(), utterances, count, args),
        )  # fmt: skip
        snmi = _stored(
            args.out / "steps", f"{label} {one.name} snmi", f"{count} {key}",
            lambda utterances=utterances: _snmi_scores(utterances, count, args),
        )  # fmt: skip
        made = _of_list(
            columns, one, step.utterances, origin, step.constants | constants, ASR_PREFIX
        ).rows()
        number = int(snmi.constants.pop("n", 0))
        of_list = next(row for row in made if row.utterance is None and row.list == one.name)
        for name, value in snmi.constants.items():
            made.append(replace(of_list, metric=name, value=value, n=number))
        rows += map(_with_libraries, made)
    return rows


def _probe_plan(args: argparse.Namespace, system: TokenSystem, count: int) -> ProbePlan:
    changes = {key: getattr(args, key) for key in ("epochs", "hidden")}
    changes = {key: value for key, value in changes.items() if value is not None}
    config = replace(SETTINGS[args.setting], seed=args.seed, **changes)
    settings = {**asdict(config), "codebooks": count, "limit": args.train_limit}
    settings |= {"embeddings": args.embeddings, "torch": torch.__version__}
    settings["train"] = _digests(system.train)
    vectors = None
    if args.embeddings == "codec":
        if system.codec is None:
            raise ValueError("--embeddings codec: name the codec of the token shards with --codec")
        entries = system.codec.entries()
        if entries is None:
            raise ValueError(f"--embeddings codec: {system.name} gives none; leave it out")
        vectors = [table.detach().float().cpu() for table in entries[:count]]
    digest = sha256_of(json.dumps(settings, sort_keys=True), 16)
    name = f"{safe_name(f'{system.name}-{count}')}-{digest}.safetensors"
    return ProbePlan(args.out / "probes" / name, digest, config, vectors)


def _digests(one: TokenList) -> list[str]:
    return [sha256_of(file, 16) for file in one.shard.files]


def _trained_probe(
    plan: ProbePlan, args: argparse.Namespace, system: TokenSystem, count: int
) -> Probe:
    """Returns the probe of `plan.path`, which is trained if it is missing."""
    sizes, rate = system.stamp.codebook_sizes[:count], system.stamp.frame_rate
    if plan.path.is_file():
        probe = untrained_probe(sizes, rate, plan.config, plan.vectors, args.device)
        probe.network.load_state_dict(load_file(plan.path, device=args.device))
        return probe
    train = _rows_with_text(system.train.shard, range(len(system.train.shard))[: args.train_limit])
    probe = train_probe(
        _corpus(train, count), codebook_sizes=sizes, frame_rate=rate, config=plan.config,
        tables=plan.vectors, device=args.device,
    )  # fmt: skip
    logger.info(
        "probe of %s-%d: %d utterances, %d without labels and %d too short left out, %d steps, "
        "loss %.3f nats per character",
        *(system.name, count, probe.num_trained, probe.num_unspelled, probe.num_too_short),
        *(probe.num_steps, probe.history[-1].train_loss),
    )
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(plan.path) as temporary:
        save_file(probe.network.state_dict(), temporary)
    return probe


def _stored(folder: Path, label: str, key: str, compute: Callable[[], Step]) -> Step:
    """Returns the results of a step, computed if FOLDER does not have them for this key."""
    path = folder / f"{safe_name(label)}-{sha256_of(key, 12)}.jsonl"
    if path.is_file():
        constants, *records = (line.value for line in read_json_lines(path))
        return Step([ScoredUtterance.from_record(record) for record in records], constants)
    step = compute()
    write_json_lines(path, [step.constants, *(one.to_record() for one in step.utterances)])
    return step


def _probe_scores(
    probe: Probe, rows: Sequence[TokenRow], count: int, args: argparse.Namespace
) -> Step:
    """Error rates of the probe, and bounds of the mutual information of codes and texts."""
    corpus = _corpus(rows, count)
    result = probe.score(corpus)
    constants: dict[str, float] = {}
    terms: dict[str, dict[int, float]] = {"mi_vclub": {}, "mi_info_nce": {}}
    if result.n > result.num_unscored:
        constants[f"{PREFIX}loss"] = result.loss
    if result.n - result.num_unscored > 1:
        found = probe.likelihoods(corpus, num_others=args.negatives, seed=args.seed)
        bounds = information_bounds(found.matching, found.others)
        constants["mi_info_nce_limit"] = bounds.limit
        for name, values in (("mi_vclub", bounds.vclub), ("mi_info_nce", bounds.info_nce)):
            known = ~np.isnan(values)
            terms[name] = {
                index: float(value)
                for index, value in zip(found.indices, values, strict=True)
                if math.isfinite(value)
            }
            if known.sum() > 1:
                constants[f"{name}_error"] = estimate_of(values).error
                characters = found.num_characters[known].sum()
                constants[f"{name}_per_character"] = float(values[known].sum() / characters)
    scored = []
    for index, (row, text) in enumerate(zip(rows, result.texts, strict=True)):
        one = score_asr(row.id, row.text, text, args.language)
        values = {name: own[index] for name, own in terms.items() if index in own}
        missing = {name: "not aligned" for name, own in terms.items() if index not in own}
        scored.append(replace(one, values=values, missing=missing))
    return Step(scored, constants)


def _snmi_scores(rows: Sequence[TokenRow], count: int, args: argparse.Namespace) -> Step:
    """SNMI of the codebooks together and, with several, of those after the first; no numbers if
    fewer than two sentences occur twice."""
    sentences = [whisper_normalize(row.text, args.language) for row in rows]
    repeated = {one for one, times in Counter(sentences).items() if times > 1}
    if len(repeated) < 2:
        return Step([], {})
    kept = [(row, one) for row, one in zip(rows, sentences, strict=True) if one in repeated]
    texts = [one for _, one in kept]
    found = sequence_information([row.codes[:count] for row, _ in kept], texts, seed=args.seed)
    constants = {
        "n": float(found.n), "snmi": found.snmi, "snmi_error": found.error,
        "snmi_chance": found.chance, "snmi_ceiling": found.ceiling,
    }  # fmt: skip
    if count > 1:
        acoustic = sequence_information(
            [row.codes[1:count] for row, _ in kept], texts, seed=args.seed
        )
        constants["snmi_acoustic"] = acoustic.snmi
    return Step([], constants)


def _of_list(
    columns: Columns, one: TokenList, scored: Sequence[ScoredUtterance], origin: Provenance,
    constants: Mapping[str, float] | None = None, prefix: str = "",
    references: Mapping[str, str | None] | None = None,
) -> ScoredSystem:  # fmt: skip
    """The scores of a list, with the columns of its cuts or shards."""
    if one.cuts:
        entries = {each.id: columns_of_cut(one.cuts[each.id]) for each in scored}
    else:
        keys = zip(one.shard.ids, one.shard.speakers, one.shard.languages, strict=True)
        entries = {name: {"speaker": who, "language": language} for name, who, language in keys}
    return ScoredSystem(
        list_name=one.name, scored=scored, origin=origin, constants=constants or {},
        columns=columns.of(scored, entries, one.name), references=references or {}, prefix=prefix,
    )  # fmt: skip


def _with_libraries(row: Row) -> Row:
    """A row with the probe's own metric names, and its libraries."""
    torch_version = f"torch {torch.__version__}"
    if row.metric.startswith(ASR_PREFIX):
        metric = PREFIX + row.metric.removeprefix(ASR_PREFIX)
        return replace(row, metric=metric, library=f"{row.library}, {torch_version}")
    if row.metric.startswith((PREFIX, "mi_")):
        return replace(row, library=f"numpy {np.__version__}, {torch_version}")
    return replace(row, library=f"numpy {np.__version__}")


def _origin(
    args: argparse.Namespace, name: str, system: TokenSystem, judges: Judges | None = None,
    seed: int = 0, **options: Any,
) -> Provenance:  # fmt: skip
    files = [file for one in (system.train, *system.dev) for file in one.shard.files]
    model = "" if name == ORIGINAL else system.stamp.digest
    return origin_of(args, PART, name, files, judges, model, seed, **options)


def _score_originals(
    args: argparse.Namespace, columns: Columns, system: TokenSystem, judges: Judges
) -> list[ScoredSystem]:
    """The judge's error rates on the recordings themselves."""
    rate, judge = system.stamp.sample_rate, judges.transcribe
    assert judge is not None

    def score(row: TokenRow, cut: "Cut", path: Path) -> ScoredUtterance:
        wave = load_cut(cut, rate)
        write_audio(args.out / path, wave, rate)
        scored = score_asr(row.id, row.text, judge(wave, rate), args.language)
        return replace(scored, audio=path.as_posix())

    found = []
    for one in system.dev:
        key = f"{_digests(one)} {rate} {judges.judge_name} {args.language}"
        scored = _score_rows(args, ORIGINAL, key, _scored_rows(args, one), one, score)
        found.append(_of_list(columns, one, scored, _origin(args, ORIGINAL, system, judges)))
    return found


def _score_rows(
    args: argparse.Namespace, name: str, key: str, rows: Sequence[TokenRow], one: TokenList,
    score: Callable[[TokenRow, "Cut", Path], ScoredUtterance],
) -> list[ScoredUtterance]:  # fmt: skip
    """Stored scores of rows and their cuts.

    Args:
        score: called with a row, its cut, and the path below OUT of a wave that it may write.
    """

    def score_row(row: TokenRow, systems: Sequence[str]) -> Iterator[tuple[str, ScoredUtterance]]:
        for system in systems:
            yield system, score(row, one.cuts[row.id], _wave_of(system, one, row.id))

    return score_all(args.out, rows, {name: key}, lambda: score_row)[name]


def _wave_of(name: str, one: TokenList, item: str) -> Path:
    """Path below OUT of a wave of a system."""
    return Path("waves") / safe_name(name) / safe_name(one.name) / f"{safe_name(item)}.wav"


def _score_resynthesis(
    args: argparse.Namespace, columns: Columns, system: TokenSystem, count: int, judges: Judges
) -> list[ScoredSystem]:
    """WER, CER and similarity of what the decoder makes of the first `count` codebooks."""
    name, rate, found = f"{system.name}-{count}", system.stamp.sample_rate, []
    assert system.codec is not None
    codec = system.codec

    def score(row: TokenRow, cut: "Cut", path: Path) -> ScoredUtterance:
        original = load_cut(cut, rate)
        decoded = decode_codes(codec, row.codes[:count], original.size)
        write_audio(args.out / path, np.nan_to_num(decoded), rate)
        scored = score_tts(
            row.id, row.text, decoded, rate, judges.transcribe, judges.embed, (original, rate),
            language=args.language,
        )  # fmt: skip
        values = {metric: value for metric, value in scored.values.items() if metric != "seconds"}
        return replace(scored, values=values, audio=path.as_posix())

    for one in system.dev:
        key = f"{_digests(one)} {count} {judges.judge_name} {judges.speaker_name} {args.language}"
        scored = _score_rows(args, name, key, _scored_rows(args, one), one, score)
        references = {each.id: _wave_of(ORIGINAL, one, each.id).as_posix() for each in scored}
        origin = _origin(args, name, system, judges)
        found.append(_of_list(columns, one, scored, origin, references=references))
    return found


def _score_stability(args: argparse.Namespace, columns: Columns, system: TokenSystem) -> list[Row]:
    """Rows of the share of codes that stay: of codebook 1, of all, and of each of the others."""
    assert system.codec is not None
    codec, num, rows = system.codec, system.stamp.num_codebooks, []

    def score(row: TokenRow, cut: "Cut", _: Path) -> ScoredUtterance:
        wave = load_cut(cut, codec.sample_rate)
        seed = int(sha256_of(f"{args.seed} {row.id}", 8), 16)
        changed = changed_recordings(wave, codec.sample_rate, seed)
        original, *others = encoded_alike(codec, [wave, *changed.values()])
        shares = [unchanged_codes(original, other) for other in others]
        values = {
            f"{change} {book}": float(share)
            for change, own in zip(changed, shares, strict=True)
            for book, share in enumerate(own, 1)
        }
        return ScoredUtterance(id=row.id, values=values, text=row.text)

    systems = {f"{system.name}-1": [1]}
    if num > 1:
        systems[f"{system.name}-{num}"] = list(range(1, num + 1))
        systems |= {f"{system.name} codebook {book}": [book] for book in range(2, num + 1)}
    for one in system.dev:
        listed = [one.shard[index] for index in range(len(one.shard))]
        key = f"{_digests(one)} {system.stamp.digest} {args.seed} {SNR_DB} {GAIN_DB}"
        scored = _score_rows(args, f"{system.name} stability", key, listed, one, score)
        for name, books in systems.items():
            own = [replace(each, values=_shares(each.values, books)) for each in scored]
            rows += _of_list(columns, one, own, _origin(args, name, system, seed=args.seed)).rows()
    return rows


def _shares(values: Mapping[str, float], books: Sequence[int]) -> dict[str, float]:
    """The mean over `books` of each change's share."""
    return {
        f"kept_{change}": float(np.mean([values[f"{change} {book}"] for book in books]))
        for change in CHANGES
    }


def changed_recordings(
    wave: Float[np.ndarray, " S"], sample_rate: int, seed: int
) -> dict[str, Float[np.ndarray, " _"]]:
    """Returns the wave after each of CHANGES, within [-1, 1].

    noise: white, 20 dB below the wave's power. gain: -6 dB. resampling: to half the sample rate and
    back. shift: the first 5 ms are removed, less than half a frame up to 100 Hz.

    Args:
        seed: of the noise.
    """
    noise = np.random.default_rng(seed).standard_normal(wave.size).astype(np.float32)
    level = np.sqrt(np.mean(np.square(wave))) * 10 ** (-SNR_DB / 20)
    halved = resample_wave(wave, sample_rate, sample_rate // 2)
    changed = (
        wave + level * noise,
        wave * np.float32(10 ** (GAIN_DB / 20)),
        resample_wave(halved, sample_rate // 2, sample_rate),
        wave[round(SHIFT_SECONDS * sample_rate) :],
    )
    clipped = [np.clip(each, -1, 1).astype(np.float32) for each in changed]
    return dict(zip(CHANGES, clipped, strict=True))


def encoded_alike(
    codec: SpeechCodec, waves: Sequence[Float[np.ndarray, " _"]]
) -> list[Integer[np.ndarray, "Q _"]]:
    """Returns the codes of each wave, from one padded batch."""
    lengths = torch.tensor([wave.size for wave in waves])
    batch = torch.zeros(len(waves), 1, int(lengths.max()))
    for row, wave in zip(batch, waves, strict=True):
        row[0, : wave.size] = torch.from_numpy(wave)
    found = codec.encode(batch.to(codec.device), lengths.to(codec.device))
    return [
        codes[:, :frames].cpu().numpy()
        for codes, frames in zip(found.codes, found.lengths.tolist(), strict=True)
    ]
