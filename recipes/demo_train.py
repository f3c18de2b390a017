"""The whole way in miniature, on recordings that anyone can fetch: `make demo-train`.

recordings -> codec -> token shards -> text LLM + NAR -> speech and transcripts -> scores. Every
step is a command that is printed before it runs, goes on where it stopped when it is started
again, and works as well on a corpus of your own. Results are in out/demo/ afterwards.
"""

import json
import os
import sys
import time
from pathlib import Path

from codec import write_audio
from codec.training.data import load_cut, read_cuts
from recipes.demo import draw
from recipes.lib.commands import HERE, Step, launch, run
from recipes.lib.run import run_program

OUT = Path("out/demo")
VOICE = OUT / "tts" / "voice"
JUDGE, SPEAKER = Path("models/whisper-base"), Path("models/speaker-encoder")
SAMPLE_RATE = 16_000
TEXT = "please enter the number of the person you wish to call"

VERDICT = """
What this miniature can do: every part of it is the real one. The codec is a neural codec, its 25
codes a second per codebook are what the language model reads and writes, the language model is a
pretrained text LLM with an extended vocabulary, trained under DeepSpeed.

What it cannot do: it has heard 22 minutes of one woman and learned for seven. Its codec
sounds hoarse, it repeats phrases of its training recordings rather than say a new sentence, its
transcripts are guesses, and it imitates no voice but hers. README.md says how to go on.
"""


def training_steps() -> list[Step]:
    """From nothing to a voice."""
    python, configs = [sys.executable], HERE / "configs"
    cuts, codec = OUT / "cuts", OUT / "codec" / "codec"
    processes = min(2, os.cpu_count() or 1)

    def export(split: str) -> list[str]:
        return [
            *python, str(HERE / "export_tokens.py"), f"cuts={cuts}/{split}.jsonl.gz",
            f"codec={codec}", f"out={OUT}/tokens/{split}",
        ]  # fmt: skip

    prepare = [*python, str(HERE / "prepare_data.py"), "prompts", "--out", str(cuts)]
    return [
        Step("fetch 541 recorded prompts of one speaker", [*prepare, "--dev-cuts", "40"]),
        Step(
            "train a codec",
            launch("cpu", 1, "train_codec.py", "--config", str(configs / "codec" / "demo.yaml")),
        ),
        Step("export the training tokens", export("train")),
        Step("export the dev tokens", export("dev")),
        Step(
            "train the language model and the NAR with DeepSpeed, speak and score the dev prompts",
            launch(
                "zero2", processes, "tts.py", "--config", str(configs / "tts" / "demo.yaml")
            ),
        ),
    ]  # fmt: skip


def speaking_steps(prompt_text: str) -> list[Step]:
    """What a user of the voice would type."""
    slm = [sys.executable, "-m", "slm"]
    tts = [*slm, "tts", "--voice", str(VOICE), "--text", TEXT, "--prompt", str(OUT / "prompt.wav")]
    reconstruct = [
        sys.executable, "-m", "codec", "reconstruct", "--overwrite",
        "--codec", str(VOICE / "codec"), "--out", str(OUT / "reconstructed"),
    ]  # fmt: skip
    benchmark = [sys.executable, str(HERE / "benchmark.py"), "reconstruction"]
    return [
        Step(
            "speak a sentence in the voice of the prompt",
            [*tts, "--prompt-text", prompt_text, "--out", str(OUT / "speech.wav")],
        ),
        Step(
            "transcribe a recording",
            [*slm, "asr", "--voice", str(VOICE), str(OUT / "original.wav")],
        ),
        Step("reconstruct it", [*reconstruct, str(OUT / "original.wav")]),
        Step(
            "score the codec",
            [
                *benchmark, "--codec", str(VOICE / "codec"),
                "--cuts", str(OUT / "cuts/dev.jsonl.gz"),
                "--judge", str(JUDGE), "--speaker", str(SPEAKER), "--limit", "12",
                "--out", str(OUT / "scores"),
            ],
        ),
    ]  # fmt: skip


def pick_recordings() -> str:
    """Writes a prompt of about 3 s and a recording to transcribe; returns the prompt's text."""
    cuts = sorted(read_cuts(OUT / "cuts" / "dev.jsonl.gz"), key=lambda cut: abs(cut.duration - 3))
    for name, cut in (("prompt", cuts[0]), ("original", cuts[1])):
        write_audio(OUT / f"{name}.wav", load_cut(cut, SAMPLE_RATE), SAMPLE_RATE)
    return cuts[0].supervisions[0].text


def main(argv: list[str]) -> None:
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return
    if argv:
        raise ValueError(f"the demo takes no arguments, got {argv}; the recipes it calls do")
    if not JUDGE.is_dir() or not SPEAKER.is_dir():
        raise ValueError("models/ is not there; run `make models` first, or `make demo-train`")
    began = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    training = training_steps()
    total = len(training) + len(speaking_steps(""))
    report = []
    for number, step in enumerate(training, 1):
        report.append(run(step, number, total))
    speaking = speaking_steps(pick_recordings())
    for number, step in enumerate(speaking, len(training) + 1):
        report.append(run(step, number, total))
    reconstruction = OUT / "reconstruction.wav"
    (OUT / "reconstructed" / "original.wav").replace(reconstruction)
    draw(
        {
            "prompt": OUT / "prompt.wav",
            f"spoken after it: {TEXT}": OUT / "speech.wav",
            "a recording": OUT / "original.wav",
            "the same through the codec": reconstruction,
        },
        OUT / "spectrogram.png",
    )
    transcript = json.loads(report[-3].splitlines()[-1])["text"]
    scores = (
        f"{report[len(training) - 1]}\n{report[-1]}\nTranscript of original.wav: {transcript}\n"
    )
    (OUT / "scores.md").write_text(scores + VERDICT, encoding="utf-8")
    print(VERDICT)
    files = (
        "speech.wav",
        "prompt.wav",
        "original.wav",
        "reconstruction.wav",
        "spectrogram.png",
        "scores.md",
    )
    print("Listen and look:", *(f"    {OUT / name}" for name in files), sep="\n")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run_program(main)
