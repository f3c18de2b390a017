"""Sends requests to one voice, and measures its process; tests/soak/test_long_runs.py runs it.

usage: many_requests.py requests VOICE FOLDER COUNT WARM_UP    a mix of all kinds, in sequence
       many_requests.py threads VOICE FOLDER COUNT THREADS     all of them in each thread

FOLDER has speech.wav and long.wav. Each request has its own seed, and a digest of its result;
those that must fail have the error. Prints one JSON object.
"""

import gc
import hashlib
import json
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from codec import read_audio
from recipes.lib.run import run_recipe
from slm.voice import Voice

TEXTS = ("a cat", "the cat sat on a mat", "red hen", "dog and cat\n\na red hen in the sun")
POINTS = 10
"""Number of measurements after the warm-up."""


def digest(*parts: Any) -> str:
    """16 hex digits of arrays and texts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else str(part).encode())
    return found.hexdigest()[:16]


class Requests:
    """All kinds of requests to a voice; `run(kind, number)` returns a digest of the result."""

    def __init__(self, voice: Voice, folder: Path) -> None:
        self.voice, self.folder = voice, folder
        self.name = sorted(voice.prompts)[0]
        self.speech = read_audio(folder / "speech.wav", voice.codec.sample_rate)
        self.good: dict[str, Callable[[int], str]] = {
            "tts, shipped prompt": lambda n: self.tts(self.name, n),
            "tts, recording": lambda n: self.tts(folder / "speech.wav", n, "red hen"),
            "tts, samples and text": lambda n: self.tts(self.speech, n, "red hen"),
            "tts_batch": self.tts_batch,
            "tts to a file": self.tts_to_file,
            "stream": lambda n: self.stream(n, None),
            "stream, abandoned": lambda n: self.stream(n, 1),
            "stream, not begun": lambda n: self.stream(n, 0),
            "asr, samples": lambda n: digest(*voice.asr([self.speech[n % 100 :]])),
            "asr, file": lambda n: digest(voice.asr_file(folder / "long.wav")),
            "asr, stream, abandoned": self.asr_abandoned,
            "vc": self.vc,
        }
        noise = 0.1 * np.random.default_rng(0).standard_normal(8_000).astype("f4")
        broken = self.speech.copy()
        broken[100] = np.nan
        self.bad: dict[str, Callable[[int], Any]] = {
            "text without words": lambda n: voice.tts("...", self.name),
            "text of another script": lambda n: voice.tts(
                "\u043f\u0440\u043e\u0431\u0430", self.name
            ),
            "unknown prompt": lambda n: voice.tts("a cat", "nobody"),
            "missing recording": lambda n: voice.tts("a cat", folder / "no.wav"),
            "noise as the prompt": lambda n: voice.tts("a cat", noise),
            "samples that are not finite": lambda n: voice.asr([broken]),
            "integers as samples": lambda n: voice.asr([np.zeros(800, np.int16)]),
            "no recording": lambda n: voice.asr_file(folder / "bad.wav"),
            "no speech to convert": lambda n: voice.convert(noise, self.name),
            "seed out of range": lambda n: voice.tts("a cat", self.name, seed=10**23),
            "chunks of no length": lambda n: voice.stream("a cat", self.name, chunk_seconds=0),
            "lists of different lengths": lambda n: voice.tts_batch(["a cat"], []),
        }

    def run(self, kind: str, number: int) -> str:
        if kind in self.good:
            return self.good[kind](number)
        try:
            self.bad[kind](number)
        except ValueError as error:
            return digest(error)
        raise AssertionError(f"{kind}: no error")

    def tts(self, prompt: Any, number: int, prompt_text: str | None = None) -> str:
        text = TEXTS[number % len(TEXTS)]
        made = self.voice.tts(text, prompt, prompt_text, seed=number)
        return digest(made.wave, made.codes, made.failure, made.seed)

    def tts_batch(self, number: int) -> str:
        made = self.voice.tts_batch(TEXTS[:3], [self.name] * 3, [number, number + 1, number + 2])
        return digest(*(one.wave for one in made))

    def tts_to_file(self, number: int) -> str:
        path = self.folder / f"out-{threading.get_ident()}.wav"
        self.voice.save(self.voice.tts(TEXTS[0], self.name, seed=number), path)
        return digest(path.read_bytes())

    def stream(self, number: int, most: int | None) -> str:
        waves = self.voice.stream(TEXTS[number % 2], self.name, seed=number, chunk_seconds=0.1)
        return digest(*islice(waves, most))

    def asr_abandoned(self, number: int) -> str:
        def blocks() -> Any:
            yield self.speech
            raise ConnectionError("the client has gone")

        try:
            self.voice.asr_stream(blocks())
        except ConnectionError as error:
            return digest(error)
        raise AssertionError("no error")

    def vc(self, number: int) -> str:
        made = self.voice.convert(self.speech[number % 100 :], self.name)
        return digest(made.wave, made.codes)


def measured() -> dict[str, float]:
    """Of this process, after garbage collection."""
    gc.collect()
    process = psutil.Process()
    return {
        "mib": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def in_sequence(requests: Requests, count: int, warm_up: int) -> dict[str, Any]:
    kinds, order = [*requests.good, *requests.bad], random.Random(0)
    points, done = [], Counter[str]()
    began = time.monotonic()
    for number in range(count + 1):
        if number >= warm_up and (number - warm_up) % ((count - warm_up) // POINTS) == 0:
            points.append({"requests": number, **measured()})
            sys.stderr.write(f"{points[-1]}\n")
        if number < count:
            kind = order.choice(kinds)
            requests.run(kind, number)
            done[kind] += 1
    return {"points": points, "kinds": done, "seconds": time.monotonic() - began}


def in_threads(requests: Requests, count: int, num_threads: int) -> dict[str, Any]:
    kinds = [*requests.good, *requests.bad]
    tasks = [(kinds[number % len(kinds)], number) for number in range(count)]
    began = time.monotonic()
    expected = [requests.run(*task) for task in tasks]
    alone = time.monotonic() - began
    different: list[str] = []
    barrier = threading.Barrier(num_threads)

    def work(index: int) -> None:
        order = list(range(count))
        random.Random(index).shuffle(order)
        barrier.wait()
        for place in order:
            kind, number = tasks[place]
            try:
                found = requests.run(kind, number)
            except BaseException as error:
                different.append(f"{kind}: {error!r}")
                continue
            if found != expected[place]:
                different.append(f"{kind}: another result")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "requests": count * num_threads, "different": sorted(Counter(different).items()),
        "alone": alone, "seconds": time.monotonic() - began, **measured(),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    mode, folder = argv[0], Path(argv[2])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    voice = Voice.from_pretrained(argv[1])
    if voice.lm.lm.config.hidden_size < 100:  # The tiny model generates no end.
        voice.sampling = replace(
            voice.sampling, frames_per_token=(0.2, 0.5), spare_seconds=0.0, max_attempts=1,
            checks=("loop", "silence"),
        )  # fmt: skip
    requests = Requests(voice, folder)
    run = in_sequence if mode == "requests" else in_threads
    json.dump(run(requests, *map(int, argv[3:])), sys.stdout)


if __name__ == "__main__":
    run_recipe(main)
