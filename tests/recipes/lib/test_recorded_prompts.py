"""What is trained on where no tokens are named."""

from pathlib import Path

import pytest

from codec import load_codec
from recipes.asr import ASRConfig
from recipes.lib import recorded_prompts
from recipes.lib.commands import Command
from recipes.lib.recorded_prompts import load_voice_config
from recipes.tts import TTSConfig

MODELS = ("smollm2-135m-instruct", "whisper-base", "speaker-encoder")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """The commands that run; they make no more than the folders of what they would make."""
    ran: list[Command] = []

    def run(command: Command, *_: object, **__: object) -> str:
        ran.append(command)
        folders = [f"models/{name}" for name in MODELS if name in command.arguments]
        folders += [word[4:] for word in command.arguments if word.startswith("out=")]
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
        return ""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorded_prompts, "run", run)
    return ran


def test_named_tokens_are_trained_on(commands: list[Command]) -> None:
    config = load_voice_config(TTSConfig, ["train=a", "codec=b"], "tts", "")
    assert config == TTSConfig(train="a", codec="b")
    assert not commands


def test_without_tokens_the_recorded_prompts_are_prepared_once(
    commands: list[Command], tiny_codec_folder: Path
) -> None:
    given = [f"codec={tiny_codec_folder}", "optim.steps=3"]
    config = load_voice_config(TTSConfig, given, "tts", "")
    folder = f"out/first/tokens-{load_codec(tiny_codec_folder).stamp.digest[:8]}"
    assert (config.train, config.dev) == (f"{folder}/train", f"{folder}/dev")
    assert (config.out, config.optim.steps, config.ar.num_layers) == ("out/first/tts", 3, 2)
    models, prepare, *exports = (command.arguments[1:] for command in commands)
    assert models == [str(recorded_prompts.HERE / "offline_models.py"), *MODELS]
    assert prepare[1:] == ["prompts", "--out", "out/first/cuts", "--dev-cuts", "40"]
    for split, export in zip(("train", "dev"), exports, strict=True):
        assert f"codec={tiny_codec_folder}" in export
        assert f"cuts=out/first/cuts/{split}.jsonl.gz" in export
        assert f"out={folder}/{split}" in export
    commands.clear()
    assert load_voice_config(ASRConfig, given, "asr", "").train == config.train
    assert not commands


def test_other_ranks_wait_for_the_main_process(
    commands: list[Command], tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"codec={tiny_codec_folder}"]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        """What the main process does meanwhile."""
        waited.append(seconds)
        monkeypatch.setenv("RANK", "0")
        load_voice_config(TTSConfig, given, "tts", "")
        commands.clear()
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setenv("RANK", "1")
    config = load_voice_config(TTSConfig, given, "tts", "")
    assert config.train is not None
    assert waited
    assert not commands


def test_what_cannot_be_downloaded_names_the_remedy(
    commands: list[Command], tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Command, *_: object, **__: object) -> str:
        raise ValueError(f"the step '{command.what}' failed")

    monkeypatch.setattr(recorded_prompts, "run", fail)
    given = [f"codec={tiny_codec_folder}"]
    with pytest.raises(ValueError, match="'download models' failed; run `make models`"):
        load_voice_config(TTSConfig, given, "tts", "")
    for name in MODELS:
        Path("models", name).mkdir(parents=True)
    with pytest.raises(ValueError, match="name token shards of your own: train=FOLDER"):
        load_voice_config(TTSConfig, given, "tts", "")
