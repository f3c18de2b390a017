"""recipes/scoring/synthesis.py and voice.py, with a stub voice and stub judges whose scores are
known in advance."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import soundfile
from conftest import stand_in
from tiny_slm import STAMP

from codec.audio import audio_tags
from codec.tokens import TokenRow, TokenShard, write_shard
from codec.training.run import Run
from eval.benchmark import Provenance, Row, ScoredUtterance, rows_of
from recipes.scoring import judges, voice
from recipes.scoring.eval_items import EvalItem, continuation_items
from recipes.scoring.judges import Judges
from recipes.scoring.rows import read_rows
from recipes.scoring.synthesis import (
    TEXTLESS,
    Result,
    Scorers,
    TTSEvalConfig,
    codec_rows,
    failed_checks,
    synthesize_items,
    transcribe_items,
)
from recipes.scoring.voice import score_voice
from recipes.tts import TTSConfig
from slm.config import SamplingConfig
from slm.data.prompts import Prompt
from slm.voice import Speech, Voice

HOP = 640
FRAMES = 30
MUTE = 7
TEXT = "alpha bravo charlie delta"
ESCAPE = "../../escape"


class FakeVoice(Voice):
    """Codes are amplitudes. It refuses texts with `no`; it generates 7s (silence) for `mute`, and
    9s for other texts. Continuations without a text refuse 8s, and are empty after 7s."""

    device = ""
    digest = "d" * 16
    batches: ClassVar[list[list[str]]] = []

    def __init__(self, folder: Path) -> None:
        stamp = SimpleNamespace(digest="c" * 16)
        self.codec = SimpleNamespace(
            sample_rate=16000, frame_rate=25.0, stamp=stamp, num_codebooks=3
        )
        self.lm = SimpleNamespace(tokenizer=SimpleNamespace(text=SimpleNamespace(normalize=True)))
        self.nar = "a NAR"
        self.folder = folder
        self.sampling = SamplingConfig()

    def prepare(self, text: str, prompt: Prompt, seed: int = 0) -> SimpleNamespace:
        if "no" in text.split():
            raise ValueError("this text is refused")
        assert prompt.continuation == (prompt.text == "")
        return SimpleNamespace(text=text, prompt=prompt, seed=seed, bounds=(2, 1000))

    def synthesize_batch(self, utterances: list[SimpleNamespace]) -> list[Speech]:
        self.batches.append([one.text for one in utterances])
        return [
            self._speech(one.prompt, np.full((3, 10), MUTE if "mute" in one.text else 9), one.seed)
            for one in utterances
        ]

    def continue_speech(self, prompt: Prompt, seconds: float, seed: int) -> Speech:
        first = prompt.codes[0, 0]
        if first == 8:
            raise ValueError("the prompt is too long for the model")
        return self._speech(prompt, np.full((3, 0 if first == 7 else round(25 * seconds)), 9), seed)

    def _speech(self, prompt: Prompt, codes: np.ndarray, seed: int) -> Speech:
        empty = not codes.size or codes[0, 0] == MUTE
        return Speech(
            wave=self.decode(prompt.codes, codes), codes=codes, text="", prompt_text="",
            failure="empty" if empty else None, tries=2, seed=seed + 7919, sample_rate=16000,
        )  # fmt: skip

    def decode(self, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.repeat(np.where(new[0] == MUTE, 1e-5, new[0] / 10), HOP).astype(np.float32)

    def transcribe(self, first: list[np.ndarray]) -> list[str]:
        if any(len(codes) > FRAMES for codes in first):
            raise ValueError("the recording is too long for the model")
        return ["alpha"] * len(first)


class FakeJudge:
    """Transcribes half the words from a prompt, and the other half from new speech."""

    name = "judge@digest int8"
    languages: ClassVar[list[object]] = []

    def __init__(self, *_: object, **options: object) -> None:
        self.languages.append(options["language"])

    def transcribe(self, wave: np.ndarray, _rate: int) -> str:
        first, rest = TEXT.split()[:2], TEXT.split()[2:]
        begun = bool(np.isclose(wave, 0.3).any())
        ended = bool((np.isclose(wave, 0.9) | np.isclose(wave, 0.5)).any())
        return " ".join(first * begun + rest * ended)


class FakeEncoder:
    """Embeds the mean amplitude: 0.3 in prompts, 0.9 in new speech, 0.5 in the recordings."""

    name = "encoder@digest"

    def __init__(self, *_: object) -> None:
        pass

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
    monkeypatch.setattr(voice, "Voice", SimpleNamespace(from_pretrained=load))
    monkeypatch.setattr(judges, "load_judge", FakeJudge)
    monkeypatch.setattr(judges, "load_speaker_encoder", FakeEncoder)
    return tmp_path / "run"


def write_dev(folder: Path, texts: dict[str, str], name: str = "dev") -> TokenShard:
    """Items of one speaker: 15 frames of amplitude 0.3, then 15 of 0.5."""
    codes = np.repeat([[3], [5]], FRAMES // 2, axis=0).T.repeat(3, axis=0).astype(np.uint16)
    rows = [TokenRow(name, text, "s", "en", FRAMES / 25, codes) for name, text in texts.items()]
    path = folder / f"{name}.parquet"
    if not path.exists() or TokenShard.open(path).texts != list(texts.values()):
        write_shard(path, rows, STAMP)
    return TokenShard.open(path)


def score(
    folder: Path, texts: dict[str, str], device: str = "cpu", batch: int = 8, language: str = "en"
) -> list[Row]:
    dev = write_dev(folder, texts)
    settings = TTSEvalConfig(
        judge=str(folder.parent / "judge"), speaker=str(folder.parent / "encoder"), batch=batch,
        language=language,
    )  # fmt: skip
    accelerator = SimpleNamespace(device=SimpleNamespace(type=device))
    run = stand_in(Run, accelerator=accelerator, log=lambda *_: None)
    config = TTSConfig(seed=4, tts_eval=settings)
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


def test_refused_text_counts_as_deletions(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "no no no no"})
    refused = values(rows, "continuation", "b")
    assert (refused["wer"], refused["failure"]) == (1.0, 1.0)
    assert "similarity" not in refused
    whole = values(rows, "continuation", None)
    assert (whole["wer"], whole["failure"]) == (0.5, 0.5)


def test_empty_continuation_gets_no_credit_for_its_prompt(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "alpha bravo mute mute"})
    silent = values(rows, "continuation", "b")
    assert (silent["wer"], silent["failure"], silent["seconds"]) == (1.0, 1.0, 0.0)
    assert "similarity" not in silent


def test_continuation_wer_includes_the_prompt_and_similarity_does_not(folder: Path) -> None:
    rows = score(folder, {"a": TEXT})
    spoken = values(rows, "continuation", "a")
    assert spoken["wer"] == 0.0
    assert spoken["similarity"] == pytest.approx(np.cos(np.pi * (0.9 - 0.3)), abs=1e-5)
    assert spoken["seconds"] == pytest.approx(10 / 25)
    ceiling = values(rows, "continuation", "a", "codec")
    assert ceiling["wer"] == 0.0
    assert ceiling["similarity"] == pytest.approx(np.cos(np.pi * (0.5 - 0.3)), abs=1e-5)


def test_rows_have_provenance(folder: Path) -> None:
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
    assert models == {"slm": judges.digest_of_voice(folder / "voice"), "codec": "c" * 16}
    seeds = {row.utterance: row.seed for row in rows if row.list.startswith("dev-cross")}
    assert seeds == {"a": 4 + 7919, "b": 5 + 7919, None: 4}
    (folder / "voice" / "ar" / "model.safetensors").write_text("trained on")
    assert judges.digest_of_voice(folder / "voice") != models["slm"]


@pytest.mark.parametrize(("language", "wrong"), [("en", 0.0), ("de", 1.0)])
def test_judge_and_normalization_have_the_language(
    folder: Path, monkeypatch: pytest.MonkeyPatch, language: str, wrong: float
) -> None:
    monkeypatch.setattr(FakeJudge, "languages", [])
    rows = score(folder, {"a": "\u00c4lpha"}, language=language)
    assert set(FakeJudge.languages) == {language}
    own = next(row for row in rows if row.metric == "asr_wer" and row.utterance is None)
    judged = next(row for row in rows if row.metric == "wer" and row.utterance is None)
    assert own.value == wrong
    assert own.library.split(",")[0] == judged.library.split(",")[0]


def test_checks_run_whatever_the_voice_reports(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "alpha bravo charlie mute", "c": f"{TEXT} and much more"})
    assert values(rows, "continuation", "a")["fault"] == 0.0
    assert values(rows, "continuation", "b")["fault"] == 1.0
    # The voice reports nothing, but the judge's transcript lacks the end.
    missing = values(rows, "continuation", "c")
    assert (missing["failure"], missing["fault"]) == (0.0, 1.0)


def test_failed_checks_are_named_in_results(folder: Path) -> None:
    score(folder, {"a": TEXT, "b": "alpha bravo charlie delta and so much more than fits " * 4})
    lines = [json.loads(s) for s in (folder / "speak" / "results.jsonl").read_text().splitlines()]
    faults = {(line["list"], line["id"]): line["faults"] for line in lines}
    assert faults["continuation", "a"] == []
    # Ten frames: the prompt took as many for a few words.
    assert "early" in faults["cross", "b"]


def test_loop_in_the_middle_fails_a_check() -> None:
    prompt = Prompt(codes=np.zeros((3, 2), np.int64), text="yes")
    item = EvalItem("a", "yes", prompt)
    spoken = np.arange(1, 121).reshape(1, 120).repeat(3, axis=0)
    looped = spoken.copy()
    looped[:, 20:90] = 5
    wave = np.ones(16000, np.float32)
    assert failed_checks(FakeVoice(Path()), item, spoken, wave, None) == []
    assert failed_checks(FakeVoice(Path()), item, looped, wave, None) == ["loop"]


def test_speech_much_faster_than_its_prompt_is_early() -> None:
    stub = FakeVoice(Path())
    codes = np.arange(90).reshape(3, 30) % 8
    spoken = Prompt(codes=codes[:, :25], text="a sentence of one second")
    wave = np.ones(16000, np.float32)

    def found(prompt: Prompt, text: str) -> list[str]:
        return failed_checks(stub, EvalItem("a", text, prompt), codes[:, 25:] + 8, wave, None)

    assert found(spoken, "a sentence of one second and another one") == ["early"]
    assert found(spoken, "short") == []
    # Letters are counted after normalization.
    assert found(spoken, "1,999,999") == ["early"]


def test_digits_in_the_transcript_are_not_a_missing_end() -> None:
    stub = FakeVoice(Path())
    prompt = Prompt(codes=np.zeros((3, 2), np.int64), text="yes")
    item = EvalItem("a", "The house was built in nineteen eighty four.", prompt)
    codes = np.arange(90).reshape(3, 30) + 1
    wave = np.ones(16000, np.float32)
    assert failed_checks(stub, item, codes, wave, "The house was built in 1984.") == []
    assert failed_checks(stub, item, codes, wave, "The house was") == ["early"]
    other = "A horse is never built, but grows slowly in the fields."
    assert failed_checks(stub, item, codes, wave, other) == ["mismatch"]


def test_synthesis_resumes(folder: Path) -> None:
    texts = {name: f"{TEXT} {name}" for name in "abcdefgh"}
    first = score(folder, texts, batch=6)
    assert len(FakeVoice.batches) == 4  # Of two lists, six and two lines each.
    kept = (folder / "speak" / "results.jsonl").read_text()
    again = score(folder, texts, batch=6)
    assert len(FakeVoice.batches) == 4
    assert again == first
    assert (folder / "speak" / "results.jsonl").read_text() == kept
    # A line truncated by a kill, and a missing wave: their batches are synthesized again.
    made = folder / "speak" / "cross" / "made.jsonl"
    made.write_text(made.read_text()[:-20])
    (folder / "speak" / "continuation" / "b.wav").unlink()
    assert score(folder, texts, batch=6) == first
    assert [len(batch) for batch in FakeVoice.batches[4:]] == [6, 2]
    # Another voice.
    (folder / "voice" / "ar" / "model.safetensors").write_text("trained on")
    score(folder, texts, batch=6)
    assert len(FakeVoice.batches) == 10


def test_list_names_differ_between_shards(folder: Path) -> None:
    first = {row.list for row in score(folder, {"a": TEXT})}
    assert first.isdisjoint(row.list for row in score(folder, {"a": f"{TEXT} echo"}))


def test_own_asr_and_judge_have_separate_columns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = score(folder, {"a": TEXT})
    assert values(rows, "asr", None)["asr_wer"] == 0.75
    assert {row.metric for row in rows if row.list.startswith("dev-asr")} == {
        "asr_wer", "asr_cer", "asr_wil", "asr_mer",
    }  # fmt: skip
    assert "| system | list | n | asr_wer | asr_cer | wer | cer |" in capsys.readouterr().out


def test_untranscribable_item_counts_as_deletions(
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


def test_training_texts_are_not_evaluated(folder: Path) -> None:
    rows = score(folder, {"a": TEXT, "b": "something else"})
    for kind in ("asr", "continuation"):
        assert values(rows, kind, "a")
        assert not values(rows, kind, "b")


def test_ids_never_escape_the_folder(folder: Path) -> None:
    score(folder, {ESCAPE: TEXT, "a/b": TEXT, "a-b": TEXT})
    waves = set(folder.parent.rglob("*.wav"))
    assert len([path for path in waves if path.parent == folder / "speak" / "continuation"]) == 3
    assert {path.parent.parent for path in waves} == {folder / "speak", folder / "speak/prompts"}
    lines = (folder / "speak" / "results.jsonl").read_text().splitlines()
    audio = {json.loads(line)["audio"] for line in lines}
    assert audio == {path.name for path in waves if path.parent.name == "cross"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_evaluation_uses_the_training_device(folder: Path, device: str) -> None:
    score(folder, {"a": TEXT}, device)
    assert FakeVoice.device == device


def test_failed_write_keeps_earlier_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score(folder, {"a": TEXT})
    before = (folder / "rows.jsonl").read_bytes()

    def torn(path: Path, rows: list[Row]) -> None:
        path.write_text(json.dumps({"system": rows[0].system})[:-3])
        raise OSError("no space left")

    monkeypatch.setattr(voice, "append_rows", torn)
    with pytest.raises(OSError, match="no space left"):
        score(folder, {"a": f"{TEXT} echo"})
    assert (folder / "rows.jsonl").read_bytes() == before
    assert not list(folder.glob(".rows*"))


def textless_items() -> list[EvalItem]:
    """Prompts of 10 frames of amplitude 0.3, 0.7 and 0.8; then 20 of 0.5."""
    rows = [
        TokenRow(name, "a text", "s", "en", 1.2, np.repeat([[first] * 10 + [5] * 20], 3, axis=0))
        for name, first in (("a", 3), ("silent", 7), ("refused", 8))
    ]
    return continuation_items(rows, 0.4, 25.0)


def test_textless_continuation_is_scored_by_similarity(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorers = Scorers(Judges(None, FakeEncoder().embed, "", "encoder"))
    stub, origin = FakeVoice(Path()), Provenance(system="slm", speaker="encoder", seed=4)
    found = synthesize_items(stub, TEXTLESS, textless_items(), scorers, tmp_path, origin)
    results = {one.scored.id: one for one in found.results}
    good = results["a"].scored
    # As long as the rest of the recording.
    assert (good.values["failure"], good.values["seconds"], good.seed) == (0.0, 0.8, 4 + 7919)
    assert good.values["similarity"] == pytest.approx(np.cos(np.pi * 0.6), abs=1e-5)
    assert good.words is good.characters is None
    assert soundfile.info(tmp_path / TEXTLESS / "a.wav").duration == pytest.approx(1.2)
    assert audio_tags(tmp_path / TEXTLESS / "a.wav")["comment"].endswith(f"{'d' * 16}; seed 7923")
    for name in ("silent", "refused"):
        assert results[name].scored.values == {"failure": 1.0, "seconds": 0.0}
    assert (results["refused"].audio, results["refused"].failure) == (None, "refused")
    assert "refused was not synthesized: the prompt is too long" in caplog.text
    whole = {
        row.metric: (row.n, row.value)
        for row in rows_of(TEXTLESS, found.scored, origin)
        if row.utterance is None
    }
    assert whole["failure"] == (3, pytest.approx(2 / 3))
    assert whole["similarity"][0] == 1


def test_codec_rows_are_the_upper_limit_of_textless_continuation() -> None:
    def values(embed) -> dict[str, float]:
        scorers = Scorers(Judges(None, embed, "", "encoder"))
        items, origin = textless_items()[:1], Provenance(system="codec", speaker="encoder")
        rows = codec_rows(FakeVoice(Path()), TEXTLESS, items, scorers, origin)
        return {row.metric: row.value for row in rows if row.utterance is None}

    found = values(FakeEncoder().embed)
    assert found["similarity"] == pytest.approx(np.cos(np.pi * 0.2), abs=1e-5)
    assert (found["failure"], found["seconds"]) == (0.0, 0.8)
    assert values(None).keys() == {"failure", "seconds"}


def test_stored_results_keep_their_keys() -> None:
    result = Result(
        ScoredUtterance(id="a", values={"failure": 1.0}), ["loop"], "a.wav", "loop", 3, 7
    )
    record = json.loads(json.dumps(result.to_record()))
    assert record.keys() == {"scored", "faults", "audio", "reported", "tries", "seed"}
    assert Result.from_record(record) == result
