"""Cuts to crops to batches. Every batch is a pure function of (seed, step, rank): resuming at a
step needs no sampler state, and any number of loader processes yields the same crops."""

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codec.audio import (
    MAX_RATE,
    MIN_RATE,
    cancelled_channel,
    check_recording,
    read_audio,
    resample_wave,
)
from codec.json_lines import append_json_lines
from codec.program import reason_of

if TYPE_CHECKING:
    from lhotse import AudioSource, CutSet
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)

SOURCE_TYPES = ("file", "memory", "shar")
"""Types of recordings in lists of cuts. lhotse has two more: shell commands and addresses."""
MAX_MIXED_SECONDS = 3600
"""Maximum length of what lhotse reads, in memory: a list may state any padding."""
WORKER_SECONDS = 60
"""A loader process ends this long after SIGTERM, if its main process has not ended it before."""


def read_cuts(path: str | Path) -> "CutSet":
    """A lhotse manifest (cuts.jsonl.gz), in memory.

    Raises:
        ValueError: it is missing, corrupted or empty.
    """
    from lhotse import CutSet

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such list of cuts; make it with recipes/prepare_data.py")
    try:
        cuts = CutSet.from_jsonl(path).to_eager()
    except Exception as error:
        raise ValueError(
            f"{path}: a corrupted list of cuts ({reason_of(error)}); make it again"
        ) from error
    if len(cuts) == 0:
        raise ValueError(f"{path}: the list of cuts is empty")
    for cut in cuts:
        for part in _parts(cut):
            if not all(isinstance(time, int | float) and isfinite(time) for time in _times(part)):
                raise ValueError(f"{path}: {cut.id!r} has a start or duration that is no number")
        for source in _sources(cut):
            if source.type not in SOURCE_TYPES:
                raise ValueError(
                    f"{path}: the recording of {cut.id!r} is a {source.type}, which is not run or "
                    "downloaded; write it to a file and list that"
                )
    return cuts


def load_cut(
    cut: "Cut", sample_rate: int, *, start: float = 0.0, duration: float | None = None,
    allow_silence: bool = False,
) -> Float[np.ndarray, " S"]:  # fmt: skip
    """Samples of a cut, mono float32 in [-1, 1] at `sample_rate` Hz.

    Args:
        start: seconds after the start of the cut.
        duration: seconds; None: to the end of the cut.
        allow_silence: accept a silent cut.

    Raises:
        ValueError: the cut cannot be read, is empty or silent; the message names the recording.
    """
    rest = cut.duration - start
    duration = rest if duration is None else min(duration, rest)
    try:
        return _load(cut, sample_rate, start, duration, allow_silence)
    except ValueError:
        raise
    except Exception as error:
        # lhotse raises many kinds for archives and streams: this cut cannot be read.
        raise ValueError(f"{cut.id}: cannot be read ({reason_of(error)})") from error


def _parts(cut: Any) -> Sequence[Any]:
    """The cut, or the tracks of a mixture."""
    return getattr(cut, "tracks", [cut])


def _times(part: Any) -> tuple[Any, Any, Any]:
    """Start and duration of a cut, and its offset in a mixture, in seconds."""
    cut = getattr(part, "cut", part)
    return cut.start, cut.duration, getattr(part, "offset", 0.0)


def _sources(cut: Any) -> "Iterator[AudioSource]":
    """The sources of a cut, or of all parts of a mixture."""
    for part in _parts(cut):
        recording = _recording(getattr(part, "cut", part))
        yield from recording.sources if recording else ()


def _load(cut: "Cut", sample_rate: int, start: float, duration: float, allow_silence: bool):
    source = _single_file(cut)
    if source is not None:
        # To the end of the file, whatever its header states: a truncated file is detected there.
        end_of_file = abs(cut.start + start + duration - _recording(cut).duration) < 1e-6
        return read_audio(
            source, sample_rate, start=cut.start + start,
            duration=None if end_of_file else duration, allow_silence=allow_silence,
        )  # fmt: skip
    if duration > MAX_MIXED_SECONDS:
        raise ValueError(
            f"{cut.id}: a mixture or archive of {duration:g} s; at most {MAX_MIXED_SECONDS} s are "
            "read at once"
        )
    for rate in (getattr(part, "cut", part).sampling_rate for part in _parts(cut)):
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"{cut.id}: {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz are read")
    try:
        with _libsndfile():
            wave = cut.truncate(offset=start, duration=duration).load_audio()
    except Exception as error:  # lhotse raises many kinds, and again with lines of details.
        first = error
        while isinstance(first.__context__, Exception):
            first = first.__context__
        raise ValueError(f"{cut.id}: cannot be read ({reason_of(first)[:300]})") from first
    channel = cancelled_channel(wave.T)
    mono = np.clip(wave.mean(axis=0) if channel is None else wave[channel], -1, 1)
    mono = resample_wave(mono, cut.sampling_rate, sample_rate)
    check_recording(mono, cut.id, allow_silence=allow_silence)
    return mono


@contextmanager
def _libsndfile() -> Iterator[None]:
    """lhotse reads with libsndfile alone: its other readers start programs, some of them with the
    file's name in a shell command."""
    from lhotse.audio.backend import get_current_audio_backend, set_current_audio_backend

    before = get_current_audio_backend()
    set_current_audio_backend("LibsndfileBackend")
    try:
        yield
    finally:
        set_current_audio_backend(before)


def _single_file(cut: Any) -> str | None:
    """The file of a plain cut, or None where lhotse is needed (archives, mixtures)."""
    recording = _recording(cut)
    if recording is None or recording.transforms or len(recording.sources) != 1:
        return None
    return recording.sources[0].source if recording.sources[0].type == "file" else None


def _recording(cut: Any) -> Any:
    return getattr(cut, "recording", None)


class Crops(NamedTuple):
    """A batch of crops and their positions in the recordings."""

    wave: Float[Tensor, "B 1 S"]
    lengths: Int[Tensor, " B"]
    """Samples of each item without padding."""
    ids: tuple[str, ...]
    """Ids of the cuts."""
    starts: tuple[float, ...]
    """Seconds from the start of each cut."""
    codes: Int[Tensor, "B T"] | None = None
    """Codes of codebook 1 if they are known; the last one is repeated in padding."""


class CropDataset(Dataset):
    """Crop number i of an endless stream: epoch i // N, shuffled for every epoch.

    A recording that cannot be read is replaced by the next one of the epoch; its id and the reason
    are added to `bad` and to `bad_file`, which all loader processes share.
    """

    def __init__(
        self, cuts: Sequence["Cut"], *, sample_rate: int, seconds: float, seed: int,
        bad_file: Path | None = None,
        codes: Mapping[str, Integer[np.ndarray, " T"]] | None = None, hop_length: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            seconds: length of a crop.
            codes: codes of codebook 1 of each cut, by id. With them crops start at frames of
                `hop_length` samples and include their codes.
        """
        self._codes, self._hop = codes, hop_length
        self.bad_file = bad_file
        self.cuts, self.sample_rate, self.seed = list(cuts), sample_rate, seed
        self.seconds, self.samples = seconds, round(seconds * sample_rate)
        self.bad: dict[str, str] = {}

    def __getitem__(self, index: int) -> Crops:
        epoch, position = divmod(index, len(self.cuts))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.cuts))
        for shift in range(len(self.cuts)):
            cut = self.cuts[order[(position + shift) % len(self.cuts)]]
            if cut.id in self.bad:
                continue
            try:
                return self._crop(cut, np.random.default_rng((self.seed, index, 1)))
            except ValueError as error:
                self.bad[cut.id] = str(error)
                logger.warning("skipped from now on: %s", error)
                if self.bad_file is not None:
                    append_json_lines(self.bad_file, [{"id": cut.id, "why": str(error)}])
        raise ValueError("none of the recordings of the training list can be read")

    def _crop(self, cut: "Cut", generator: np.random.Generator) -> Crops:
        spare = max(cut.duration - self.seconds, 0.0)
        start = float(generator.uniform(0, spare))
        codes = None
        if self._codes is not None:
            first, count = int(start * self.sample_rate) // self._hop, self.samples // self._hop
            start = first * self._hop / self.sample_rate
            known = self._codes[cut.id]
            codes = known[np.minimum(np.arange(first, first + count), len(known) - 1)]
            codes = torch.from_numpy(codes.astype(np.int64))[None]
        # A crop may fall into a pause; prepare_data.py has checked that the recording has speech.
        wave = load_cut(
            cut, self.sample_rate, start=start, duration=self.seconds, allow_silence=True
        )[: self.samples]
        padded = torch.from_numpy(np.pad(wave, (0, self.samples - len(wave))))
        return Crops(padded[None, None], torch.tensor([len(wave)]), (cut.id,), (start,), codes)


def _join(crops: Sequence[Crops]) -> Crops:
    waves, lengths, ids, starts, codes = zip(*crops, strict=True)
    known = None if codes[0] is None else torch.cat(codes)
    return Crops(torch.cat(waves), torch.cat(lengths), sum(ids, ()), sum(starts, ()), known)


class _Indices(torch.utils.data.Sampler):
    """Batches of crop numbers for one rank, from one batch number on, to the last."""

    def __init__(self, *, first: int, last: int, batch_size: int, rank: int, world: int) -> None:
        self.first, self.last, self.batch_size = first, last, batch_size
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first, self.last):
            start = (batch * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return self.last - self.first


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_SECONDS))


def crop_batches(
    dataset: CropDataset, *, batch_size: int, first: int, last: int, rank: int, world: int,
    num_workers: int = 0,
) -> DataLoader:  # fmt: skip
    """A loader of the batches `first` to `last` - 1 of this rank, each `Crops`."""
    sampler = _Indices(first=first, last=last, batch_size=batch_size, rank=rank, world=world)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_join,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: each new loader draws from the global one, and a resumed run has one
        # loader more.
        generator=torch.Generator(),
        # Ctrl-C and a scheduler's SIGTERM are for the main process, which stops after its step.
        worker_init_fn=_ignore_interrupts,
        # Forking after threads have started can hang.
        multiprocessing_context="spawn" if num_workers else None,
    )


class Share(NamedTuple):
    """One rank's micro-batch of a step."""

    batch: Any
    """A NamedTuple of tensors."""
    num_targets: float
    """Targets of the step over ranks and micro-batches, divided by the number of micro-batches: the
    divisor that makes the step's gradient the mean over its targets."""
    weight: float
    """1, or 0 for a batch that is repeated to complete the last step of an evaluation."""


@runtime_checkable
class Data(Protocol):
    """Batches as a function of the step."""

    padding_share: float
    """Share of positions that are padding."""

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        """Micro-batch `micro` of `accumulate` of a step, for rank `rank` of `world`."""
        ...

    def num_steps(self, world: int, accumulate: int) -> int:
        """Number of steps of one pass over the data."""
        ...
