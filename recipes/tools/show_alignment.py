"""Plots which word's LM state is the target of which codec frame, for DM-Codec's two alignments.

    python recipes/tools/show_alignment.py RECORDING [--text TEXT] [--frame-rate 50] --out words.png

Below the spectrogram are the words over frames for `ctc`, where a word's state is the target of the
frames of its word times, and for `index`, where word piece i is the target of frame i, as in the
released code (arXiv 2410.15017); at the bottom `index` enlarged. The words are those of --text, by
forced alignment, or recognized. Needs matplotlib (pip install -e '.[demo]'). Prints JSON.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from codec.audio import read_audio
from codec.distillation.objectives import word_per_frame
from codec.distillation.teachers import TextTeacher, load_text_teacher
from codec.distillation.word_alignment import Word, label_runs, load_transcriber
from codec.modules.layers import ceil_div
from codec.program import ArgumentParser
from codec.transcripts import lowercase_words

NO_WORD = -1
"""Of frames in pauses, or with a piece that belongs to no word ([CLS], [SEP], [PAD])."""


class Alignments(NamedTuple):
    """Index of the word of each frame, or NO_WORD."""

    timed: list[int]
    """For `ctc`."""
    indexed: list[int]
    """For `index`."""

    @property
    def agreement(self) -> float:
        """Share of the frames with a word by `ctc` that have the same word by `index`."""
        frames = [pair for pair in zip(*self, strict=True) if pair[0] != NO_WORD]
        return sum(one == other for one, other in frames) / max(1, len(frames))


def main(argv: Sequence[str]) -> None:
    """Plots one recording's alignments and prints them."""
    args = _parse(argv)
    transcriber = load_transcriber(args.transcriber, language=args.language)
    wave = read_audio(args.recording, transcriber.sample_rate)
    texts = None if args.text is None else [args.text]
    (words,) = transcriber.words(torch.from_numpy(wave)[None, None], texts=texts)
    if not words:
        raise ValueError(f"{args.recording}: no word was recognized; give them with --text")
    teacher = load_text_teacher(args.text_model)
    hop_length = round(transcriber.sample_rate / args.frame_rate)
    frame_rate = transcriber.sample_rate / hop_length
    num_frames = int(ceil_div(wave.size, hop_length))
    aligned = align_frames(words, teacher, num_frames, frame_rate)
    title = args.recording.name
    draw_alignments(args.out, wave, transcriber.sample_rate, words, aligned, frame_rate, title)
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


def align_frames(
    words: Sequence[Word], teacher: TextTeacher, num_frames: int, frame_rate: float
) -> Alignments:
    """Returns the word of each frame by both alignments, as in training.

    Args:
        frame_rate: frames per second of the codec.
    """
    spans = torch.tensor([[word.start, word.end] for word in words]).reshape(-1, 2)
    ctc = word_per_frame(spans, num_frames, frame_rate).tolist()
    return Alignments(ctc, index_words([word.text for word in words], teacher, num_frames))


def index_words(words: Sequence[str], teacher: TextTeacher, num_frames: int) -> list[int]:
    """Returns the word whose piece is at each frame in `TextTeacher.padded`, by its index."""
    encoded = teacher.tokenizer(
        lowercase_words(words),
        is_split_into_words=True,
        truncation=True,
        max_length=min(num_frames, teacher.max_pieces),
    )
    found = [NO_WORD if word is None else word for word in encoded.word_ids()]
    # The remaining frames have the last position's state, that of [SEP] or [PAD].
    return found + [NO_WORD] * (num_frames - len(found))


def word_runs(frames: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns the runs of frames of one word: (word, first frame, frame after the last)."""
    return [run for run in label_runs(frames) if run[0] != NO_WORD]


def _extent(frames: Sequence[int], word: int) -> list[int] | None:
    """First frame of a word and the one after its last; None: it has no frame."""
    own = [frame for frame, found in enumerate(frames) if found == word]
    return [own[0], own[-1] + 1] if own else None


def draw_alignments(
    out: Path,
    wave: Float[np.ndarray, " S"],
    sample_rate: int,
    words: Sequence[Word],
    aligned: Alignments,
    frame_rate: float,
    title: str,
) -> None:
    """Writes the plot of a recording's words over frames.

    Args:
        out: a .png file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib: install the extra `demo` (pip install -e '.[demo]')"
        ) from error

    seconds = wave.size / sample_rate
    figure = Figure(figsize=(min(30.0, max(8.0, 2 * seconds)), 7), layout="constrained")
    axes = figure.subplots(4, height_ratios=[3, 1.5, 1.5, 1.5])
    window = min(512, wave.size)
    # The logarithm of digital silence is not finite.
    noise = 1e-6 * np.random.default_rng(0).standard_normal(wave.size)
    axes[0].specgram(wave + noise, NFFT=window, Fs=sample_rate, noverlap=window // 2, cmap="magma")
    axes[0].set(ylabel="Hz", xlim=(0, seconds), title=title)
    end = len(aligned.timed)
    pieces = max((stop for _, _, stop in word_runs(aligned.indexed)), default=1)
    _draw_words(axes[1], word_runs(aligned.timed), words, end, "ctc")
    _draw_words(axes[2], word_runs(aligned.indexed), words, end, "index", labeled=False)
    _draw_words(axes[3], word_runs(aligned.indexed), words, min(end, pieces + 2), "index, enlarged")
    axes[3].set_xlabel(f"frames of {frame_rate:g} Hz (above: the complete recording)")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, format="png")


def _draw_words(
    axis: Any,
    found: Sequence[tuple[int, int, int]],
    words: Sequence[Word],
    end: int,
    title: str,
    *,
    labeled: bool = True,
) -> None:
    """Words as boxes over frames; a word has the same color in all rows."""
    from matplotlib import colormaps

    colors = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for word, start, stop in found:
        axis.axvspan(start, stop, color=colors[word % len(colors)], lw=0)
        if labeled:
            middle = (start + stop) / 2
            # A dollar sign starts a formula.
            text = words[word].text.replace("$", r"\$")
            axis.text(middle, 0.5, text, rotation=90, ha="center", va="center", fontsize=7)
    axis.set(xlim=(0, end), ylim=(0, 1), yticks=[], ylabel=title.replace(", ", ",\n"))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path)
    parser.add_argument("--text", help="transcript; default: recognized words")
    parser.add_argument(
        "--transcriber",
        default="models/whisper-base-transformers",
        help="Whisper or a CTC model (default: models/whisper-base-transformers)",
    )
    parser.add_argument(
        "--language", default="en", help="of the speech, for a multilingual Whisper (default: en)"
    )
    parser.add_argument(
        "--text-model",
        default="models/minilm-l6",
        help="text teacher, for its word pieces (default: models/minilm-l6)",
    )
    parser.add_argument(
        "--frame-rate", type=float, default=50.0, help="of the codec, in Hz (default: 50)"
    )
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    args = parser.parse_args(argv)
    if args.frame_rate <= 0:
        raise ValueError(f"--frame-rate must be positive, got {args.frame_rate}")
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: name a .png file")
    return args


if __name__ == "__main__":
    from recipes.lib.run import run_recipe

    run_recipe(main)
