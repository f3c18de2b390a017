"""Synthesizes, converts and transcribes speech with the shipped voice: `make demo`.

    python recipes/demo.py [--prompt RECORDING] [--text TEXT] [--voice DIR] [--out DIR]

Every step is a command that is printed before it runs; the same commands take your own recordings.
OUT gets the waves, spectrogram.png and scores.md.
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
from codec.program import ArgumentParser
from eval.speaker import SpeakerEncoder, similarity
from eval.text import word_errors
from eval.transcribe import Judge
from recipes.lib.commands import Command, run
from recipes.lib.run import finished, run_recipe
from recipes.lib.spectrogram import draw_spectrograms
from recipes.offline.packaged_models import JUDGE, SPEAKER, check_models
from slm.data.prompts import load_prompts

SAMPLE_RATE = 16_000
VOICE, OUT = Path("models/small"), Path("out/voice")
TEXT = "The old clock struck nine, and nobody in the quiet house noticed."


class Wave(NamedTuple):
    """A wave of the demo."""

    name: str
    """File name in OUT."""
    title: str
    text: str | None = None
    """Reference transcript; None: the wave is not scored."""
    prompt: str | None = None
    """File name of the recording whose voice it should have."""


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", type=Path, help="recording whose voice is cloned as well")
    parser.add_argument("--text", default=TEXT, help="text to synthesize")
    parser.add_argument("--voice", type=Path, default=VOICE, help=f"(default: {VOICE})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"(default: {OUT})")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Runs the commands, and writes the waves, their picture and their scores to OUT."""
    args = _parse(argv)
    names = sorted(load_prompts(args.voice / "prompts"))
    if len(names) < 2:
        raise ValueError(f"{args.voice}: the demo needs a voice with at least two prompts")
    names = [names[0], names[-1]]
    if args.prompt is not None and not args.prompt.is_file():
        raise ValueError(f"{args.prompt}: no such recording")
    check_models(JUDGE, SPEAKER)
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    decode_prompts(args.voice, args.out, names)
    commands, waves = commands_of(args, names)
    printed = [run(command, number, len(commands)) for number, command in enumerate(commands, 1)]
    draw_spectrograms(
        {one.title: args.out / one.name for one in waves}, args.out / "spectrogram.png"
    )
    transcript = json.loads(printed[-1].splitlines()[-1])["text"]
    report = (
        f"{scores_table(waves, args.out)}\nTranscript of speech.wav by `slm asr`: {transcript}\n"
    )
    (args.out / "scores.md").write_text(report, encoding="utf-8")
    print(f"\n{report}")
    files = ", ".join([*(one.name for one in waves), "spectrogram.png", "scores.md"])
    finished(
        f"{files} in {time.monotonic() - began:.0f} s", args.out,
        f"slm tts --voice {args.voice} --text TEXT --prompt {names[0]} --out OUT.wav",
    )  # fmt: skip


def commands_of(args: argparse.Namespace, names: list[str]) -> tuple[list[Command], list[Wave]]:
    """Returns the commands to run, and the waves that then lie in OUT."""
    slm, voice, out = [sys.executable, "-m", "slm"], ["--voice", str(args.voice)], args.out
    speech, converted, own = (str(out / f"{one}.wav") for one in ("speech", "converted", "yours"))

    def tts(prompt: str, file: str) -> list[str]:
        return [*slm, "tts", *voice, "--text", args.text, "--prompt", prompt, "--out", file]

    commands = [Command(f"synthesize a sentence with the prompt {names[0]}", tts(names[0], speech))]
    waves = [
        Wave(f"{names[0]}.wav", f"shipped prompt {names[0]}"),
        Wave("speech.wav", f"synthesized with this prompt: {args.text}", args.text,
             f"{names[0]}.wav"),
    ]  # fmt: skip
    if args.prompt is not None:
        write_audio(out / "prompt.wav", read_audio(args.prompt, SAMPLE_RATE), SAMPLE_RATE)
        what = f"synthesize it with the prompt {args.prompt.name}"
        commands.append(Command(what, tts(str(args.prompt), own)))
        waves += [
            Wave("prompt.wav", f"your recording {args.prompt.name}"),
            Wave("yours.wav", "synthesized with this prompt", args.text, "prompt.wav"),
        ]
    vc = [*slm, "vc", *voice, "--source", speech, "--target", names[1], "--out", converted]
    commands.append(Command(f"convert the first sentence to the voice {names[1]}", vc))
    waves += [
        Wave(f"{names[1]}.wav", f"shipped prompt {names[1]}"),
        Wave("converted.wav", "the first sentence converted to this voice", args.text,
             f"{names[1]}.wav"),
    ]  # fmt: skip
    commands.append(Command("transcribe the first sentence", [*slm, "asr", *voice, speech]))
    return commands, waves


def decode_prompts(voice: Path, out: Path, names: list[str]) -> None:
    """Decodes shipped prompts of the voice to OUT/NAME.wav."""
    codec, prompts = load_codec(voice / "codec"), load_prompts(voice / "prompts")
    for name in names:
        codes = torch.from_numpy(np.asarray(prompts[name].codes))[None]
        write_audio(out / f"{name}.wav", codec.decode(codes)[0, 0].numpy(), codec.sample_rate)


def scores_table(waves: list[Wave], out: Path) -> str:
    """Returns a Markdown table: WER by Whisper and speaker similarity to the prompt of each wave in
    OUT that has both."""
    judge, encoder = Judge(JUDGE), SpeakerEncoder.from_folder(SPEAKER)
    rows = ["| file | WER | speaker similarity | transcript by Whisper |", "|---|---|---|---|"]
    for one in waves:
        if one.text is None or one.prompt is None:
            continue
        sounds = [read_audio(out / name, SAMPLE_RATE) for name in (one.name, one.prompt)]
        hypothesis = judge.transcribe(sounds[0], SAMPLE_RATE).strip()
        cosine = similarity(*(encoder.embed(sound, SAMPLE_RATE) for sound in sounds))
        wer = word_errors(one.text, hypothesis).rate
        rows.append(f"| {one.name} | {100 * wer:.0f} % | {cosine:.2f} | {hypothesis} |")
    return "\n".join(rows)


if __name__ == "__main__":
    run_recipe(main)
