"""What a training run measures between two logged steps."""

import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from codec.model import Codec
from codec.quantize import Quantized, codebook_use, count_codes


class Window:
    """Means of the losses and the use of codes since the last logged step."""

    def __init__(self, codec: Codec) -> None:
        self.sizes = codec.codebook_sizes
        self.steps, self.teachers = Stopwatch(codec.device), Stopwatch(codec.device)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(len(self.sizes), max(self.sizes), dtype=torch.long)
        self.batches, self.started = 0, time.perf_counter()

    def add(self, quantized: Quantized, parts: dict[str, Tensor]) -> None:
        """Notes one batch."""
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0) + part.detach()
        # Entry counts stay on the device; moving them every step would wait for it.
        self.counts = self.counts.to(quantized.codes.device)
        self.counts += count_codes(quantized.codes, max(self.sizes))
        self.batches += 1

    def means(self, accelerator: Any, audio_seconds: float) -> dict[str, float]:
        """Mean losses, use and perplexity over codebooks, seconds of audio a second, and the share
        of the steps' time that teachers took; then a new window begins."""
        values = {name: float(total) / self.batches for name, total in self.sums.items()}
        use = codebook_use(accelerator.reduce(self.counts), self.sizes)
        values |= {"use": float(use.share.mean()), "perplexity": float(use.perplexity.mean())}
        elapsed = time.perf_counter() - self.started
        values["audio_seconds_per_second"] = self.batches * audio_seconds / elapsed
        taken, whole = self.teachers.read(), self.steps.read()
        if taken:
            values["teacher_share"] = taken / whole
        self._clear()
        return values


def line(values: dict[str, float]) -> str:
    """The values in one line of a progress bar."""
    return " ".join(
        f"{name.removesuffix('_seconds_per_second')} {value:.3g}" for name, value in values.items()
    )


class Stopwatch:
    """Sums the time spent inside `with stopwatch:`; on a GPU the device's own, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._seconds, self._started = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []
        self._gpu = device.type == "cuda"

    def __enter__(self) -> None:
        if self._gpu:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            self._events.append((pair[0], pair[1]))
        else:
            self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds = self._seconds
        if self._events:
            torch.cuda.synchronize()
            seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds
