"""Scores a voice on speakers and texts that it was not trained on, in one or several settings.

    python recipes/judge_voice.py voice=out/small/tts/voice tokens=out/small/tokens/dev \
      train=out/small/tokens/train judge=models/whisper-base speaker=models/speaker-encoder \
      num_items=50 seeds=2 compare=[controls,candidates] out=out/small/judged

Every item is spoken twice: its own text from its first seconds on (continuation), and its text
after another recording of its speaker (cross). OUT gets rows.jsonl, results.jsonl, table.md,
differences.jsonl, audio/SETTING/LIST/ID.wav and audio/prompts/LIST/ID.wav.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.io import FileLock, atomic_file
from codec.tokens import TokenShard
from eval.benchmark import Provenance, Row, Utterance, append_rows, library_of, rows_of, table
from eval.stats import Interval, Sums, paired_difference
from recipes.lib.run import load_config, run_program
from recipes.scoring.eval_items import Line, list_name, spread
from recipes.scoring.judges import digest_of_voice, load_judges
from recipes.scoring.synthesis import (
    METRICS,
    SpeakConfig,
    Spoken,
    provenance,
    score_codec,
    speak_lines,
    transcribe_items,
    write_prompts,
    write_results,
)
from recipes.scoring.voice import ears_of, known_texts, lines_of
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
"""Settings that lack a control; `no-window`: without repetition-aware sampling."""
CANDIDATES = (1, 4, 8)
DIFFERENCES = ("wer", "cer", "wrong", "failure", "fault", "similarity")
"""Of these the differences get intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeVoiceConfig(SpeakConfig):
    """A voice, what it says, and who judges it."""

    voice: str = "out/smoke/tts/voice"
    """Folder of the voice."""
    base: str | None = None
    """Where its text LLM is, if it has moved."""
    tokens: str = "out/smoke/tokens/dev"
    """Token shards of speakers that it was not trained on."""
    train: str | None = None
    """Token shards that it was trained on: what they hold is not spoken; null: all may be."""
    out: str = "out/smoke/judged"
    """Folder of the results. What an earlier start has made of the same voice, lines and sampling
    is not made again; anything else is replaced."""
    seed: int = 0
    """Of the first item; the others count on from it."""
    seeds: int = 1
    """Every item is spoken so many times, each time under another seed."""
    compare: tuple[str, ...] = ()
    """Settings beside `sampling` as it is given: controls (each one off), candidates (1, 4, 8), or
    by name: no-controls, one-try, no-window, no-checks, no-loop, no-silence, no-early, no-leak,
    greedy, candidates-N."""

    def __post_init__(self) -> None:
        # `super()` does not know the class that slots=True makes anew.
        SpeakConfig.__post_init__(self)
        if self.num_items < 1 or self.seeds < 1:
            raise ValueError("num_items and seeds must be at least 1")
        settings(self)


def settings(config: JudgeVoiceConfig) -> dict[str, SamplingConfig]:
    """By name; `given` first. Raises ValueError for a name that there is not."""
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
            found[name] = replace(config.sampling, **CONTROLS[name])
        elif name == "greedy":
            found[name] = replace(config.sampling, greedy=True)
        elif count != name and count.isdecimal():
            found[name] = replace(config.sampling, num_candidates=int(count))
        else:
            known = ", ".join(["controls", "candidates", *CONTROLS, "greedy", "candidates-N"])
            raise ValueError(f"compare: no setting {name!r}; there are {known}")
    # What a setting has in common with the given one need not be spoken again.
    same = [name for name, one in found.items() if name != "given" and one == config.sampling]
    for name in same:
        logger.info("%s is what is given", name)
        del found[name]
    return found


def main(argv: list[str]) -> None:
    config = load_config(JudgeVoiceConfig, argv, "Let a voice speak to unseen speakers' prompts.")
    with FileLock(Path(config.out)):
        judge_voice(config)


def judge_voice(config: JudgeVoiceConfig) -> None:
    """All of it."""
    out, several = Path(config.out), settings(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    voice = Voice.from_pretrained(config.voice, base=config.base, device=device)
    hears = can_transcribe(voice.lm)
    deaf = [name for name, one in several.items() if one.num_candidates > 1 and not hears]
    if deaf:
        raise ValueError(
            f"{config.voice} was trained without asr, which compares the candidates of "
            f"{', '.join(deaf)}; leave them out"
        )
    shard = TokenShard.open(config.tokens, expect=voice.codec.stamp)
    known = known_texts(TokenShard.open(config.train)) if config.train is not None else ()
    items = spread(shard, config.num_items, known)
    judges = load_judges(config.judge, config.speaker)
    ears = ears_of(voice, shard, config, judges)
    once = lines_of(items, shard, voice, config, judges)
    for name, lines in once.items():
        prompts = out / "audio" / "prompts" / name
        write_prompts(voice, repeated(lines, config.seeds), prompts)
    origin = provenance(config, "given", judges, digest_of_voice(config.voice))
    rows = transcribe_items(voice, items, origin) if hears else []
    spoken: dict[str, list[Spoken]] = {}
    for setting, sampling in several.items():
        voice.sampling = sampling
        logger.info("speaking: %s", setting)
        folder = out / "audio" / setting
        spoken[setting] = [
            speak_lines(voice, name, repeated(lines, config.seeds), config, ears, folder, origin)
            for name, lines in once.items()
        ]
        for one in spoken[setting]:
            own = dataclasses.replace(origin, system=setting)
            rows += rows_of(list_name(one.name, one.lines), one.scored, own)
        write_results(out / "results.jsonl", spoken, voice.codec.frame_rate)
    codec = provenance(config, "codec", judges, voice.codec.stamp.digest)
    rows += score_codec(voice, items, once["continuation"], ears, codec)
    with atomic_file(out / "rows.jsonl") as temporary:
        append_rows(temporary, rows)
    report(out, rows, spoken, origin, config.seeds)


def repeated(lines: Sequence[Line], times: int) -> list[Line]:
    """The lines so many times over, the later ones under ids of their own."""
    again = [
        line._replace(id=f"{line.id}.{turn}") for turn in range(1, times) for line in lines
    ]  # fmt: skip
    return [*lines, *again]


def report(
    out: Path, rows: Sequence[Row], spoken: Mapping[str, Sequence[Spoken]], origin: Provenance,
    seeds: int,
) -> None:  # fmt: skip
    """Prints and writes the tables: scores, and differences of the settings from the given one."""
    scores = table(rows, [metric for metric in METRICS if any(r.metric == metric for r in rows)])
    lines, records = [], []
    for setting, lists in spoken.items():
        if setting == "given":
            continue
        for base, other in zip(spoken["given"], lists, strict=True):
            found = differences(base.scored, other.scored, seeds)
            cells = [_cell(found.get(metric)) for metric in DIFFERENCES]
            lines.append(f"| {setting} | {other.name} | " + " | ".join(cells) + " |")
            records += [
                {"setting": setting, "list": list_name(other.name, other.lines), "metric": metric,
                 "n": len(base.lines), "seeds": seeds, **interval._asdict(),
                 "seed": origin.seed, "git": origin.git, "config": origin.config,
                 "model": origin.model, "library": library_of(metric, origin)}
                for metric, interval in found.items()
            ]  # fmt: skip
    text = f"{scores}\n\nn counts {seeds} seeds of each item.\n"
    if lines:
        head = f"| setting | list | {' | '.join(DIFFERENCES)} |\n{'|---' * (len(DIFFERENCES) + 2)}|"
        text += (
            "\nDifferences from `given`, with 95 % intervals of a paired bootstrap over items (one "
            "item has none):\n\n" + "\n".join([head, *lines, ""])
        )
    with atomic_file(out / "differences.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
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
    given: Sequence[Utterance], other: Sequence[Utterance], seeds: int
) -> dict[str, Interval]:
    """By metric; items are the units, whose seeds are summed. Utterances that lack a metric in
    either setting are left out of it in both."""
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


def _sums(one: Utterance, metric: str) -> tuple[float, float] | None:
    """Numerator and denominator of an utterance."""
    if metric in ("wer", "cer"):
        errors = one.words if metric == "wer" else one.characters
        return None if errors is None else (errors.num_errors, max(1, errors.num_reference))
    return (one.values[metric], 1.0) if metric in one.values else None


if __name__ == "__main__":
    run_program(main)
