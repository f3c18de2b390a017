"""Synthesizes English speech of many voices and filters it by WER: `prepare_data.py synthetic`.

Texts are WordNet's example sentences (Debian's package wordnet-base, WordNet's license) or those of
a file. Voices are Kokoro-82M's English ones and random ones of the same distribution. Whisper
transcribes every recording; one with a high WER is left out.
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
from jaxtyping import Float
from tqdm import tqdm

from codec.audio import resample_wave, write_audio
from codec.io import atomic_file
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from codec.program import software
from recipes.offline.debian_prompts import fetch_packages, run_command
from recipes.offline.kokoro import SAMPLE_RATE as KOKORO_RATE
from recipes.offline.kokoro import Kokoro, draw_styles

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
WORDNET = "wordnet-base"
WORDS = (4, 25)
"""Minimum and maximum number of words of a text."""
SPEEDS = (0.88, 1.18)
"""Range of the uniformly distributed speed; 1 is normal."""
ENGLISH = ("af_", "am_", "bf_", "bm_")
"""Prefixes of Kokoro's English voices."""
CREDIT = """\
# Synthetic English speech

Made by `recipes/prepare_data.py synthetic` with Kokoro-82M (hexgrad, Apache-2.0) from espeak-ng's
phonemes. Voices: Kokoro's English ones, and random ones of the distribution of all its voices.
Texts: {texts}
"""
WORDNET_CREDIT = "example sentences of WordNet 3.0, Copyright 2006 by Princeton University."


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Amount and sources of synthetic speech; they determine the result."""

    out: Path
    """Folder of the list and the recordings."""
    hours: float = 5.0
    """Amount of speech that is kept."""
    voices: int = 200
    """Number of voices: the model's English ones, and random ones."""
    texts: Path | None = None
    """A .txt or .jsonl file, or a .gz of one; None: WordNet's example sentences."""
    without: Path | None = None
    """List of cuts whose texts are excluded, such as the test set's."""
    kokoro: Path = Path("models/kokoro-82m")
    """Folder of the synthesizer."""
    judge: Path = Path("models/whisper-base")
    """Folder of the Whisper model."""
    most_wer: float = 0.25
    """Maximum WER of a recording that is kept."""
    processes: int = 2
    """Number of processes, of one thread each."""
    seed: int = 0
    """Seed of voices, texts and speeds."""

    def __post_init__(self) -> None:
        if not self.hours > 0 or self.voices < 1 or self.processes < 1:
            raise ValueError("--hours, --voices and --processes must be positive")
        if not self.judge.is_dir():
            raise ValueError(f"{self.judge}: no such folder; `make models` makes the judge")


def make_speech(config: SyntheticConfig) -> Path:
    """Writes OUT/synthetic.jsonl and OUT/audio/*.flac; returns the list. Resumes.

    Raises:
        ValueError: OUT has other settings, a model is missing, or no text is usable.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    listed = config.out / "synthetic.jsonl"
    settings, file = _settings(config), config.out / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{config.out}: started with other settings ({file}); choose another --out"
        )
    if listed.is_file():
        logger.info("%s exists", listed)
        return listed
    Kokoro(config.kokoro)  # Fails before anything is downloaded.
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
    write_json_lines(listed, rows)
    return listed


def _settings(config: SyntheticConfig) -> dict[str, str | float]:
    """Everything that the result depends on."""
    values = asdict(config)
    return {key: str(values[key]) for key in values if key not in ("out", "kokoro", "judge")}


def _run_all(config: SyntheticConfig) -> None:
    """Runs `work` in processes; the progress bar shows the sum of their lists."""
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
        raise ValueError("a process of the synthesis failed; see its error above")


def work(config: SyntheticConfig, rank: int) -> None:
    """Synthesizes the items rank, rank + processes, ... until they make the process's share.

    Raises:
        ValueError: there are too few texts.
    """
    from eval.text import word_errors
    from eval.transcribe import Judge
    from slm.tokenization.text_normalization import phonemes

    texts = (config.out / "texts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    kokoro, judge = Kokoro(config.kokoro), Judge(config.judge, num_threads=1, device="cpu")
    voices = _voices(kokoro, config)
    names = sorted(voices)
    done = {row["id"]: row for row in _made(config.out, rank)}
    rejected = read_appended(config.out / f"rejected-{rank}.jsonl")
    rejected = {line.value["id"] for line in rejected}
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
        wave = kokoro.synthesize(phonemes(text, tied=True), voices[voice], speed)
        wave = resample_wave(np.clip(wave, -1, 1), KOKORO_RATE, SAMPLE_RATE)
        wer = word_errors(text, judge.transcribe(wave, SAMPLE_RATE)).rate
        row = {
            "id": name, "audio": f"audio/{name}.flac", "text": text, "speaker": f"kokoro-{voice}",
            "duration": round(len(wave) / SAMPLE_RATE, 3), "language": "en", "wer": round(wer, 3),
        }  # fmt: skip
        if wer > config.most_wer:
            append_json_lines(config.out / f"rejected-{rank}.jsonl", [row])
            continue
        made = f"synthetic speech by Kokoro-82M; voice {voice}; seed {config.seed}"
        tags = {"software": software(), "comment": made}
        write_audio(config.out / row["audio"], wave, SAMPLE_RATE, tags)
        append_json_lines(config.out / f"made-{rank}.jsonl", [row])
        seconds += len(wave) / SAMPLE_RATE
    raise ValueError(f"{config.out}: too few texts for {config.hours:g} hours; give more")


def _voices(kokoro: Kokoro, config: SyntheticConfig) -> dict[str, Float[np.ndarray, "N 256"]]:
    own = {name: one for name, one in kokoro.styles.items() if name.startswith(ENGLISH)}
    own = {name: own[name] for name in sorted(own)[: config.voices]}
    return own | draw_styles(kokoro.styles, config.voices - len(own), config.seed)


def _texts(config: SyntheticConfig) -> Iterator[str]:
    """Yields sentences of suitable length that are not excluded."""
    from slm.data.corpus import read_texts

    excluded = set(_texts_of_cuts(config.without)) if config.without is not None else set()
    found = _wordnet(config.out) if config.texts is None else read_texts(config.texts)
    for document in found:
        for text in re.split(r"(?<=[.!?])\s+", " ".join(document.split())):
            fits = WORDS[0] <= len(text.split()) <= WORDS[1]
            if fits and re.fullmatch(r"[A-Za-z',.;:!? -]+", text) and _plain(text) not in excluded:
                yield text if text[-1] in ".!?" else f"{text}."


def _wordnet(out: Path) -> Iterator[str]:
    """Yields the examples in the glosses of Debian's wordnet-base."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".packages-") as temporary:
        (package,) = fetch_packages([WORDNET], Path(temporary))
        tree = Path(temporary) / "tree"
        run_command(["dpkg-deb", "-x", str(package), str(tree)])
        for file in sorted((tree / "usr/share/wordnet").glob("data.*")):
            for line in file.read_text(encoding="utf-8").splitlines():
                for example in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                    text = example.strip()
                    yield text[:1].upper() + text[1:]


def _texts_of_cuts(path: Path) -> Iterator[str]:
    from codec.tokenize import text_of
    from codec.training.data import read_cuts

    return (_plain(text_of(cut)) for cut in list(read_cuts(path)))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def _made(out: Path, rank: int | None = None) -> list[dict]:
    files = [out / f"made-{rank}.jsonl"] if rank is not None else sorted(out.glob("made-*.jsonl"))
    rows = [line.value for file in files for line in read_appended(file)]
    return [row for row in rows if (out / row["audio"]).is_file()]


def _seconds(rows: Iterable[dict]) -> float:
    return float(sum(row["duration"] for row in rows))


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def synthetic_config(values: dict) -> SyntheticConfig:
    """Returns the configuration of a parsed JSON object."""
    paths = ("out", "texts", "without", "kokoro", "judge")
    given: dict[str, Any] = {
        key: Path(value) if key in paths and value is not None else value
        for key, value in values.items()
    }
    return SyntheticConfig(**given)


if __name__ == "__main__":
    from recipes.lib.run import run_recipe

    run_recipe(lambda argv: work(synthetic_config(json.loads(argv[0])), int(argv[1])))
