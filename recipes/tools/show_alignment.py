"""Which codec frame learns from which word: a picture of DM-Codec's alignments for one recording.

    python recipes/tools/show_alignment.py RECORDING [--text TEXT] [--frame-rate 50] --out
    alignment.png

Below the spectrogram stand the words over frames under `ctc`, where a word's state lies on the
frames in which it is spoken, and under `index`, where word piece i lies on frame i as in the
released code (arXiv 2410.15017); at the bottom `index` enlarged. With --text its words are aligned,
without it they are recognised. Needs matplotlib (pip install -e '.[demo]'). Prints JSON.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from codec.audio import read_audio
from codec.distillation.objectives import word_per_frame
from codec.distillation.teachers import TextTeacher, load_text_teacher, lowercase_if_all_caps
from codec.distillation.word_alignment import Word, load_transcriber
from codec.modules.layers import ceil_div
from codec.program import ArgumentParser

SILENCE = -1
"""In place of a word: frames without speech, or with a piece of no word ([CLS], [SEP], [PAD])."""


class Run(NamedTuple):
    """Frames in a row with one word."""

    word: int
    start: int
    stop: int


class Alignments(NamedTuple):
    """The word of each frame, or SILENCE."""

    timed: list[int]
    """Under `ctc`."""
    indexed: list[int]
    """Under `index`."""

    @property
    def agreement(self) -> float:
        """Share of the spoken frames that `index` gives the word which is spoken there."""
        spoken = [pair for pair in zip(*self, strict=True) if pair[0] != SILENCE]
        return sum(one == other for one, other in spoken) / max(1, len(spoken))


def main(argv: Sequence[str]) -> None:
    """Draws one recording's alignments and prints them."""
    args = parse(argv)
    transcriber = load_transcriber(args.transcriber, language=args.language)
    wave = read_audio(args.recording, transcriber.sample_rate)
    texts = None if args.text is None else [args.text]
    (words,) = transcriber.words(torch.from_numpy(wave)[None, None], texts=texts)
    if not words:
        raise ValueError(f"{args.recording}: no word was heard; give them with --text")
    teacher = load_text_teacher(args.text_model)
    hop_length = round(transcriber.sample_rate / args.frame_rate)
    frame_rate = transcriber.sample_rate / hop_length
    num_frames = int(ceil_div(wave.size, hop_length))
    aligned = align(words, teacher, num_frames, frame_rate)
    title = args.recording.name
    draw(args.out, wave, transcriber.sample_rate, words, aligned, frame_rate, title)
    results = {
        "out": str(args.out),
        "seconds": round(wave.size / transcriber.sample_rate, 3),
        "frame_rate": frame_rate,
        "num_frames": num_frames,
        "agreement": round(aligned.agreement, 4),
        "words": [
            {
                "text": word.text,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "ctc": _extent(aligned.timed, number),
                "index": _extent(aligned.indexed, number),
            }
            for number, word in enumerate(words)
        ],
    }
    print(json.dumps(results, ensure_ascii=False))


def align(
    words: Sequence[Word], teacher: TextTeacher, num_frames: int, frame_rate: float
) -> Alignments:
    """The word of each frame in both ways, as training has them."""
    spans = torch.tensor([[word.start, word.end] for word in words]).reshape(-1, 2)
    ctc = word_per_frame(spans, num_frames, frame_rate).tolist()
    return Alignments(ctc, index_words([word.text for word in words], teacher, num_frames))


def index_words(words: Sequence[str], teacher: TextTeacher, num_frames: int) -> list[int]:
    """The word whose piece stands at each frame in `TextTeacher.padded`."""
    encoded = teacher.tokenizer(
        lowercase_if_all_caps(words),
        is_split_into_words=True,
        truncation=True,
        max_length=min(num_frames, teacher.max_pieces),
    )
    found = [SILENCE if word is None else word for word in encoded.word_ids()]
    # The last position's state fills what is left: [SEP]'s or a pad's, never a word's.
    return found + [SILENCE] * (num_frames - len(found))


def runs(frames: Sequence[int]) -> list[Run]:
    """Words over frames, without the silence."""
    found, start = [], 0
    for word, group in groupby(frames):
        stop = start + len(list(group))
        if word != SILENCE:
            found.append(Run(word, start, stop))
        start = stop
    return found


def _extent(frames: Sequence[int], word: int) -> list[int] | None:
    """First frame of a word and the one after its last; None where it has none."""
    own = [frame for frame, found in enumerate(frames) if found == word]
    return [own[0], own[-1] + 1] if own else None


def draw(
    out: Path,
    wave: np.ndarray,
    sample_rate: int,
    words: Sequence[Word],
    aligned: Alignments,
    frame_rate: float,
    title: str,
) -> None:
    """The picture. ValueError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib: install the extra `demo` (pip install -e '.[demo]')"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = wave.size / sample_rate
    figure, axes = pyplot.subplots(
        4,
        1,
        figsize=(min(30.0, max(8.0, 2 * seconds)), 7),
        height_ratios=[3, 1.5, 1.5, 1.5],
        layout="constrained",
    )
    window = min(512, wave.size)
    # Silent stretches have no logarithm.
    noise = 1e-6 * np.random.default_rng(0).standard_normal(wave.size)
    axes[0].specgram(wave + noise, NFFT=window, Fs=sample_rate, noverlap=window // 2, cmap="magma")
    axes[0].set(ylabel="Hz", xlim=(0, seconds), title=title)
    end = len(aligned.timed)
    pieces = max((run.stop for run in runs(aligned.indexed)), default=1)
    _draw_words(axes[1], runs(aligned.timed), words, end, "ctc")
    _draw_words(axes[2], runs(aligned.indexed), words, end, "index", labelled=False)
    _draw_words(axes[3], runs(aligned.indexed), words, min(end, pieces + 2), "index, enlarged")
    axes[3].set_xlabel(f"frames of {frame_rate:g} Hz (above: the whole recording)")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, format="png")
    pyplot.close(figure)


def _draw_words(
    axis: Any,
    found: Sequence[Run],
    words: Sequence[Word],
    end: int,
    title: str,
    *,
    labelled: bool = True,
) -> None:
    """Words as boxes over frames; a word has one colour in all rows."""
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for word, start, stop in found:
        axis.axvspan(start, stop, color=colours[word % len(colours)], lw=0)
        if labelled:
            middle = (start + stop) / 2
            # A dollar sign would begin a formula.
            text = words[word].text.replace("$", r"\$")
            axis.text(middle, 0.5, text, rotation=90, ha="center", va="center", fontsize=7)
    axis.set(xlim=(0, end), ylim=(0, 1), yticks=[], ylabel=title.replace(", ", ",\n"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path)
    parser.add_argument("--text", help="what is said; without it the transcriber listens")
    parser.add_argument(
        "--transcriber",
        default="models/whisper-base-transformers",
        help="Whisper or a CTC model (default: models/whisper-base-transformers)",
    )
    parser.add_argument(
        "--language", default="en", help="what is spoken, for a multilingual Whisper (default: en)"
    )
    parser.add_argument(
        "--text-model",
        default="models/minilm-l6",
        help="the text teacher, for its word pieces (default: models/minilm-l6)",
    )
    parser.add_argument("--frame-rate", type=float, default=50.0, help="the codec's (default: 50)")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    args = parser.parse_args(argv)
    if args.frame_rate <= 0:
        raise ValueError(f"--frame-rate must be positive, got {args.frame_rate}")
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: name a .png file")
    return args


if __name__ == "__main__":
    from recipes.lib.run import run_program

    run_program(main)
