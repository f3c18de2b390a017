"""Tiny random teachers, saved as transformers saves them, and a transcriber of known word times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    HubertConfig,
    HubertModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from codec.distillation.word_alignment import Word

SPEECH_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
WHISPER = {
    "d_model": 16, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 20,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SPEECH_MODELS = {
    "hubert": lambda: HubertModel(HubertConfig(**SPEECH_SIZES)),
    "hubert-large": lambda: HubertModel(HubertConfig(**SPEECH_SIZES, **STABLE)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SPEECH_SIZES)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SPEECH_SIZES, **STABLE)),
    "whisper": lambda: WhisperModel(WhisperConfig(**WHISPER)),
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "on", "mat"]
TEXT_SIZES = {
    "vocab_size": len(PIECES),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
TEXT_MODELS = {
    "bert": lambda: BertModel(BertConfig(**TEXT_SIZES)),
    "electra": lambda: ElectraModel(ElectraConfig(**TEXT_SIZES, embedding_size=8)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=len(PIECES), dim=16, n_layers=2, n_heads=2, hidden_dim=24,
            max_position_embeddings=12,
        )
    ),
}  # fmt: skip
CTC_LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


def save_speech_teacher(folder: Path, kind: str, normalize: bool = True) -> str:
    torch.manual_seed(0)
    model = SPEECH_MODELS[kind]()
    # The weights that transformers draws are so small that padding would hardly matter.
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "position" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if kind != "whisper":
        Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    return str(folder)


def save_text_teacher(folder: Path, kind: str = "bert", cased: bool = False) -> str:
    torch.manual_seed(0)
    TEXT_MODELS[kind]().save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=12,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def save_ctc(folder: Path, norm: str = "layer", kind: str = "Wav2Vec2", **options: Any) -> Path:
    """A random CTC model of two layers over capital letters, 20 ms a frame."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(CTC_LETTERS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        pad_token_id=0,
        **options,
    )
    getattr(transformers, f"{kind}ForCTC")(config).save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(CTC_LETTERS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(
        folder
    )
    return folder


class EvenTranscriber:
    """Spreads given words evenly over the recording; without a text it recognises "the mat"."""

    sample_rate = 16_000
    name, language = "even", "en"

    def __init__(self) -> None:
        self.num_seen = 0

    def words(
        self,
        wave: Float[Tensor, "B 1 S"],
        lengths: Int[Tensor, " B"] | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[list[Word]]:
        assert lengths is not None
        self.num_seen += len(wave)
        found = []
        for number, length in enumerate(lengths.tolist()):
            words = (texts[number] if texts else "the mat").split()
            if "impossible" in words:
                raise ValueError("the text cannot be aligned")
            step = length / 16_000 / len(words)
            found.append([Word(word, at * step, (at + 1) * step) for at, word in enumerate(words)])
        return found
