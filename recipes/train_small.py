"""Trains the models of models/small, from lists of cuts to what ships: `make train-small`.

    python recipes/train_small.py

The lists are out/small/cuts/{train,dev}.jsonl.gz, with transcripts (recipes/prepare_data.py makes
them). Every step is a command that is printed before it runs. A training or an export that was
stopped goes on, and does nothing where it was finished; the small steps between are done again. By
the times of its steps all of it takes some seven hours on two cores; it was not run whole yet.
"""

import sys
from pathlib import Path

from recipes.lib.commands import HERE, Step, launch, run
from recipes.lib.run import run_program

OUT = Path("out/small")
CUTS, SEMANTIC, CODEC = OUT / "cuts", OUT / "semantic" / "codec", OUT / "codec_half"
SPLITS = ("train", "dev")


def steps() -> list[Step]:
    """From lists of cuts to a voice that ships."""
    configs = HERE / "configs"

    def recipe(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / name), *arguments]

    def train(name: str, config: str) -> list[str]:
        return launch("cpu", 1, name, "--config", str(configs / config))

    def export(codec: Path, split: str, out: Path) -> list[str]:
        return recipe(
            "export_tokens.py", f"cuts={CUTS}/{split}.jsonl.gz", f"codec={codec}", f"out={out}"
        )

    semantic_tokens = OUT / "semantic_tokens" / "train"
    halve = [sys.executable, "-m", "codec", "halve", "--overwrite"]
    return [
        Step("train the semantic codebook", train("train_semantic.py", "semantic/small.yaml")),
        Step("its codes of whole recordings", export(SEMANTIC, "train", semantic_tokens)),
        Step("train the codec around it", train("train_codec.py", "codec/lmspt_whisper.yaml")),
        Step("round it to half precision", [*halve, str(OUT / "codec" / "codec"), str(CODEC)]),
        *(
            Step(f"export the {split} tokens", export(CODEC, split, OUT / "tokens" / split))
            for split in SPLITS
        ),
        *(
            Step(
                f"find the words of the {split} tokens, and cut clips",
                recipe(
                    "make_clips.py", f"tokens={OUT}/tokens/{split}",
                    f"reader={OUT}/semantic/reader", f"out={OUT}/clips/{split}",
                ),
            )
            for split in SPLITS
        ),
        Step("train the AR and the NAR", train("tts.py", "tts/small.yaml")),
        Step(
            "make it small",
            recipe("ship_voice.py", f"voice={OUT}/tts/voice", f"out={OUT}/shipped"),
        ),
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return
    if argv:
        raise ValueError(f"train_small.py takes no arguments, got {argv}; the recipes it calls do")
    lacking = [split for split in SPLITS if not (CUTS / f"{split}.jsonl.gz").is_file()]
    if lacking:
        raise ValueError(
            f"{CUTS / lacking[0]}.jsonl.gz: no such list; recipes/prepare_data.py makes it of your "
            "recordings, or of synthetic speech (`python recipes/prepare_data.py synthetic "
            f"--dev-speakers 12 --out {CUTS}`)"
        )
    todo = steps()
    for number, step in enumerate(todo, 1):
        run(step, number, len(todo))
    print(f"The voice is in {OUT / 'shipped'}: slm tts --voice {OUT / 'shipped'} --help")


if __name__ == "__main__":
    run_program(main)
