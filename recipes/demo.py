"""A shipped voice speaks, listens and converts: `make demo`.

    python recipes/demo.py [--prompt RECORDING] [--text TEXT] [--voice DIR] [--out DIR]

Every step is a command that is printed before it runs and works as well on recordings of your own.
What was made is in out/voice/ afterwards: waves, spectrogram.png and scores.md.

Spectrograms as a picture.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from codec import load_codec, read_audio, write_audio
from codec.training.config import MelScaleConfig
from codec.training.losses import log_mel
from eval.speaker import SpeakerEncoder, similarity
from eval.text import word_errors
from eval.transcribe import Judge
from recipes.lib.commands import Step, run
from recipes.lib.run import run_program
from slm.data.sequences import load_prompts

SAMPLE_RATE = 16_000


def draw(waves: dict[str, Path], out: Path) -> None:
    """A picture of the log-mel spectrograms, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale = MelScaleConfig(window=1024, hop=160, num_mels=80)
    figure, axes = pyplot.subplots(len(waves), 1, figsize=(10, 2.2 * len(waves)))
    for axis, (title, path) in zip(np.atleast_1d(axes), waves.items(), strict=True):
        wave = torch.from_numpy(read_audio(path, SAMPLE_RATE))
        mel = log_mel(wave[None, None], scale, SAMPLE_RATE)[0].numpy()
        extent = (0, len(wave) / SAMPLE_RATE, 0, scale.num_mels)
        axis.imshow(mel, origin="lower", aspect="auto", extent=extent, cmap="magma")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("mel bin")
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


VOICE, OUT = Path("models/small"), Path("out/voice")
JUDGE, SPEAKER = Path("models/whisper-base"), Path("models/speaker-encoder")
TEXT = "The old clock struck nine, and nobody in the quiet house noticed."


class Wave(NamedTuple):
    """Something to listen to."""

    name: str
    title: str
    text: str | None
    """What it ought to say; None: it is scored in nothing."""
    voice: str | None
    """The file whose voice it ought to have."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", type=Path, help="a recording whose voice speaks, too")
    parser.add_argument("--text", default=TEXT, help="what is said")
    parser.add_argument("--voice", type=Path, default=VOICE, help=f"(default: {VOICE})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"(default: {OUT})")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    names = sorted(load_prompts(args.voice / "prompts"))
    if len(names) < 2:
        raise ValueError(f"{args.voice}: a voice with two shipped prompts or more is needed")
    names = [names[0], names[-1]]
    if args.prompt is not None and not args.prompt.is_file():
        raise ValueError(f"{args.prompt}: no such recording")
    for folder in (JUDGE, SPEAKER):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there; run `make models` first")
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.voice, args.out, names)
    todo, waves = steps(args, names)
    told = [run(step, number, len(todo)) for number, step in enumerate(todo, 1)]
    draw({one.title: args.out / one.name for one in waves}, args.out / "spectrogram.png")
    transcript = json.loads(told[-1].splitlines()[-1])["text"]
    report = f"{score(waves, args.out)}\n`slm asr` wrote of speech.wav: {transcript}\n"
    (args.out / "scores.md").write_text(report, encoding="utf-8")
    print(f"\n{report}")
    files = [*(one.name for one in waves), "spectrogram.png", "scores.md"]
    print("Listen and look:", *(f"    {args.out / name}" for name in files), sep="\n")
    print(f"{time.monotonic() - began:.0f} seconds")


def steps(args: argparse.Namespace, names: list[str]) -> tuple[list[Step], list[Wave]]:
    """What a user of the voice would type, and what comes of it."""
    slm, voice, out = [sys.executable, "-m", "slm"], ["--voice", str(args.voice)], args.out
    speech, converted, own = (str(out / f"{one}.wav") for one in ("speech", "converted", "yours"))

    def tts(prompt: str, file: str) -> list[str]:
        return [*slm, "tts", *voice, "--text", args.text, "--prompt", prompt, "--out", file]

    todo = [Step(f"say a sentence in the voice {names[0]}", tts(names[0], speech))]
    waves = [
        Wave(f"{names[0]}.wav", f"{names[0]}, a shipped voice", None, None),
        Wave("speech.wav", f"in this voice: {args.text}", args.text, f"{names[0]}.wav"),
    ]
    if args.prompt is not None:
        write_audio(out / "prompt.wav", read_audio(args.prompt, SAMPLE_RATE), SAMPLE_RATE)
        todo.append(Step(f"say it in the voice of {args.prompt.name}", tts(str(args.prompt), own)))
        waves += [
            Wave("prompt.wav", f"{args.prompt.name}, your recording", None, None),
            Wave("yours.wav", "in its voice", args.text, "prompt.wav"),
        ]
    vc = [*slm, "vc", *voice, "--source", speech, "--target", names[1], "--out", converted]
    todo.append(Step(f"convert the first to the voice {names[1]}", vc))
    waves += [
        Wave(f"{names[1]}.wav", f"{names[1]}, another shipped voice", None, None),
        Wave("converted.wav", "the first sentence in this voice", args.text, f"{names[1]}.wav"),
    ]
    todo.append(Step("transcribe it", [*slm, "asr", *voice, speech]))
    return todo, waves


def write_prompts(voice: Path, out: Path, names: list[str]) -> None:
    """The shipped prompts' codes as waves."""
    codec, prompts = load_codec(voice / "codec"), load_prompts(voice / "prompts")
    for name in names:
        codes = torch.from_numpy(np.asarray(prompts[name].codes))[None]
        wave = codec.decode(codes)[0, 0].numpy()
        write_audio(out / f"{name}.wav", wave, codec.sample_rate)


def score(waves: list[Wave], out: Path) -> str:
    """A table: words that the judge heard otherwise, and how like the prompt's the voice is."""
    judge, encoder = Judge(JUDGE), SpeakerEncoder.from_folder(SPEAKER)
    rows = ["| file | WER | similarity to its prompt | heard by the judge |", "|---|---|---|---|"]
    for one in waves:
        if one.text is None or one.voice is None:
            continue
        sounds = [read_audio(out / name, SAMPLE_RATE) for name in (one.name, one.voice)]
        heard = judge.transcribe(sounds[0], SAMPLE_RATE).strip()
        near = similarity(*(encoder.embed(sound, SAMPLE_RATE) for sound in sounds))
        wer = word_errors(one.text, heard).rate
        rows.append(f"| {one.name} | {100 * wer:.0f} % | {near:.2f} | {heard} |")
    return "\n".join(rows)


if __name__ == "__main__":
    run_program(main)
