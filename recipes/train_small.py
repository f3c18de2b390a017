"""Trains the models of models/small, from lists of cuts to a voice that ships: `make train-small`.

    python recipes/train_small.py

Reads out/small/cuts/{train,dev}.jsonl.gz, with transcripts (recipes/prepare_data.py writes them).
Every step is a command that is printed before it runs. An interrupted training or export resumes,
and a finished one is skipped; the short steps between run again. About seven hours on two cores,
estimated from the single steps: the sequence was never run in one go.
"""

import sys
from pathlib import Path

from recipes.lib.commands import HERE, Command, launch, run
from recipes.lib.run import finished, run_recipe

OUT = Path("out/small")
CUTS, SEMANTIC, CODEC = OUT / "cuts", OUT / "semantic" / "codec", OUT / "codec_half"
SPLITS = ("train", "dev")


def small_voice_commands() -> list[Command]:
    """Returns the commands from lists of cuts to a voice that ships."""

    def recipe(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / name), *arguments]

    def train(name: str, config: str) -> list[str]:
        return launch("cpu", 1, name, "--config", str(HERE / "configs" / config))

    def export(codec: Path, split: str, out: Path) -> list[str]:
        cuts = f"cuts={CUTS}/{split}.jsonl.gz"
        return recipe("export_tokens.py", cuts, f"codec={codec}", f"out={out}")

    def clips(split: str) -> list[str]:
        tokens, reader = f"tokens={OUT}/tokens/{split}", f"reader={OUT}/semantic/reader"
        return recipe("make_clips.py", tokens, reader, f"out={OUT}/clips/{split}")

    halve = [sys.executable, "-m", "codec", "halve", "--overwrite", str(OUT / "codec" / "codec")]
    ship = recipe("ship_voice.py", f"voice={OUT}/tts/voice", f"out={OUT}/shipped")
    return [
        Command("train the semantic codebook", train("train_semantic.py", "semantic/small.yaml")),
        Command(
            "export its codes", export(SEMANTIC, "train", OUT / "semantic_tokens" / "train")
        ),
        Command("train the codec", train("train_codec.py", "codec/lmspt_whisper.yaml")),
        Command("round the codec to half precision", [*halve, str(CODEC)]),
        *(
            Command(f"export the {split} tokens", export(CODEC, split, OUT / "tokens" / split))
            for split in SPLITS
        ),
        *(Command(f"align words and make clips of {split}", clips(split)) for split in SPLITS),
        Command("train the AR and the NAR", train("tts.py", "tts/small.yaml")),
        Command("compress the voice", ship),
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs all commands.

    Raises:
        ValueError: a list of cuts is missing, or a command failed.
    """
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return
    if argv:
        raise ValueError(f"train_small.py takes no arguments, got {argv}; the recipes it runs do")
    missing = [split for split in SPLITS if not (CUTS / f"{split}.jsonl.gz").is_file()]
    if missing:
        raise ValueError(
            f"{CUTS / missing[0]}.jsonl.gz: no such list; recipes/prepare_data.py writes it from "
            "your recordings, or from synthetic speech (`python recipes/prepare_data.py synthetic "
            f"--dev-speakers 12 --out {CUTS}`)"
        )
    commands = small_voice_commands()
    for number, command in enumerate(commands, 1):
        run(command, number, len(commands))
    shipped = OUT / "shipped"
    again = f"slm tts --voice {shipped} --text TEXT --prompt NAME --out OUT.wav"
    finished("voice of models/small", shipped, again)


if __name__ == "__main__":
    run_recipe(main)
