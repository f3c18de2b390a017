"""Trains a text LLM to transcribe token shards: recipes/lib/voice_training.py with these defaults.

`accelerate launch recipes/asr.py` trains the smoke configuration on recorded prompts.
`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/asr.py --config FILE k=v`
"""

from dataclasses import dataclass, field

from recipes.lib.recorded_prompts import load_voice_config
from recipes.lib.run import PROFILE_HELP, run_recipe, split_profile
from recipes.lib.voice_training import VoiceConfig, train_voice
from slm.config import ARConfig, NARConfig, TaskConfig

ABOUT = f"Train a text LLM to transcribe. {PROFILE_HELP}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ASRConfig(VoiceConfig):
    """A voice that transcribes."""

    out: str = "out/smoke/asr"
    """Run folder; resumes an earlier start with the same configuration."""
    ar: ARConfig = field(default_factory=lambda: ARConfig(tasks=TaskConfig(tts=0.0, asr=1.0)))
    """The model."""
    nar: NARConfig | None = None
    """The model of the other codebooks, for TTS as well; null: none."""
    num_asr_items: int | None = 64
    """Dev items to transcribe at the end, spread over the list."""


def main(argv: list[str]) -> None:
    """Trains a voice for ASR."""
    profile_steps, argv = split_profile(argv)
    config = load_voice_config(ASRConfig, argv, "asr", ABOUT)
    train_voice(config, profile_steps)


if __name__ == "__main__":
    run_recipe(main)
