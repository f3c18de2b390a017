"""Opens a run folder on the ranks that it is launched with; test_run.py launches it.

usage: tiny_training.py FOLDER
"""

from dataclasses import dataclass
from pathlib import Path

from codec.training.run import start_run
from recipes.lib.run import run_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    width: int = 8


def main(argv: list[str]) -> None:
    start_run(TinyConfig(), Path(argv[0]), seed=3)


if __name__ == "__main__":
    run_recipe(main)
