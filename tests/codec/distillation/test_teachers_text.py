"""Loading teachers, and the states of words from text teachers."""

from pathlib import Path

import pytest
import torch
from tiny_teachers import PIECES, TEXT_MODELS, save_text_teacher
from transformers import (
    GPT2Config,
    HubertConfig,
    HubertModel,
    WhisperConfig,
    WhisperModel,
)

from codec.distillation.teachers import (
    TextTeacher,
    has_bf16,
    load_speech_teacher,
    load_text_teacher,
    network_dtype,
)


def load(folder: Path, kind: str = "bert", layer: str = "mean") -> TextTeacher:
    return load_text_teacher(save_text_teacher(folder, kind), layer=layer, half=False)


@torch.no_grad()
def states_of(teacher: TextTeacher, pieces: str) -> torch.Tensor:
    """All hidden states of the pieces alone, (layers + 1, T, D)."""
    tokens = torch.tensor([[PIECES.index(piece) for piece in pieces.split()]])
    output = teacher.network(tokens, output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, 0]


@pytest.mark.parametrize("kind", sorted(TEXT_MODELS))
def test_a_word_is_the_mean_of_its_pieces(tmp_path: Path, kind: str) -> None:
    teacher = load(tmp_path, kind)
    assert (teacher.dimension, teacher.layer) == (16, "mean")
    one, two = teacher([["the", "cats", "sat"], ["on"]])
    every = states_of(teacher, "[CLS] the cat ##s sat [SEP]").mean(0)
    expected = torch.stack([every[1], every[2:4].mean(0), every[4]])
    torch.testing.assert_close(one.words, expected)
    torch.testing.assert_close(one.sentence, every[0])
    # The padded item of the batch is as it is alone.
    torch.testing.assert_close(two.words, states_of(teacher, "[CLS] on [SEP]").mean(0)[1:2])
    assert not one.words.requires_grad
    assert one.words.dtype == torch.float32


@pytest.mark.parametrize(("layer", "index"), [("0", 0), ("1", 1), ("2", 2), ("last", 2)])
def test_a_layer_is_chosen(tmp_path: Path, layer: str, index: int) -> None:
    teacher = load(tmp_path, layer=layer)
    [found] = teacher([["cat"]])
    torch.testing.assert_close(found.sentence, states_of(teacher, "[CLS] cat [SEP]")[index, 0])


def test_a_text_without_words_has_a_sentence(tmp_path: Path) -> None:
    teacher = load(tmp_path)
    empty, full = teacher([[], ["cat"]])
    assert empty.words.shape == (0, 16)
    torch.testing.assert_close(empty.sentence, states_of(teacher, "[CLS] [SEP]").mean(0)[0])
    assert full.words.shape == (1, 16)
    assert teacher([]) == []


def test_every_word_has_a_state(tmp_path: Path) -> None:
    teacher = load(tmp_path)
    [found] = teacher([["cat", "", "\u200b", "mat"]])
    every = states_of(teacher, "[CLS] cat [UNK] [UNK] mat [SEP]").mean(0)
    torch.testing.assert_close(found.words, every[1:5])


def test_long_texts_are_cut_between_words(tmp_path: Path) -> None:
    teacher = load(tmp_path)
    # Ten pieces fit. The last word is longer than a window.
    words = ["the"] * 9 + ["cats", "sat", "cat" + "s" * 20]
    [found] = teacher([words])
    assert found.words.shape == (12, 16)
    first = states_of(teacher, "[CLS]" + " the" * 9 + " [SEP]").mean(0)
    second = states_of(teacher, "[CLS] cat ##s sat [SEP]").mean(0)
    third = states_of(teacher, "[CLS] cat" + " ##s" * 9 + " [SEP]").mean(0)
    torch.testing.assert_close(found.words[8], first[9])
    torch.testing.assert_close(found.words[9], second[1:3].mean(0))
    torch.testing.assert_close(found.words[11], third[1:11].mean(0))
    torch.testing.assert_close(found.sentence, (first[0] + second[0] + third[0]) / 3)


def test_many_texts_go_in_several_batches(tmp_path: Path) -> None:
    teacher = load(tmp_path)
    texts = [["the", "cat"][: 1 + number % 2] for number in range(70)]
    found = teacher(texts)
    assert [len(states.words) for states in found] == [len(words) for words in texts]
    torch.testing.assert_close(found[69].words, found[1].words)


def test_padded_puts_piece_i_at_frame_i(tmp_path: Path) -> None:
    teacher = load(tmp_path)
    found = teacher.padded(["the cats", "sat"], 8)
    assert found.shape == (2, 8, 16)
    alone = states_of(teacher, "[CLS] the cat ##s [SEP]").mean(0)
    torch.testing.assert_close(found[0, :5], alone)
    assert not torch.allclose(found[0, 5], alone[4], atol=1e-3)
    # Truncated to the frames that are there, [CLS] and [SEP] included.
    assert teacher.padded(["the cats sat on the mat"], 4).shape == (1, 4, 16)
    # More frames than the model has positions.
    long = teacher.padded(["the cat"], 20)
    assert long.shape == (1, 20, 16)
    torch.testing.assert_close(long[0, 12:], long[0, 11:12].expand(8, -1))


def test_shouted_texts_are_read_in_small_letters(tmp_path: Path) -> None:
    teacher = load_text_teacher(save_text_teacher(tmp_path, cased=True), half=False)
    calm, shouted, mixed = teacher([["the", "cats"], ["THE", "CATS"], ["the", "CATS"]])
    torch.testing.assert_close(shouted.words, calm.words)
    torch.testing.assert_close(shouted.sentence, calm.sentence)
    # A few words in capitals are meant so.
    unknown = states_of(teacher, "[CLS] the [UNK] [SEP]").mean(0)
    torch.testing.assert_close(mixed.words[1], unknown[2])
    small, large, mixed = teacher.padded(["the cats", "THE CATS", "the CATS"], 6)
    torch.testing.assert_close(small, large)
    assert not torch.allclose(small, mixed, atol=1e-3)


def test_teachers_stay_frozen(tmp_path: Path) -> None:
    around = torch.nn.ModuleList([load(tmp_path)]).train()
    assert not any(module.training for module in around[0].modules())
    assert not any(parameter.requires_grad for parameter in around.parameters())


@pytest.mark.parametrize("loader", [load_speech_teacher, load_text_teacher])
def test_a_missing_model_says_what_to_give(tmp_path: Path, loader) -> None:
    with pytest.raises(ValueError, match=r"nowhere: .*hub id .* or a folder"):
        loader(str(tmp_path / "nowhere"))


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"gpt2 .* hubert, wavlm, wav2vec2, whisper"):
        load_speech_teacher(str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match=r"gpt2 .* bert, electra, distilbert"):
        load_text_teacher(str(tmp_path / "gpt2"))


@pytest.mark.parametrize("layer", ["3", "-1", "nine", "avg"])
def test_a_layer_out_of_range_names_the_range(tmp_path: Path, layer: str) -> None:
    folder = save_text_teacher(tmp_path / "text")
    with pytest.raises(ValueError, match=r"layer must be mean, last, or .* 0 .* to 2, got"):
        load_text_teacher(folder, layer=layer)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    HubertModel(HubertConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "hubert")
    with pytest.raises(ValueError, match="to 2, got"):
        load_speech_teacher(str(tmp_path / "hubert"), layer=layer)
    whisper = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    whisper.save_pretrained(tmp_path / "whisper")
    with pytest.raises(ValueError, match="to 2, got"):
        load_speech_teacher(str(tmp_path / "whisper"), layer=layer)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    model = TEXT_MODELS["bert"]()
    weights = {key: value for key, value in model.state_dict().items() if "layer.1" not in key}
    save_text_teacher(tmp_path)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"its weights lack encoder\.layer\.1"):
        load_text_teacher(str(tmp_path))


def test_half_is_used_where_the_hardware_has_it(tmp_path: Path, monkeypatch) -> None:
    folder = save_text_teacher(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert has_bf16("cpu")
    half = load_text_teacher(folder)
    assert half.network.dtype == torch.bfloat16
    [found], [exact] = half([["cat"]]), load_text_teacher(folder, half=False)([["cat"]])
    assert found.words.dtype == torch.float32
    assert torch.cosine_similarity(found.words, exact.words).item() > 0.999
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert not has_bf16("cpu")
    assert load_text_teacher(folder).network.dtype == torch.float32


def test_gpus_without_bf16_compute_in_float16(monkeypatch) -> None:
    able = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bool(able))
    assert network_dtype("cuda") == torch.float16
    assert network_dtype(torch.device("cuda:0"), half=False) == torch.float32
    able.append(True)
    assert network_dtype("cuda") == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert network_dtype("cpu") == torch.float32


def test_whisper_without_its_decoder_loads(tmp_path: Path) -> None:
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperModel(config)
    weights = {key: value for key, value in model.state_dict().items() if "decoder" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    assert load_speech_teacher(str(tmp_path)).dimension == 16
