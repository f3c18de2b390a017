"""Clips of a page: which ones, and their audio, pictures and texts as HTML."""

import base64
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from codec.audio import audio_info, read_audio, resample_wave, write_audio
from eval.text import whisper_normalize
from recipes.scoring.results import ScoredClip
from recipes.scoring.rows import ORIGINAL

MEDIA_TYPES = {".opus": "audio/ogg", ".flac": "audio/flac", ".webp": "image/webp"}
NUM_BINS = 240
"""Columns of a picture."""


class ClipSet(NamedTuple):
    """The same utterance by all systems of a list."""

    part: str
    list: str
    id: str
    clips: dict[str, ScoredClip]
    """By system, the original first."""


def choose_clips(clips: Iterable[ScoredClip], count: int, seed: int) -> list[ClipSet]:
    """Returns up to `count` utterances of each part and list, a random sample of those that most of
    its systems have audio of, in the order of the files."""
    lists: dict[tuple[str, str], dict[str, dict[str, ScoredClip]]] = {}
    for clip in clips:
        lists.setdefault((clip.part, clip.list), {}).setdefault(clip.id, {})[clip.system] = clip
    chosen: list[ClipSet] = []
    for (part, list_name), utterances in lists.items():
        audible = {name: sum(clip.audio is not None for clip in own.values())
                   for name, own in utterances.items()}  # fmt: skip
        most = max(audible.values())
        names = [name for name in utterances if audible[name] == most]
        random = np.random.default_rng(seed)
        places = random.choice(len(names), size=min(count, len(names)), replace=False)
        for place in sorted(places):
            own = utterances[names[place]]
            ordered = dict(sorted(own.items(), key=lambda item: item[0] != ORIGINAL))
            chosen.append(ClipSet(part, list_name, names[place], ordered))
    return chosen


def data_uri(content: bytes, suffix: str) -> str:
    """Returns the content of a file as the source of an element."""
    return f"data:{MEDIA_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def audio_file(
    wave: Float[np.ndarray, " S"], sample_rate: int, suffix: str,
    tags: Mapping[str, str] | None = None,
) -> bytes:  # fmt: skip
    """Returns a wave (S,) as the content of an audio file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"wave{suffix}"
        write_audio(path, np.clip(wave, -1, 1), sample_rate, tags)
        return path.read_bytes()


def read_waves(paths: Mapping[str, Path]) -> tuple[dict[str, Float[np.ndarray, " S"]], int]:
    """Returns recordings by name, and their sample rate: 16 kHz, or 24 kHz if one has more."""
    rate = 16_000
    if any(audio_info(path).sample_rate > rate for path in paths.values()):
        rate = 24_000
    return {name: read_at(path, rate) for name, path in paths.items()}, rate


def read_at(path: Path, sample_rate: int) -> Float[np.ndarray, " S"]:
    """Returns a recording at a rate, which may be higher than its own."""
    own = audio_info(path).sample_rate
    return resample_wave(read_audio(path, own, allow_silence=True), own, sample_rate)


def player(
    wave: Float[np.ndarray, " S"], sample_rate: int, label: str, tags: Mapping[str, str]
) -> str:
    """Returns an audio element that embeds a wave (S,) as Ogg Opus with its tags."""
    source = data_uri(audio_file(wave, sample_rate, ".opus", tags), ".opus")
    return (
        f'<audio controls preload="metadata" aria-label="{escape(label)}" src="{source}"></audio>'
    )


def pictures(
    wave: Float[np.ndarray, " S"], sample_rate: int, label: str, peak: float
) -> str:  # fmt: skip
    """Returns the waveform and the log-mel spectrogram of a wave (S,) as elements.

    Args:
        peak: the highest sample of the waveform's picture.
    """
    from recipes.lib.spectrogram import spectrogram_picture

    parts = np.array_split(np.clip(wave / max(peak, 1e-4), -1, 1), NUM_BINS)
    high = [round(21.5 - 21 * float(part.max(initial=0)), 1) for part in parts]
    low = [round(22.5 - 21 * float(part.min(initial=0)), 1) for part in parts]
    upper = "L".join(f"{x} {y}" for x, y in enumerate(high))
    lower = "L".join(f"{x} {low[x]}" for x in reversed(range(NUM_BINS)))
    picture = data_uri(spectrogram_picture(wave, sample_rate), ".webp")
    about = escape(f"of {label}, {wave.size / sample_rate:.2f} s")
    return (
        f'<svg class="wave" viewBox="0 0 {NUM_BINS} 44" preserveAspectRatio="none" role="img" '
        f'aria-label="Waveform {about}"><path d="M{upper}L{lower}Z"/></svg>'
        f'<img alt="Spectrogram {about}, 0 to {sample_rate // 2000} kHz" '
        f'src="{picture}">'
    )


def marked_words(reference: str, transcript: str, language: str = "en") -> str:
    """Returns a transcript as HTML with its errors against the reference, both normalized:
    deletions as `del`, insertions as `ins`, substitutions as one after the other."""
    words = [whisper_normalize(text, language).split() for text in (reference, transcript)]
    return " ".join(_marked(*words))


def _marked(reference: Sequence[str], transcript: Sequence[str]) -> Iterator[str]:
    import jiwer

    def shown(element: str, words: Sequence[str], what: str) -> str:
        text = escape(" ".join(words))
        return f'<{element} title="{what}"><span class="hidden">[{what}:</span> {text}' \
               f'<span class="hidden">]</span></{element}>'  # fmt: skip

    aligned = jiwer.process_words(" ".join(reference), " ".join(transcript))
    for chunk in aligned.alignments[0]:
        before = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        after = transcript[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "equal":
            yield escape(" ".join(after))
        elif chunk.type == "substitute":
            yield f"{shown('del', before, 'substituted')} {shown('ins', after, 'by')}"
        elif chunk.type == "delete":
            yield shown("del", before, "deleted")
        else:
            yield shown("ins", after, "inserted")
