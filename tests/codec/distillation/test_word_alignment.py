"""Words with times: CTC and Whisper transcribers, and the arithmetic of paths and pauses."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_teachers import CTC_LETTERS, save_ctc
from tiny_whisper import save_whisper
from torch import Tensor

from codec.distillation.word_alignment import (
    CTCTranscriber,
    Span,
    WhisperTranscriber,
    Word,
    attention_scores,
    dtw_starts,
    fill_gaps,
    label_runs,
    load_transcriber,
    split_at_low_energy,
    trim_pauses,
)

RATE = 16_000


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> WhisperTranscriber:
    folder = save_whisper(tmp_path_factory.mktemp("whisper") / "tiny")
    transcriber = load_transcriber(str(folder), half=False, batch_size=2)
    assert isinstance(transcriber, WhisperTranscriber)
    return transcriber


def load_ctc(folder: Path, norm: str) -> CTCTranscriber:
    transcriber = load_transcriber(str(save_ctc(folder, norm)), half=False, batch_size=2)
    assert isinstance(transcriber, CTCTranscriber)
    return transcriber


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> CTCTranscriber:
    return load_ctc(tmp_path_factory.mktemp("ctc") / "layer", "layer")


@pytest.fixture(scope="module")
def ctc_group(tmp_path_factory: pytest.TempPathFactory) -> CTCTranscriber:
    """With a norm over time, as wav2vec2-base has."""
    return load_ctc(tmp_path_factory.mktemp("ctc") / "group", "group")


def noise(*seconds: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Waves (B,1,S) of these lengths (B,), with noise in the padding as well."""
    lengths = torch.tensor([round(RATE * value) for value in seconds])
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(len(seconds), 1, int(lengths.max()), generator=generator), lengths


def check(words: list[Word], seconds: float) -> None:
    """Times in order, within the recording."""
    for word in words:
        assert 0 <= word.start <= word.end <= seconds
    for before, after in pairwise(words):
        assert before.end <= after.start


def emission(path: str) -> Tensor:
    """Log probabilities (T,V) of which the best path is the given one; "_" is the blank."""
    logits = torch.full((len(path), len(CTC_LETTERS)), -5.0)
    for frame, letter in enumerate(path):
        logits[frame, 0 if letter == "_" else CTC_LETTERS.index(letter)] = 5.0
    return logits.log_softmax(-1)


def test_ctc_words_have_the_frames_of_their_letters(ctc: CTCTranscriber) -> None:
    found = ctc.recognize(emission("__HH_EL_LOO__||_A_|_TE_|__"))
    assert found == [("HELLO", 2, 11), ("A", 16, 17), ("TE", 20, 22)]
    assert ctc.recognize(emission("__|_")) == []


def test_ctc_aligns_given_words(ctc: CTCTranscriber) -> None:
    log_probs = emission("__HH_EL_LOO__||_A_|_TE_|__")
    assert ctc.align(log_probs, ["Hello", "a", "te"]) == [
        ("Hello", 2, 11),
        ("a", 16, 17),
        ("te", 20, 22),
    ]
    # Words that differ from the speech get the most probable place.
    (hello, tea) = ctc.align(log_probs, ["hello", "tea"])
    assert hello == ("hello", 2, 11)
    assert tea[1] == 20


def test_ctc_alignment_ignores_characters_outside_the_vocabulary(ctc: CTCTranscriber) -> None:
    log_probs = emission("__HI_____|_M_E__")
    assert ctc.align(log_probs, ["42", "h\u00efi,", "1984", "7", "me!"]) == [
        ("42", 0, 2), ("h\u00efi,", 2, 4), ("1984", 4, 8), ("7", 8, 11), ("me!", 11, 14),
    ]  # fmt: skip
    assert ctc.align(log_probs, ["1", "2"]) == [("1", 0, 8), ("2", 8, 16)]
    (word,) = ctc.align(emission("_I'M_"), ["I\u2019m"])
    assert word == ("I\u2019m", 1, 4)


def test_a_text_longer_than_the_recording_is_refused(ctc: CTCTranscriber) -> None:
    assert ctc.align(emission("ALL_"), ["al"])[0].text == "al"
    with pytest.raises(
        ValueError, match=r"3 letters need at least 4 CTC steps, but the recording has 3"
    ):
        ctc.align(emission("ALL"), ["all"])  # A blank must stand between the two.


@pytest.mark.parametrize("kind", ["ctc", "ctc_group", "whisper"])
def test_words_do_not_depend_on_padding_or_neighbours(
    kind: str, request: pytest.FixtureRequest
) -> None:
    transcriber = request.getfixturevalue(kind)
    wave, lengths = noise(1.03, 0.5, 0.77)
    texts = ["the cat", "a", "sat on it"]
    batches = [transcriber.words(wave, lengths), transcriber.words(wave, lengths, texts)]
    for batch, given in zip(batches, (None, texts), strict=True):
        for item, (row, length) in enumerate(zip(wave, lengths.tolist(), strict=True)):
            text = None if given is None else [given[item]]
            [alone] = transcriber.words(row[None, :, :length], None, text)
            assert batch[item] == alone
            check(alone, length / RATE)
    assert [[word.text for word in words] for words in batches[1]] == [t.split() for t in texts]


@pytest.mark.parametrize("kind", ["ctc", "whisper"])
def test_silence_has_no_words(kind: str, request: pytest.FixtureRequest) -> None:
    transcriber = request.getfixturevalue(kind)
    wave, _ = noise(0.4, 0.4, 0.4, 0.4)
    wave[1] *= 1e-5
    lengths = torch.tensor([6400, 6400, 0, 6400])
    found = transcriber.words(wave, lengths, ["it", "is", "all", " "])
    assert [len(words) for words in found] == [1, 0, 0, 0]
    assert transcriber.words(wave[1:3], lengths[1:3]) == [[], []]
    assert transcriber.words(wave[:0], lengths[:0]) == []


@pytest.mark.parametrize("kind", ["ctc", "whisper"])
def test_every_recording_needs_a_text(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match="2 recordings but 1 texts"):
        request.getfixturevalue(kind).words(*noise(0.1, 0.1), ["one"])


def test_ctc_aligns_long_recordings(ctc: CTCTranscriber) -> None:
    wave, _ = noise(31.0)
    [words] = ctc.words(wave, None, ["to be or not"])
    assert [word.text for word in words] == ["to", "be", "or", "not"]
    check(words, 31.0)
    check(ctc.words(wave)[0], 31.0)


def test_whisper_transcribes_long_recordings_in_parts(
    whisper: WhisperTranscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[int] = []

    def spans(waves: list[Tensor], texts: None) -> list[list[Span]]:
        seconds.extend(len(wave) for wave in waves)
        return [[Span("first", 0, 1), Span("last", 2, 1000)] for _ in waves]

    monkeypatch.setattr(whisper, "max_seconds", 2.0)
    monkeypatch.setattr(whisper, "_spans", spans)
    wave, _ = noise(5.0)
    wave[..., 28_000:30_000] = 0
    [words] = whisper.words(wave)
    check(words, 5.0)
    stretches = [
        round((b.end - a.start) * RATE) for a, b in zip(words[::2], words[1::2], strict=True)
    ]
    assert 28_000 < stretches[0] < 30_000
    assert sum(stretches) == 80_000
    assert sorted(stretches) == seconds
    assert [word.text for word in words] == ["first", "last"] * len(seconds)
    with pytest.raises(ValueError, match=r"recording 0 lasts 5\.0 s: .* 2 s at most; cut"):
        whisper.words(wave, None, ["a text"])


def test_whisper_word_times_follow_the_attention(
    whisper: WhisperTranscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention rows with known frames: " the" has two tokens, " cat" four, and the end one."""
    prompt = len(whisper.prompt)
    weights = torch.full((prompt + 7, 30), -10.0)
    for row, (start, stop) in enumerate(pairwise([0, 5, 10, 14, 18, 22, 26, 30]), prompt - 1):
        weights[row, start:stop] = 10.0
    seen: list[list[int]] = []

    def attention(hidden: Tensor, texts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        seen.extend(texts)
        return [(weights[None], torch.eye(30)[None])]

    monkeypatch.setattr(whisper, "_attention", attention)
    wave, _ = noise(0.6)
    [words] = whisper.words(wave, None, ["THE CAT"])
    assert words == [("THE", 0.0, 0.2), ("CAT", 0.2, 0.52)]
    assert seen == [whisper.tokenizer(" the cat", add_special_tokens=False)["input_ids"]]
    wave[..., : 3 * 320] = wave[..., 24 * 320 :] = 0
    [words] = whisper.words(wave, None, ["the cat"])
    assert words == [("the", 0.06, 0.2), ("cat", 0.2, 0.48)]


def test_whisper_attention_equals_transformers(whisper: WhisperTranscriber, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(
        save_whisper(tmp_path / "tiny"), attn_implementation="eager"
    ).eval()
    hidden = torch.randn(2, 40, 16)
    texts = [[3, 4, 5], [6]]
    found = whisper._attention(hidden, texts)
    for item, text in enumerate(texts):
        tokens = torch.tensor([[*whisper.prompt, *text, whisper.end]])
        with torch.no_grad():
            output = model.model.decoder(
                tokens, encoder_hidden_states=hidden[item : item + 1], output_attentions=True
            )
        expected = torch.stack([output.cross_attentions[0][0, 1], output.cross_attentions[1][0, 0]])
        query, key = found[item]
        torch.testing.assert_close((query @ key.mT).softmax(-1), expected)


def test_whisper_words_are_split_at_spaces(whisper: WhisperTranscriber) -> None:
    tokens = whisper.tokenizer(" the cat's hat.", add_special_tokens=False)["input_ids"]
    words, parts = whisper._split_words(tokens)
    assert words == ["the", "cat's", "hat."]
    assert [token for part in parts for token in part] == tokens


def test_whisper_lowercases_texts_all_in_capitals(whisper: WhisperTranscriber) -> None:
    words, tokens = whisper._tokenize(["THE", "CAT'S"])
    assert words == ["THE", "CAT'S"]
    assert whisper.tokenizer.decode(tokens[1]) == " cat's"
    assert whisper.tokenizer.decode(whisper._tokenize(["The", "NHS"])[1][1]) == " NHS"
    assert whisper._tokenize(["7"])[0] == ["7"]


def test_a_text_longer_than_the_decoder_context_is_refused(whisper: WhisperTranscriber) -> None:
    with pytest.raises(ValueError, match=r"500 tokens is longer than the 443 .* cut"):
        whisper.words(*noise(0.5), ["a" * 499])


def test_english_whispers_need_no_language(tmp_path: Path) -> None:
    folder = str(save_whisper(tmp_path / "tiny", multilingual=False, alignment_heads=None))
    transcriber = load_transcriber(folder, half=True)
    assert isinstance(transcriber, WhisperTranscriber)
    assert transcriber.name == folder
    assert len(transcriber.prompt) == 2
    assert transcriber.heads == [[1, 0], [1, 1]]
    [words] = transcriber.words(*noise(0.5), ["the cat"])
    assert [word.text for word in words] == ["the", "cat"]
    with pytest.raises(ValueError, match=r"no language 'de'; this Whisper has en"):
        load_transcriber(folder, language="de")


def test_a_language_that_whisper_lacks_is_named(tmp_path: Path) -> None:
    folder = str(save_whisper(tmp_path / "tiny"))
    german, english = (load_transcriber(folder, language=name) for name in ("de", "en"))
    assert isinstance(german, WhisperTranscriber)
    assert isinstance(english, WhisperTranscriber)
    assert german.prompt[1] == english.prompt[1] + 1
    with pytest.raises(ValueError, match=r"no language 'xx'; this Whisper has de, en"):
        load_transcriber(folder, language="xx")


@pytest.mark.parametrize("kind", ["Hubert", "WavLM"])
def test_other_ctc_models_load(tmp_path: Path, kind: str) -> None:
    transcriber = load_transcriber(str(save_ctc(tmp_path / kind, kind=kind)))
    assert transcriber.name == str(tmp_path / kind)
    [words] = transcriber.words(*noise(0.5), ["to be"])
    assert [word.text for word in words] == ["to", "be"]
    check(words, 0.5)


def test_a_model_that_cannot_transcribe_is_named(tmp_path: Path) -> None:
    from transformers import BertConfig, Wav2Vec2ForCTC

    with pytest.raises(ValueError, match=r"nowhere: no such folder; give a hub id"):
        load_transcriber(str(tmp_path / "nowhere"))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"a bert model; whisper, wav2vec2, hubert, wavlm can"):
        load_transcriber(str(tmp_path / "bert"))
    (save_whisper(tmp_path / "damaged") / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"damaged: cannot be loaded as a transcriber"):
        load_transcriber(str(tmp_path / "damaged"))
    folder = save_ctc(tmp_path / "ctc")
    Wav2Vec2ForCTC.from_pretrained(folder).wav2vec2.save_pretrained(folder)
    with pytest.raises(ValueError, match="no CTC head"):
        load_transcriber(str(folder))


def test_the_path_follows_the_highest_scores() -> None:
    scores = np.full((3, 8), -0.1, np.float32)
    scores[0, :3] = scores[1, 3:5] = scores[2, 5:] = 1
    assert dtw_starts(scores).tolist() == [0, 3, 5]


def test_tokens_may_share_a_frame_and_the_first_starts_at_0() -> None:
    scores = np.full((4, 4), -1.0, np.float32)
    scores[0, :2] = scores[1, 2] = scores[2, 2] = scores[3, 3] = 1
    assert dtw_starts(scores).tolist() == [0, 2, 2, 3]
    assert dtw_starts(np.ones((1, 5), np.float32)).tolist() == [0]
    assert dtw_starts(np.ones((3, 1), np.float32)).tolist() == [0, 0, 0]


def test_the_path_has_the_best_score_of_all() -> None:
    def best(scores: np.ndarray) -> float:
        """By the definition, cell by cell."""
        total = np.full((scores.shape[0] + 1, scores.shape[1] + 1), -np.inf)
        total[0, 0] = 0
        for row, column in np.ndindex(scores.shape):
            before = max(total[row, column], total[row, column + 1], total[row + 1, column])
            total[row + 1, column + 1] = scores[row, column] + before
        return float(total[-1, -1])

    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.standard_normal((6, 9)).astype(np.float32)
        starts = dtw_starts(scores)
        assert (np.diff(starts) >= 0).all()
        # A token goes on to the frame before the next one's, or shares that one.
        stops = np.append(starts[1:], 8)
        paths = [0.0]
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            shared = scores[row, start : stop + 1].sum()
            alone = scores[row, start:stop].sum() if start < stop and row < 5 else -np.inf
            paths = [paths[0] + max(shared, alone)]
        assert paths[0] == pytest.approx(best(scores), abs=1e-5)


def test_attention_is_normalised_over_tokens_smoothed_and_averaged() -> None:
    weights = torch.zeros(2, 3, 20)
    weights[:, 0, :10] = weights[:, 1, 10:] = 1.0
    weights[1] *= 5  # Heads are standardized.
    weights[0, 2, 4] = 1.0  # One frame alone is noise.
    scores = attention_scores(weights)
    assert scores.shape == (3, 20)
    high, low = 2 / 2**0.5, -1 / 2**0.5
    assert scores[0, :9].tolist() == pytest.approx([high] * 9)
    assert scores[1, 11:].tolist() == pytest.approx([high] * 9)
    assert scores[2].tolist() == pytest.approx([low] * 20)
    torch.testing.assert_close(attention_scores(weights[1:]), attention_scores(weights[1:] / 5))


def test_few_frames_are_not_smoothed() -> None:
    weights = torch.eye(3)[None]
    assert dtw_starts(attention_scores(weights).numpy()).tolist() == [0, 1, 2]


def test_runs_of_a_label_have_frames() -> None:
    assert list(label_runs([0, 0, 7, 7, 7, 0, 3])) == [(0, 0, 2), (7, 2, 5), (0, 5, 6), (3, 6, 7)]
    assert list(label_runs([])) == []


def test_words_without_a_time_share_the_gap() -> None:
    assert fill_gaps([None, None, (10, 12), None, (20, 21), None], 31) == [
        (0, 5), (5, 10), (10, 12), (12, 20), (20, 21), (21, 31),
    ]  # fmt: skip
    assert fill_gaps([None, None], 9) == [(0, 4), (4, 9)]
    assert fill_gaps([], 9) == []


def test_pauses_are_trimmed_from_words() -> None:
    wave = torch.zeros(100)
    wave[20:45] = 1.0  # Frames 2, 3 and half of 4 of ten samples each.
    wave[70:80] = 0.001
    spans = [Span("a", 0, 3), Span("b", 3, 6), Span("c", 6, 10), Span("d", 3, 3)]
    assert trim_pauses(spans, wave[:95], 10) == [
        Span("a", 2, 3), Span("b", 3, 5), Span("c", 6, 10), Span("d", 3, 3),
    ]  # fmt: skip


def test_the_noise_of_a_recording_is_a_pause() -> None:
    wave = torch.full((2000,), 0.02)  # 34 dB below: more than the lower bound allows alone.
    wave[500:1500] = 1.0
    assert trim_pauses([Span("a", 0, 200)], wave, 10) == [Span("a", 50, 150)]
    wave[:] = 0.5
    wave[500:1500] = 1.0
    assert trim_pauses([Span("a", 0, 200)], wave, 10) == [Span("a", 0, 200)]


def test_recordings_are_split_at_pauses() -> None:
    wave = torch.ones(1500)
    wave[520:540] = wave[1080:1100] = 0
    stretches = list(split_at_low_energy(wave, 600))
    assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
    assert stretches[-1][1] == 1500
    assert 520 <= stretches[0][1] <= 540
    assert 1080 <= stretches[1][1] <= 1100
    assert all(stop - start <= 600 for start, stop in stretches)
    assert list(split_at_low_energy(wave, float("inf"))) == [(0, 1500)]
    assert list(split_at_low_energy(wave, 1500)) == [(0, 1500)]
    assert list(split_at_low_energy(wave[:0], 600)) == []
