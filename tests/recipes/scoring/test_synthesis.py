"""recipes/scoring/synthesis.py and voice_scores.py with a voice and judges that are made up, so
that every
score is foreseen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from tiny_slm import STAMP

from codec.tokens import TokenRow, TokenShard, write_shard
from eval.benchmark import Provenance, Row, read_rows
from recipes.scoring import judges as scoring
from recipes.scoring import voice as voice_scores
from recipes.scoring.eval_items import Line
from recipes.scoring.synthesis import SpeakConfig, faults, transcribe_items
from recipes.scoring.voice import score_voice
from recipes.tools import overfit_check
from recipes.tts import TTSConfig
from slm.data.sequences import Prompt
from slm.voice import Speech

HOP = 640
FRAMES = 30
MUTE = 7
TEXT = "alpha bravo charlie delta"
ESCAPE = "../../escape"


class FakeVoice:
    """Its codes are amplitudes. It refuses `no`, says 7s, too low to hear, for `mute`, else 9s."""

    device = ""
    batches: ClassVar[list[list[str]]] = []

    def __init__(self, folder: Path) -> None:
        stamp = SimpleNamespace(digest="c" * 16)
        self.codec = SimpleNamespace(
            sample_rate=16000, frame_rate=25.0, stamp=stamp, num_codebooks=3
        )
        self.lm = SimpleNamespace(tokenizer=SimpleNamespace(text=SimpleNamespace(normalize=True)))
        self.nar = "a NAR"
        self.folder = folder
        self.sampling = None

    def prepare(self, text: str, prompt: Prompt, seed: int = 0) -> SimpleNamespace:
        if "no" in text.split():
            raise ValueError("this text is refused")
        assert prompt.continuation == (prompt.text == "")
        return SimpleNamespace(text=text, prompt=prompt, seed=seed, bounds=(2, 1000))

    def speak(self, utterances: list[SimpleNamespace]) -> list[Speech]:
        self.batches.append([one.text for one in utterances])
        return [self._say(one) for one in utterances]

    def _say(self, one: SimpleNamespace) -> Speech:
        codes = np.full((3, 10), MUTE if "mute" in one.text else 9)
        return Speech(
            wave=self.decode(one.prompt.codes, codes), codes=codes, text=one.text, prompt_text="",
            failure="empty" if codes[0, 0] == MUTE else None, tries=2, seed=one.seed + 7919,
            sample_rate=16000,
        )  # fmt: skip

    def decode(self, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.repeat(np.where(new[0] == MUTE, 1e-5, new[0] / 10), HOP).astype(np.float32)

    def transcribe(self, first: list[np.ndarray]) -> list[str]:
        if any(len(codes) > FRAMES for codes in first):
            raise ValueError("the recording is too long for the model")
        return ["alpha"] * len(first)


class FakeJudge:
    """Hears half the words in a beginning, and the rest where something was added."""

    compute_type = "int8"

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def transcribe(self, wave: np.ndarray, _rate: int) -> str:
        first, rest = TEXT.split()[:2], TEXT.split()[2:]
        begun = bool(np.isclose(wave, 0.3).any())
        ended = bool((np.isclose(wave, 0.9) | np.isclose(wave, 0.5)).any())
        return " ".join(first * begun + rest * ended)


class FakeEncoder:
    """A voice is the mean amplitude: 0.3 the beginning's, 0.9 the model's, 0.5 the recording's."""

    @classmethod
    def from_folder(cls, _folder: object) -> "FakeEncoder":
        return cls()

    def embed(self, wave: np.ndarray, _rate: int) -> np.ndarray:
        angle = np.pi * float(wave.mean())
        return np.array([np.cos(angle), np.sin(angle)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose voice, judge and speaker encoder are fakes."""
    for path in ("run/voice/ar", "run/speak", "judge", "encoder"):
        (tmp_path / path).mkdir(parents=True)
    for path in ("run/voice/ar/model.safetensors", "judge/model.bin", "encoder/model.safetensors"):
        (tmp_path / path).write_text(path)

    def load(path: Path, *, device: str) -> FakeVoice:
        FakeVoice.device = device
        return FakeVoice(path)

    monkeypatch.setattr(FakeVoice, "batches", [])
    monkeypatch.setattr(voice_scores, "Voice", SimpleNamespace(from_pretrained=load))
    monkeypatch.setattr(scoring, "Judge", FakeJudge)
    monkeypatch.setattr(scoring, "SpeakerEncoder", FakeEncoder)
    return tmp_path / "run"


def write_dev(folder: Path, texts: dict[str, str], name: str = "dev") -> TokenShard:
    """Items of one speaker: 15 frames of amplitude 0.3, then 15 of 0.5."""
    codes = np.repeat([[3], [5]], FRAMES // 2, axis=0).T.repeat(3, axis=0).astype(np.uint16)
    rows = [TokenRow(name, text, "s", "en", FRAMES / 25, codes) for name, text in texts.items()]
    path = folder / f"{name}.parquet"
    if not path.exists() or TokenShard.open(path).texts != list(texts.values()):
        write_shard(path, rows, STAMP)
    return TokenShard.open(path)


def score(folder: Path, texts: dict[str, str], device: str = "cpu", batch: int = 8) -> list[Row]:
    dev = write_dev(folder, texts)
    settings = SpeakConfig(
        judge=str(folder.parent / "judge"), speaker=str(folder.parent / "encoder"), batch=batch
    )
    run = SimpleNamespace(
        accelerator=SimpleNamespace(device=SimpleNamespace(type=device)), log=lambda *_: None
    )
    config = TTSConfig(seed=4, speak=settings)
    score_voice(
        folder, write_dev(folder, {"known": "something else"}, "train"), dev, [], config, run
    )
    return read_rows(folder / "rows.jsonl")


def values(rows: list[Row], kind: str, utterance: str | None, system: str = "slm") -> dict:
    return {
        row.metric: row.value
        for row in rows
        if row.list.startswith(f"dev-{kind}@") and row.utterance == utterance
        and row.system == system
    }  # fmt: skip


def test_a_refused_text_loses_all_its_words(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "no no no no"})
    refused = values(rows, "continuation", "b")
    assert (refused["wer"], refused["failure"]) == (1.0, 1.0)
    assert "similarity" not in refused
    whole = values(rows, "continuation", None)
    assert (whole["wer"], whole["failure"]) == (0.5, 0.5)


def test_a_continuation_that_adds_nothing_earns_nothing(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "alpha bravo mute mute"})
    silent = values(rows, "continuation", "b")
    assert (silent["wer"], silent["failure"], silent["seconds"]) == (1.0, 1.0, 0.0)
    assert "similarity" not in silent


def test_a_continuation_has_its_words_behind_the_beginning_and_its_own_voice(folder: Path) -> None:
    rows = score(folder, {"a": TEXT})
    spoken = values(rows, "continuation", "a")
    assert spoken["wer"] == 0.0
    assert spoken["similarity"] == pytest.approx(np.cos(np.pi * (0.9 - 0.3)), abs=1e-5)
    assert spoken["seconds"] == pytest.approx(10 / 25)
    ceiling = values(rows, "continuation", "a", "codec")
    assert ceiling["wer"] == 0.0
    assert ceiling["similarity"] == pytest.approx(np.cos(np.pi * (0.5 - 0.3)), abs=1e-5)


def test_every_row_says_where_it_comes_from(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": TEXT})
    assert {row.list.partition("@")[0] for row in rows} == {
        "dev-asr", "dev-continuation", "dev-cross",
    }  # fmt: skip
    for row in rows:
        origin = (row.system, row.list, row.git, row.config, row.model, row.library, row.machine)
        assert all(origin), row
        assert row.seed >= 4
        if row.metric in ("wer", "cer", "wrong"):
            assert "judge@" in row.library
        if row.metric.startswith("similarity"):
            assert "encoder@" in row.library
    models = {row.system: row.model for row in rows}
    assert models == {"slm": scoring.digest_of_voice(folder / "voice"), "codec": "c" * 16}
    seeds = {row.utterance: row.seed for row in rows if row.list.startswith("dev-cross")}
    assert seeds == {"a": 4 + 7919, "b": 5 + 7919, None: 4}
    (folder / "voice" / "ar" / "model.safetensors").write_text("trained on")
    assert scoring.digest_of_voice(folder / "voice") != models["slm"]


def test_faults_are_found_whatever_the_voice_reports(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "alpha bravo charlie mute", "c": f"{TEXT} and much more"})
    assert values(rows, "continuation", "a")["fault"] == 0.0
    assert values(rows, "continuation", "b")["fault"] == 1.0
    # The voice is content, but the judge misses the end.
    missing = values(rows, "continuation", "c")
    assert (missing["failure"], missing["fault"]) == (0.0, 1.0)


def test_faults_have_names_and_a_rate(folder: Path) -> None:
    score(folder, {"a": TEXT, "b": "alpha bravo charlie delta and so much more than fits " * 4})
    lines = [json.loads(s) for s in (folder / "speak" / "results.jsonl").read_text().splitlines()]
    faults = {(line["list"], line["id"]): line["faults"] for line in lines}
    assert faults["continuation", "a"] == []
    # Ten frames: the prompt took as many for a few words.
    assert "early" in faults["cross", "b"]


def test_a_loop_in_the_middle_is_a_fault() -> None:
    prompt = Prompt(codes=np.zeros((3, 2), np.int64), text="yes")
    line = Line("a", "yes", prompt)
    spoken = np.arange(1, 121).reshape(1, 120).repeat(3, axis=0)
    looped = spoken.copy()
    looped[:, 20:90] = 5
    wave = np.ones(16000, np.float32)
    assert faults(FakeVoice(Path()), line, spoken, wave, None) == []
    assert faults(FakeVoice(Path()), line, looped, wave, None) == ["loop"]


def test_speech_that_is_too_quick_for_its_prompt_is_early() -> None:
    voice = FakeVoice(Path())
    codes = np.arange(90).reshape(3, 30) % 8
    spoken = Prompt(codes=codes[:, :25], text="a sentence of one second")
    wave = np.ones(16000, np.float32)

    def found(prompt: Prompt, text: str) -> list[str]:
        return faults(voice, Line("a", text, prompt), codes[:, 25:] + 8, wave, None)

    assert found(spoken, "a sentence of one second and another one") == ["early"]
    assert found(spoken, "short") == []
    # Letters are counted as they are spoken.
    assert found(spoken, "1,999,999") == ["early"]


def test_numbers_in_figures_are_no_missing_end() -> None:
    voice = FakeVoice(Path())
    prompt = Prompt(codes=np.zeros((3, 2), np.int64), text="yes")
    line = Line("a", "The house was built in nineteen eighty four.", prompt)
    codes = np.arange(90).reshape(3, 30) + 1
    wave = np.ones(16000, np.float32)
    assert faults(voice, line, codes, wave, "The house was built in 1984.") == []
    assert faults(voice, line, codes, wave, "The house was") == ["early"]


def test_what_was_made_is_not_made_again(folder: Path) -> None:
    texts = {name: f"{TEXT} {name}" for name in "abcdefgh"}
    first = score(folder, texts, batch=6)
    assert len(FakeVoice.batches) == 4  # Of two lists, six and two lines each.
    kept = (folder / "speak" / "results.jsonl").read_text()
    again = score(folder, texts, batch=6)
    assert len(FakeVoice.batches) == 4
    assert again == first
    assert (folder / "speak" / "results.jsonl").read_text() == kept
    # A kill in the midst of a line, and a wave that is gone: their batches are made again.
    made = folder / "speak" / "cross" / "made.jsonl"
    made.write_text(made.read_text()[:-20])
    (folder / "speak" / "continuation" / "b.wav").unlink()
    assert score(folder, texts, batch=6) == first
    assert [len(batch) for batch in FakeVoice.batches[4:]] == [6, 2]
    # Another voice.
    (folder / "voice" / "ar" / "model.safetensors").write_text("trained on")
    score(folder, texts, batch=6)
    assert len(FakeVoice.batches) == 10


def test_two_shards_never_pass_for_one_list(folder: Path) -> None:
    first = {row.list for row in score(folder, {"a": TEXT})}
    assert first.isdisjoint(row.list for row in score(folder, {"a": f"{TEXT} echo"}))


def test_own_transcripts_and_judged_ones_have_columns_apart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = score(folder, {"a": TEXT})
    assert values(rows, "asr", None)["asr_wer"] == 0.75
    assert {row.metric for row in rows if row.list.startswith("dev-asr")} == {
        "asr_wer", "asr_cer", "asr_wil", "asr_mer",
    }  # fmt: skip
    assert "| system | list | n | asr_wer | asr_cer | wer | cer |" in capsys.readouterr().out


def test_an_item_that_is_too_long_to_transcribe_loses_its_words(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codes = np.zeros((3, FRAMES + 1), np.uint16)
    rows = [
        TokenRow("a", TEXT, "s", "en", 1.0, codes[:, 1:]),
        TokenRow("long", TEXT, "s", "en", 1.0, codes),
        TokenRow("b", "alpha", "s", "en", 1.0, codes[:, 1:]),
    ]
    scored = transcribe_items(FakeVoice(folder / "voice"), rows, Provenance(system="slm"))
    found = {row.utterance: row.value for row in scored if row.metric == "asr_wer"}
    assert found == {"a": 0.75, "long": 1.0, "b": 0.0, None: pytest.approx(7 / 9)}
    assert "long was not transcribed: the recording is too long" in caplog.text


def test_texts_that_were_trained_on_are_neither_spoken_nor_transcribed(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "something else"})
    for kind in ("asr", "continuation"):
        assert values(rows, kind, "a")
        assert not values(rows, kind, "b")


def test_an_id_never_leads_out_of_the_folder(folder: Path) -> None:
    score(folder, {ESCAPE: TEXT, "a/b": TEXT, "a-b": TEXT})
    waves = set(folder.parent.rglob("*.wav"))
    assert len([path for path in waves if path.parent == folder / "speak" / "continuation"]) == 3
    assert {path.parent.parent for path in waves} == {folder / "speak", folder / "speak/prompts"}
    lines = (folder / "speak" / "results.jsonl").read_text().splitlines()
    audio = {json.loads(line)["audio"] for line in lines}
    assert audio == {path.name for path in waves if path.parent.name == "cross"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_voice_speaks_where_it_was_trained(folder: Path, device: str) -> None:
    score(folder, {"a": TEXT}, device)
    assert FakeVoice.device == device


def test_earlier_scores_stay_whole_until_there_are_new_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(folder, {"a": TEXT})
    before = (folder / "rows.jsonl").read_bytes()

    def torn(path: Path, rows: list[Row]) -> None:
        path.write_text(json.dumps({"system": rows[0].system})[:-3])
        raise OSError("no space left")

    monkeypatch.setattr(voice_scores, "append_rows", torn)
    with pytest.raises(OSError, match="no space left"):
        score(folder, {"a": f"{TEXT} echo"})
    assert (folder / "rows.jsonl").read_bytes() == before
    assert not list(folder.glob(".rows*"))


def test_the_share_of_equal_codes_counts_what_lacks_and_what_is_too_much() -> None:
    true = [np.array([[1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]])]
    first = slice(0, 1)

    def share(made: list[int]) -> float:
        return overfit_check.share_of_equal([np.array([made])], true, [2], first)

    assert share([3, 4, 5, 6]) == 1.0
    assert share([3, 4, 0, 0]) == 0.5
    assert share([3, 4]) == 0.5
    assert share([3, 4, 5, 6, 7, 8, 9, 9]) == 0.5
    filled = [np.array([[9, 9, 9, 9], [1, 1, 1, 1], [2, 2, 0, 0]])]
    assert overfit_check.share_of_equal(filled, true, [2], slice(1, None)) == 0.75


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_what_is_known_by_heart_is_asked_on_the_gpu_if_there_is_one(
    there: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_path: str, *, device: str) -> None:
        raise ValueError(f"asked for {device}")

    monkeypatch.setattr(overfit_check.torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(overfit_check, "Voice", SimpleNamespace(from_pretrained=load))
    with pytest.raises(ValueError, match=f"asked for {device}"):
        overfit_check.main([])
