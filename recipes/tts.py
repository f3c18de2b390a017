"""Trains a voice on token shards, and lets it speak: recipes/lib/voice_training.py with these
defaults.

`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/tts.py --config FILE k=v`
"""

from dataclasses import dataclass

from recipes.lib.run import PROFILE_HELP, load_config, run_program, split_profile
from recipes.lib.voice_training import VoiceConfig, train_voice


@dataclass(frozen=True, kw_only=True, slots=True)
class TTSConfig(VoiceConfig):
    """A voice that speaks and transcribes."""


def main(argv: list[str]) -> None:
    profile_steps, argv = split_profile(argv)
    config = load_config(TTSConfig, argv, f"Train a voice and let it speak. {PROFILE_HELP}")
    train_voice(config, profile_steps)


if __name__ == "__main__":
    run_program(main)
