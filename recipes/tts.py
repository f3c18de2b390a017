"""Trains a voice for TTS and ASR on token shards: recipes/lib/voice_training.py with these
defaults.

`accelerate launch recipes/tts.py` trains the smoke configuration on recorded prompts.
`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/tts.py --config FILE k=v`
"""

from dataclasses import dataclass

from recipes.lib.recorded_prompts import load_voice_config
from recipes.lib.run import PROFILE_HELP, run_recipe, split_profile
from recipes.lib.voice_training import VoiceConfig, train_voice

ABOUT = f"Train a voice that synthesizes and transcribes. {PROFILE_HELP}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TTSConfig(VoiceConfig):
    """A voice that synthesizes and transcribes."""


def main(argv: list[str]) -> None:
    """Trains a voice for TTS and ASR."""
    profile_steps, argv = split_profile(argv)
    config = load_voice_config(TTSConfig, argv, "tts", ABOUT)
    train_voice(config, profile_steps)


if __name__ == "__main__":
    run_recipe(main)
