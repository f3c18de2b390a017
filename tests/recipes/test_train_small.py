"""The commands of recipes/train_small.py fit each other."""

from pathlib import Path

import pytest

from recipes.lib.codec_training import TrainCodecConfig
from recipes.lib.commands import HERE
from recipes.lib.config import load_config
from recipes.lib.voice_training import VoiceConfig
from recipes.train_semantic import TrainSemanticConfig
from recipes.train_small import CODEC, CUTS, OUT, SEMANTIC, main, small_voice_commands


def config(kind: type, name: str):
    return load_config(kind, ["--config", str(HERE / "configs" / name)])


def test_inputs_of_each_command_are_outputs_of_earlier_ones() -> None:
    semantic = config(TrainSemanticConfig, "semantic/small.yaml")
    codec = config(TrainCodecConfig, "codec/lmspt_whisper.yaml")
    voice = config(VoiceConfig, "tts/small.yaml")
    for one in (semantic, codec):
        assert (one.train, one.dev) == (f"{CUTS}/train.jsonl.gz", f"{CUTS}/dev.jsonl.gz")
    assert Path(semantic.out) / "codec" == SEMANTIC == Path(codec.start_from)
    assert voice.codec == str(CODEC)
    words = " ".join(word for command in small_voice_commands() for word in command.arguments)
    for argument in (
        f"out={codec.semantic_codes}",
        f"{Path(codec.out) / 'codec'} {CODEC}",
        f"out={voice.train}",
        f"out={voice.dev}",
        f"reader={semantic.out}/reader",
        f"voice={voice.out}/voice",
        *(
            f"out={Path(one).parent}"
            for one in (*voice.word_boundaries, voice.clips, voice.ar.letter_init)
        ),
    ):
        assert argument in words
    for command in small_voice_commands():
        recipes = [Path(word) for word in command.arguments if word.endswith((".py", ".yaml"))]
        assert all(path.is_file() for path in recipes)


def test_missing_lists_are_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz: no such list; recipes/prepare_data"):
        main([])
    (tmp_path / CUTS).mkdir(parents=True)
    (tmp_path / CUTS / "train.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz: no such list"):
        main([])
    with pytest.raises(ValueError, match="takes no arguments"):
        main(["x"])
    assert Path("out/small") == OUT
