"""Trains a miniature voice on downloadable recordings, from codec to scores: `make demo-train`.

recordings -> codec -> token shards -> text LLM + NAR -> speech and transcripts -> scores. Every
step is a command that is printed before it runs, resumes when it is started again, and also takes a
corpus of your own. Results lie in out/demo/.
"""

import json
import os
import sys
import time
from pathlib import Path

from codec import write_audio
from codec.training.data import load_cut, read_cuts
from recipes.lib.commands import HERE, Command, launch, run
from recipes.lib.run import finished, run_recipe
from recipes.lib.spectrogram import draw_spectrograms
from recipes.offline.packaged_models import JUDGE, SPEAKER, check_models

OUT = Path("out/demo")
VOICE = OUT / "tts" / "voice"
SAMPLE_RATE = 16_000
TEXT = "please enter the number of the person you wish to call"

LIMITS = """
This miniature has every part of a large model: a neural codec of 25 frames a second, and a
pretrained text LLM with an extended vocabulary that reads and writes its codes, trained with
DeepSpeed.

Its quality is low: it was trained for seven minutes on 22 minutes of one speaker. The codec
sounds hoarse, new sentences come out as phrases of the training recordings, transcripts are mostly
wrong, and no other voice is imitated. README.md describes how to train a larger one.
"""


def demo_training_commands() -> list[Command]:
    """Returns the commands from recordings to a voice."""
    python, configs = [sys.executable], HERE / "configs"
    cuts, codec = OUT / "cuts", OUT / "codec" / "codec"
    processes = min(2, os.cpu_count() or 1)

    def export(split: str) -> list[str]:
        return [
            *python, str(HERE / "export_tokens.py"), f"cuts={cuts}/{split}.jsonl.gz",
            f"codec={codec}", f"out={OUT}/tokens/{split}",
        ]  # fmt: skip

    def train(accelerate: str, processes: int, recipe: str, config: str) -> list[str]:
        return launch(accelerate, processes, recipe, "--config", str(configs / config))

    prepare = [*python, str(HERE / "prepare_data.py"), "prompts", "--out", str(cuts)]
    return [
        Command("download 541 recorded prompts of one speaker", [*prepare, "--dev-cuts", "40"]),
        Command("train a codec", train("cpu", 1, "train_codec.py", "codec/demo.yaml")),
        Command("export the training tokens", export("train")),
        Command("export the dev tokens", export("dev")),
        Command(
            "train the language model and the NAR with DeepSpeed, and evaluate on the dev prompts",
            train("zero2", processes, "tts.py", "tts/demo.yaml"),
        ),
    ]


def inference_commands(prompt_text: str) -> list[Command]:
    """Returns the commands that use the voice."""
    slm = [sys.executable, "-m", "slm"]
    tts = [*slm, "tts", "--voice", str(VOICE), "--text", TEXT, "--prompt", str(OUT / "prompt.wav")]
    reconstruct = [
        sys.executable, "-m", "codec", "reconstruct", "--overwrite",
        "--codec", str(VOICE / "codec"), "--out", str(OUT / "reconstructed"),
    ]  # fmt: skip
    benchmark = [
        sys.executable, str(HERE / "benchmark.py"), "reconstruction",
        "--codec", str(VOICE / "codec"), "--cuts", str(OUT / "cuts/dev.jsonl.gz"),
        "--judge", str(JUDGE), "--speaker", str(SPEAKER), "--limit", "12",
        "--out", str(OUT / "scores"),
    ]  # fmt: skip
    original = str(OUT / "original.wav")
    return [
        Command(
            "synthesize a sentence in the voice of the prompt",
            [*tts, "--prompt-text", prompt_text, "--out", str(OUT / "speech.wav")],
        ),
        Command("transcribe a recording", [*slm, "asr", "--voice", str(VOICE), original]),
        Command("reconstruct it", [*reconstruct, original]),
        Command("score the codec", benchmark),
    ]


def pick_recordings() -> str:
    """Writes prompt.wav (about 3 s) and original.wav; returns the prompt's transcript."""
    cuts = sorted(read_cuts(OUT / "cuts" / "dev.jsonl.gz"), key=lambda cut: abs(cut.duration - 3))
    for name, cut in (("prompt", cuts[0]), ("original", cuts[1])):
        write_audio(OUT / f"{name}.wav", load_cut(cut, SAMPLE_RATE), SAMPLE_RATE)
    return cuts[0].supervisions[0].text


def main(argv: list[str]) -> None:
    """Runs all commands, and writes spectrogram.png and scores.md to OUT."""
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return
    if argv:
        raise ValueError(f"demo_train.py takes no arguments, got {argv}; the recipes it runs do")
    check_models(JUDGE, SPEAKER)
    began = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    training = demo_training_commands()
    total = len(training) + len(inference_commands(""))
    printed = [run(command, number, total) for number, command in enumerate(training, 1)]
    inference = inference_commands(pick_recordings())
    for number, command in enumerate(inference, len(training) + 1):
        printed.append(run(command, number, total))
    (OUT / "reconstructed" / "original.wav").replace(OUT / "reconstruction.wav")
    pictures = {
        "prompt": OUT / "prompt.wav",
        f"synthesized: {TEXT}": OUT / "speech.wav",
        "recording": OUT / "original.wav",
        "reconstruction by the codec": OUT / "reconstruction.wav",
    }
    draw_spectrograms(pictures, OUT / "spectrogram.png")
    transcript = json.loads(printed[-3].splitlines()[-1])["text"]
    tables = [printed[place] for place in (len(training) - 1, -1)]
    scores = [*tables, f"Transcript of original.wav: {transcript}", LIMITS]
    (OUT / "scores.md").write_text("\n".join(scores), encoding="utf-8")
    print(LIMITS)
    files = ", ".join([*(path.name for path in pictures.values()), "spectrogram.png", "scores.md"])
    finished(
        f"{files} in {(time.monotonic() - began) / 60:.1f} minutes", OUT,
        f"slm tts --voice {VOICE} --text TEXT --prompt dev-1 --out OUT.wav",
    )  # fmt: skip


if __name__ == "__main__":
    run_recipe(main)
