import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_teachers import save_text_teacher
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from codec.audio import write_audio
from codec.distillation.teachers import load_text_teacher
from recipes.tools import show_alignment as program
from recipes.tools.show_alignment import NO_WORD, Alignments, align_frames, index_words, word_runs

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(PIECES), intermediate_size=8, max_position_embeddings=10, **sizes
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=10,
        **{f"{name}_token": token for name, token in special.items()},
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ACEHST"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocabulary.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(20, 16),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        **sizes,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recording(tmp_path: Path) -> str:
    noise = np.random.default_rng(0).standard_normal(16_100)
    write_audio(tmp_path / "one.wav", (0.1 * noise).astype("f4"), 16_000)
    return str(tmp_path / "one.wav")


def test_ctc_follows_time_and_index_the_order_of_pieces(text_model: str) -> None:
    teacher = load_text_teacher(text_model)
    words = [
        program.Word("the", 0.1, 0.2),
        program.Word("cats", 0.2, 0.5),
        program.Word("sat", 0.75, 0.9),
    ]
    aligned = align_frames(words, teacher, 10, 10.0)
    assert aligned.timed == [-1, 0, 1, 1, 1, -1, -1, 2, 2, -1]
    # [CLS] the cat ##s sat [SEP] and padding.
    assert aligned.indexed == [-1, 0, 1, 1, 2, -1, -1, -1, -1, -1]
    assert aligned.agreement == pytest.approx(3 / 6)
    assert word_runs(aligned.timed) == [(0, 1, 2), (1, 2, 5), (2, 7, 9)]
    assert Alignments([NO_WORD], [NO_WORD]).agreement == 0


def test_index_words_are_at_the_frames_of_their_states(text_model: str) -> None:
    """The state of a frame depends on the word of that frame."""
    teacher = load_text_teacher(text_model, layer="0", half=False)
    for num_frames in (4, 12):
        texts = ["the cats sat", "the the sat"]
        index = index_words(texts[0].split(), teacher, num_frames)
        assert len(index) == num_frames
        states = teacher.padded(texts, num_frames)
        differ = (states[0, :4] - states[1, :4]).abs().amax(1) > 1e-6
        assert differ[: min(3, num_frames - 1)].tolist() == [False, False, True]
        assert index[:3] == [-1, 0, 1]
    assert index_words(["cats"] * 9, teacher, 12)[-2:] == [NO_WORD] * 2


def test_index_counts_the_pieces_that_a_cased_teacher_sees(tmp_path: Path) -> None:
    teacher = load_text_teacher(save_text_teacher(tmp_path, cased=True), half=False)
    assert index_words(["THE", "CATS"], teacher, 6) == [-1, 0, 1, 1, -1, -1]
    assert index_words(["the", "CATS"], teacher, 6) == [-1, 0, 1, -1, -1, -1]


def test_the_language_is_passed_on(
    recording: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refusing(model: str, *, language: str) -> None:
        asked.append(language)
        raise ValueError("not here")

    monkeypatch.setattr(program, "load_transcriber", refusing)
    for more in ([], ["--language", "de"]):
        with pytest.raises(ValueError, match="not here"):
            program.main([recording, "--out", str(tmp_path / "a.png"), *more])
    assert asked == ["en", "de"]


def test_a_picture_is_drawn_and_the_words_are_printed(
    recording: str,
    text_model: str,
    transcriber: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "new" / "picture.png"
    argv = [recording, "--text", "the cats sat", "--text-model", text_model]
    program.main([*argv, "--transcriber", transcriber, "--out", str(out), "--frame-rate", "25"])
    results = json.loads(capsys.readouterr().out)
    # 16,100 samples: 25 frames of 640, and one that is not full.
    assert (results["num_frames"], results["frame_rate"]) == (26, 25.0)
    assert [word["text"] for word in results["words"]] == ["the", "cats", "sat"]
    assert [word["index"] for word in results["words"]] == [[1, 2], [2, 4], [4, 5]]
    for word in results["words"]:
        first, stop = word["ctc"] or (0, 0)
        assert (stop - first) / 25 == pytest.approx(word["end"] - word["start"], abs=0.08)
    assert image.imread(out).ndim == 3


def test_invalid_arguments_are_refused(
    recording: str,
    text_model: str,
    transcriber: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = ["--out", str(tmp_path / "a.png")]
    models_given = ["--text-model", text_model, "--transcriber", transcriber]
    with pytest.raises(ValueError, match="name a \\.png file"):
        program.main([recording, "--out", "a.jpg"])
    with pytest.raises(ValueError, match="must be positive"):
        program.main([recording, *out, "--frame-rate", "0"])
    with pytest.raises(ValueError, match="no word was recognized"):
        program.main([recording, *out, *models_given, "--text", " "])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="install the extra `demo`"):
        program.main([recording, *out, *models_given, "--text", "cats sat"])
