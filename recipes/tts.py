"""Trains a voice on token shards, and lets it speak: recipes/lib/voice_training.py with these
defaults.

`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/tts.py --config FILE k=v`
"""

from dataclasses import dataclass

from recipes.lib.run import load_config, run_program
from recipes.lib.voice_training import VoiceConfig, train_voice


@dataclass(frozen=True, kw_only=True, slots=True)
class TTSConfig(VoiceConfig):
    """A voice that speaks and transcribes."""


def main(argv: list[str]) -> None:
    train_voice(load_config(TTSConfig, argv, "Train a voice and let it speak."))


if __name__ == "__main__":
    run_program(main)
