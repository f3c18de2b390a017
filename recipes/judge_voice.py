"""Evaluates a voice on held-out speakers and texts, in one or several settings of sampling.

    python recipes/judge_voice.py voice=out/small/tts/voice tokens=out/small/tokens/dev \
      train=out/small/tokens/train judge=models/whisper-base speaker=models/speaker-encoder \
      num_items=50 seeds=2 compare=[controls,candidates] out=out/small/judged

Every item is synthesized twice: as the continuation of its own first seconds, and with another
recording of its speaker as the prompt (cross). OUT gets rows.jsonl, results.jsonl, clips.jsonl,
table.md, differences.jsonl, audio/SETTING/LIST/ID.wav and audio/prompts/LIST/ID.wav.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.io import FileLock, atomic_file
from codec.json_lines import write_json_lines
from codec.tokens import TokenShard
from eval.benchmark import Provenance, Row, ScoredUtterance, library_of, rows_of, table
from eval.stats import Interval, Sums, paired_difference
from recipes.lib.run import finished, load_config, run_recipe
from recipes.scoring.eval_items import (
    EvalItem,
    eval_lists,
    list_name,
    normalized_texts,
    select_items,
)
from recipes.scoring.judges import digest_of_voice, safe_name
from recipes.scoring.rows import CLIPS, append_rows
from recipes.scoring.synthesis import (
    METRICS,
    ScoredList,
    TTSEvalConfig,
    codec_rows,
    load_scorers,
    provenance,
    synthesize_items,
    transcribe_items,
    write_prompts,
    write_results,
)
from slm.config import CHECKS, SamplingConfig
from slm.generation.rerank import can_transcribe
from slm.voice import Voice

logger = logging.getLogger(__name__)

CONTROLS: dict[str, dict[str, Any]] = {
    "no-controls": {"checks": (), "max_attempts": 1, "repetition_window": 0},
    "one-try": {"max_attempts": 1},
    "no-window": {"repetition_window": 0},
    "no-checks": {"checks": ()},
    **{f"no-{check}": {"checks": tuple(c for c in CHECKS if c != check)} for check in CHECKS},
}
"""Ablations of sampling: without retries, without repetition-aware sampling (`no-window`), without
checks."""
CANDIDATES = (1, 4, 8)
DIFFERENCES = ("wer", "cer", "wrong", "failure", "fault", "similarity")
"""Metrics whose differences get confidence intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeVoiceConfig(TTSEvalConfig):
    """A voice, the items that it synthesizes, and the models that score them."""

    voice: str = "out/smoke/tts/voice"
    """Folder of the voice."""
    base: str | None = None
    """Folder or hub id of its text LLM, if that has moved."""
    tokens: str = "out/smoke/tokens/dev"
    """Token shards of held-out speakers."""
    train: str | None = None
    """Token shards of the training set, whose texts are left out; null: none are."""
    out: str = "out/smoke/judged"
    """Folder of the results. A second start with the same voice, items and sampling resumes; other
    results there are replaced."""
    seed: int = 0
    """Seed of the first item; item i has seed + i."""
    seeds: int = 1
    """Number of times that each item is synthesized, each under another seed."""
    compare: tuple[str, ...] = ()
    """Settings besides `sampling` as given: `controls` (all ablations), `candidates` (1, 4, 8), or
    single ones: no-controls, one-try, no-window, no-checks, no-loop, no-silence, no-early, no-leak,
    greedy, candidates-N."""

    def __post_init__(self) -> None:
        # slots=True replaces the class, which breaks super() without arguments.
        TTSEvalConfig.__post_init__(self)
        if self.num_items < 1 or self.seeds < 1:
            raise ValueError("num_items and seeds must be at least 1")
        settings(self)


def settings(config: JudgeVoiceConfig) -> dict[str, SamplingConfig]:
    """Returns the settings to compare by name, `given` first, without duplicates of it.

    Raises:
        ValueError: `config.compare` has an unknown name.
    """
    names: list[str] = []
    for name in config.compare:
        if name == "controls":
            names += CONTROLS
        elif name == "candidates":
            names += [f"candidates-{count}" for count in CANDIDATES]
        else:
            names.append(name)
    found = {"given": config.sampling}
    for name in names:
        count = name.removeprefix("candidates-")
        if name in CONTROLS:
            changes = CONTROLS[name]
        elif name == "greedy":
            changes = {"greedy": True}
        elif count != name and count.isdecimal():
            changes = {"num_candidates": int(count)}
        else:
            known = ", ".join(["controls", "candidates", *CONTROLS, "greedy", "candidates-N"])
            raise ValueError(f"compare: no setting {name!r}; there are {known}")
        setting = replace(config.sampling, **changes)
        if setting == config.sampling:
            logger.info("%s is left out: it equals the given setting", name)
        else:
            found[name] = setting
    return found


def main(argv: list[str]) -> None:
    """Evaluates a voice; one process at a time writes to a folder."""
    config = load_config(JudgeVoiceConfig, argv, "Evaluates a voice on held-out speakers.")
    out = Path(config.out)
    with FileLock(out):
        judge_voice(config, out)
    finished(
        "scores (rows.jsonl, table.md), results per item (results.jsonl) and waves (audio/)", out,
        f"python recipes/benchmark.py report {out} --html {out}/report.html",
    )  # fmt: skip


def judge_voice(config: JudgeVoiceConfig, out: Path) -> None:
    """Synthesizes and scores all items in all settings, and writes the results to `out`."""
    several = settings(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    voice = Voice.from_pretrained(config.voice, base=config.base, device=device)
    has_asr = can_transcribe(voice.lm)
    reranked = [name for name, one in several.items() if one.num_candidates > 1]
    if reranked and not has_asr:
        raise ValueError(
            f"{config.voice} was trained without asr, which reranks the candidates of "
            f"{', '.join(reranked)}; leave them out"
        )
    shard = TokenShard.open(config.tokens, expect=voice.codec.stamp)
    language, known = config.language, set[str]()
    if config.train is not None:
        known = normalized_texts(TokenShard.open(config.train), language)
    rows = select_items(shard, config.num_items, known, language)
    scorers = load_scorers(config, voice, shard)
    judges = scorers.judges
    once = eval_lists(rows, shard, voice, judges, config.prompt_seconds, config.aligner)
    lists = {name: repeated(items, config.seeds) for name, items in once.items()}
    for name, items in lists.items():
        write_prompts(voice, items, out / "audio" / "prompts" / name)
    origin = provenance(config, "given", judges, digest_of_voice(config.voice), language)
    scores = transcribe_items(voice, rows, origin) if has_asr else []
    scored: dict[str, list[ScoredList]] = {}
    for setting, voice.sampling in several.items():
        logger.info("setting: %s", setting)
        folder, own = out / "audio" / setting, replace(origin, system=setting)
        scored[setting] = []
        for name, items in lists.items():
            one = synthesize_items(voice, name, items, scorers, folder, origin, config.batch)
            scored[setting].append(one)
            scores += rows_of(list_name(name, items), one.scored, own)
        write_results(out / "results.jsonl", scored, voice.codec.frame_rate)
        write_json_lines(out / CLIPS, clips_of(scored))
    codec = provenance(config, "codec", judges, voice.codec.stamp.digest, language)
    scores += codec_rows(voice, "continuation", once["continuation"], scorers, codec)
    with atomic_file(out / "rows.jsonl") as temporary:
        append_rows(temporary, scores)
    report(out, scores, scored, origin, config.seeds)


def clips_of(scored: Mapping[str, Sequence[ScoredList]]) -> Iterator[dict[str, Any]]:
    """Yields the lines of clips.jsonl, which `benchmark.py report` plays."""
    for setting, lists in scored.items():
        for one in lists:
            for item, result in zip(one.items, one.results, strict=True):
                folder = f"audio/{setting}/{one.name}"
                yield {
                    "part": "tts", "list": list_name(one.name, one.items), "system": setting,
                    "id": item.id, "text": item.text, "transcript": result.scored.transcript,
                    "audio": result.audio and f"{folder}/{result.audio}",
                    "columns": {"speaker": item.speaker},
                    "reference_audio": f"audio/prompts/{one.name}/{safe_name(item.id)}.wav",
                }  # fmt: skip


def repeated(items: Sequence[EvalItem], times: int) -> list[EvalItem]:
    """Returns the items `times` times; repetition i > 0 has ".i" behind the ids."""
    again = [
        item._replace(id=f"{item.id}.{turn}") for turn in range(1, times) for item in items
    ]  # fmt: skip
    return [*items, *again]


def report(
    out: Path, rows: Sequence[Row], scored: Mapping[str, Sequence[ScoredList]],
    origin: Provenance, seeds: int,
) -> None:  # fmt: skip
    """Prints and writes the scores and the differences of the settings from the given one."""
    scores = table(rows, [metric for metric in METRICS if any(r.metric == metric for r in rows)])
    lines, records = [], []
    for setting, lists in scored.items():
        if setting == "given":
            continue
        for base, other in zip(scored["given"], lists, strict=True):
            found = differences(base.scored, other.scored, seeds)
            cells = [_cell(found.get(metric)) for metric in DIFFERENCES]
            lines.append(f"| {setting} | {other.name} | " + " | ".join(cells) + " |")
            records += [
                {"setting": setting, "list": list_name(other.name, other.items), "metric": metric,
                 "n": len(base.items), "seeds": seeds, **interval._asdict(),
                 "seed": origin.seed, "git": origin.git, "config": origin.config,
                 "model": origin.model, "library": library_of(metric, origin)}
                for metric, interval in found.items()
            ]  # fmt: skip
    text = f"{scores}\n\nn counts {seeds} seeds of each item.\n"
    if lines:
        head = f"| setting | list | {' | '.join(DIFFERENCES)} |\n{'|---' * (len(DIFFERENCES) + 2)}|"
        about = "Differences from `given`, with 95 % intervals of a paired bootstrap over items"
        text += f"\n{about} (none for one item):\n\n" + "\n".join([head, *lines, ""])
    write_json_lines(out / "differences.jsonl", records)
    with atomic_file(out / "table.md") as temporary:
        temporary.write_text(text)
    print(text)


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if interval.low is None:
        return f"{interval.value:+.3f}"
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def differences(
    given: Sequence[ScoredUtterance], other: Sequence[ScoredUtterance], seeds: int
) -> dict[str, Interval]:
    """Returns the paired difference of each metric, with items as the units: the sums of an item's
    seeds are resampled together. An utterance without a metric in one setting is left out of that
    metric in both."""
    found = {}
    for metric in DIFFERENCES:
        pairs = [(_sums(a, metric), _sums(b, metric)) for a, b in zip(given, other, strict=True)]
        both = np.array(
            [[*a, *b] if a and b else [0.0] * 4 for a, b in pairs], dtype=np.float64
        ).reshape(seeds, -1, 4).sum(0)  # fmt: skip
        both = both[(both[:, 1] > 0) & (both[:, 3] > 0)]
        if len(both):
            first, second = Sums(both[:, 0], both[:, 1]), Sums(both[:, 2], both[:, 3])
            found[metric] = paired_difference(first, second)
    return found


def _sums(one: ScoredUtterance, metric: str) -> tuple[float, float] | None:
    """Numerator and denominator of an utterance's share of a rate; None where undefined."""
    if metric in ("wer", "cer"):
        errors = one.words if metric == "wer" else one.characters
        return (
            None
            if errors is None
            else (float(errors.num_errors), float(max(1, errors.num_reference)))
        )
    return (one.values[metric], 1.0) if metric in one.values else None


if __name__ == "__main__":
    run_recipe(main)
