"""Synthetic English speech of many voices, judged: what `prepare_data.py synthetic` makes.

Texts are WordNet's example sentences (from Debian's package wordnet-base, WordNet's licence) or
those of a file; voices are Kokoro-82M's English ones and others drawn among them. Every recording
is heard by the judge, and left out where it is not understood.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from codec.audio import resample, write_audio
from codec.io import atomic_file
from recipes.offline.debian_prompts import fetch_packages, run_command
from recipes.offline.kokoro import SAMPLE_RATE as KOKORO_RATE
from recipes.offline.kokoro import Kokoro, draw_styles

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
WORDNET = "wordnet-base"
WORDS = (4, 25)
"""Of a text."""
SPEEDS = (0.88, 1.18)
ENGLISH = ("af_", "am_", "bf_", "bm_")
"""How the names of Kokoro's English voices begin."""
CREDIT = """\
# Synthetic English speech

Made by `recipes/prepare_data.py synthetic` with Kokoro-82M (hexgrad, Apache-2.0) from espeak-ng's
phonemes. Voices: Kokoro's English ones, and others drawn among all of its voices. Texts: {texts}
"""
WORDNET_CREDIT = "example sentences of WordNet 3.0, Copyright 2006 by Princeton University."


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """What is made. All of it is a function of this."""

    out: Path
    """The folder for the list and the recordings."""
    hours: float = 5.0
    """Of speech that is kept."""
    voices: int = 200
    """English ones of the model, the rest drawn."""
    texts: Path | None = None
    """A .txt or .jsonl file, or a .gz of one; None: WordNet's example sentences."""
    without: Path | None = None
    """A list of cuts whose texts are never spoken: those that are to test on."""
    kokoro: Path = Path("models/kokoro-82m")
    """Who speaks."""
    judge: Path = Path("models/whisper-base")
    """Who listens."""
    most_wer: float = 0.25
    """A recording of which the judge gets more wrong is left out."""
    processes: int = 2
    """Each one thread."""
    seed: int = 0
    """Of voices, texts and speeds."""

    def __post_init__(self) -> None:
        if not self.hours > 0 or self.voices < 1 or self.processes < 1:
            raise ValueError("--hours, --voices and --processes must be positive")
        if not self.judge.is_dir():
            raise ValueError(f"{self.judge}: no such folder; `make models` makes the judge")


def make_speech(config: SyntheticConfig) -> Path:
    """OUT/synthetic.jsonl and OUT/audio/*.flac; returns the list. Goes on where it was stopped."""
    config.out.mkdir(parents=True, exist_ok=True)
    listed = config.out / "synthetic.jsonl"
    settings, file = _settings(config), config.out / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{config.out}: begun with other settings ({file}); choose another folder for --out"
        )
    if listed.is_file():
        logger.info("%s is there already", listed)
        return listed
    Kokoro(config.kokoro)  # What lacks is told before anything is fetched or started.
    texts = config.out / "texts.txt"
    if not texts.is_file():
        found = list(dict.fromkeys(_texts(config)))
        if not found:
            raise ValueError(
                f"{config.texts or WORDNET}: no text of {WORDS[0]} to {WORDS[1]} words"
            )
        _write(texts, "".join(text + "\n" for text in found))
    _write(file, json.dumps(settings, indent=1))
    _run_all(config)
    rows = sorted(_made(config.out), key=lambda row: row["id"])
    credit = f"those of {config.texts.name}." if config.texts else WORDNET_CREDIT
    _write(config.out / "audio" / "README.md", CREDIT.format(texts=credit))
    _write(listed, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return listed


def _settings(config: SyntheticConfig) -> dict[str, str | float]:
    """What is made depends on all but the folders."""
    values = asdict(config)
    return {key: str(values[key]) for key in values if key not in ("out", "kokoro", "judge")}


def _run_all(config: SyntheticConfig) -> None:
    """Every process makes its share; progress is what stands in their lists."""
    command = [
        sys.executable,
        "-m",
        "recipes.offline.synthetic",
        json.dumps(asdict(config), default=str),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = [
        subprocess.Popen([*command, str(rank)], env=environment) for rank in range(config.processes)
    ]
    try:
        with tqdm(total=round(config.hours * 3600), desc="speech", unit="s") as bar:
            while any(one.poll() is None for one in running):
                time.sleep(1)
                bar.n = min(bar.total, round(_seconds(_made(config.out))))
                bar.refresh()
                if any(one.poll() for one in running):
                    break
    finally:
        for one in running:
            if one.poll() is None and any(other.poll() for other in running):
                one.terminate()
        codes = [one.wait() for one in running]
    if any(codes):
        raise ValueError("a process of the synthesis failed; what it says stands above")


def work(config: SyntheticConfig, rank: int) -> None:
    """One process: items rank, rank + processes, ... until its share of the hours is there."""
    from eval.text import word_errors
    from eval.transcribe import Judge
    from slm.tokenization.text_normalization import phonemes

    texts = (config.out / "texts.txt").read_text(encoding="utf-8").splitlines()
    kokoro, judge = Kokoro(config.kokoro), Judge(config.judge, num_threads=1, device="cpu")
    voices = _voices(kokoro, config)
    for kind in ("made", "rejected"):
        _mend(config.out / f"{kind}-{rank}.jsonl")
    names = sorted(voices)
    done = {row["id"]: row for row in _made(config.out, rank)}
    rejected = {row["id"] for row in _read(config.out / f"rejected-{rank}.jsonl")}
    seconds, wanted = _seconds(done.values()), config.hours * 3600 / config.processes
    for index in range(rank, 100 * len(texts), config.processes):
        if seconds >= wanted:
            return
        name = f"syn-{index:06d}"
        if name in done or name in rejected:
            continue
        random = np.random.default_rng((config.seed, index))
        voice = names[int(random.integers(len(names)))]
        text = texts[int(random.permutation(len(texts))[0])]
        speed = float(random.uniform(*SPEEDS))
        wave = kokoro.speak(phonemes(text, tied=True), voices[voice], speed)
        wave = resample(np.clip(wave, -1, 1), KOKORO_RATE, SAMPLE_RATE)
        wer = word_errors(text, judge.transcribe(wave, SAMPLE_RATE)).rate
        row = {
            "id": name, "audio": f"audio/{name}.flac", "text": text, "speaker": f"kokoro-{voice}",
            "duration": round(len(wave) / SAMPLE_RATE, 3), "language": "en", "wer": round(wer, 3),
        }  # fmt: skip
        if wer > config.most_wer:
            _append(config.out / f"rejected-{rank}.jsonl", row)
            continue
        write_audio(config.out / row["audio"], wave, SAMPLE_RATE)
        _append(config.out / f"made-{rank}.jsonl", row)
        seconds += len(wave) / SAMPLE_RATE
    raise ValueError(f"{config.out}: the texts do not last for {config.hours:g} hours")


def _voices(kokoro: Kokoro, config: SyntheticConfig) -> dict[str, np.ndarray]:
    own = {name: one for name, one in kokoro.styles.items() if name.startswith(ENGLISH)}
    own = {name: own[name] for name in sorted(own)[: config.voices]}
    return own | draw_styles(kokoro.styles, config.voices - len(own), config.seed)


def _texts(config: SyntheticConfig) -> Iterator[str]:
    """Sentences of a fitting length that are none of those to leave out."""
    from slm.data.corpus import read_texts

    known = set(_known(config.without)) if config.without is not None else set()
    found = _wordnet(config.out) if config.texts is None else read_texts(config.texts)
    for document in found:
        for text in re.split(r"(?<=[.!?])\s+", " ".join(document.split())):
            fits = WORDS[0] <= len(text.split()) <= WORDS[1]
            if fits and re.fullmatch(r"[A-Za-z',.;:!? -]+", text) and _plain(text) not in known:
                yield text if text[-1] in ".!?" else f"{text}."


def _wordnet(out: Path) -> Iterator[str]:
    """The examples in the glosses of Debian's wordnet-base."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".packages-") as temporary:
        (package,) = fetch_packages([WORDNET], Path(temporary))
        tree = Path(temporary) / "tree"
        run_command(["dpkg-deb", "-x", str(package), str(tree)])
        for file in sorted((tree / "usr/share/wordnet").glob("data.*")):
            for line in file.read_text(encoding="utf-8").splitlines():
                for example in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                    text = example.strip()
                    yield text[:1].upper() + text[1:]


def _known(path: Path) -> Iterator[str]:
    from codec.tokenize import text_of
    from codec.training.data import read_cuts

    return (_plain(text_of(cut)) for cut in list(read_cuts(path)))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def _made(out: Path, rank: int | None = None) -> list[dict]:
    files = [out / f"made-{rank}.jsonl"] if rank is not None else sorted(out.glob("made-*.jsonl"))
    return [row for file in files for row in _read(file) if (out / row["audio"]).is_file()]


def _read(path: Path) -> list[dict]:
    """Whole lines; a last one that was cut short counts as none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _seconds(rows: Iterable[dict]) -> float:
    return sum(row["duration"] for row in rows)


def _append(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _mend(path: Path) -> None:
    """Removes a last line that a killed process has only begun."""
    if path.is_file():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def config_of(values: dict) -> SyntheticConfig:
    """From JSON."""
    paths = ("out", "texts", "without", "kokoro", "judge")
    given: dict[str, Any] = {
        key: Path(value) if key in paths and value is not None else value
        for key, value in values.items()
    }
    return SyntheticConfig(**given)


if __name__ == "__main__":
    from recipes.lib.run import run_program

    run_program(lambda argv: work(config_of(json.loads(argv[0])), int(argv[1])))
