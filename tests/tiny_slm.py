"""Tiny text LLMs, tokenizers and token shards for the tests of slm."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from codec.tokens import CodecStamp, TokenRow, write_shard

SIZES = (24, 16, 16)
STAMP = CodecStamp(
    id="tiny", digest="0123456789abcdef", sample_rate=16000, frame_rate=25.0,
    num_codebooks=len(SIZES), codebook_sizes=SIZES,
)  # fmt: skip
if TYPE_CHECKING:
    from slm.tokenization.tokenizer import SpeechTextTokenizer

WORDS = "the cat sat on a mat and dog ran far away from red hen in sun now"


SMALL = [
    "ar.lora.rank=2", "batch.positions=300", "nar_batch.positions=300",
    "nar.num_layers=1", "nar.num_heads=2", "nar.width=16", "nar.feedforward=16",
    *(f"{optim}.{key}" for optim in ("optim", "nar_optim") for key in
      ("steps=6", "save_every=2", "eval_every=4", "log_every=2", "eval_batches=2")),
]  # fmt: skip
"""Overrides of recipes/tts.py for a miniature AR and NAR."""


def save_base(
    folder: Path,
    *,
    kind: str = "llama",
    tied: bool = True,
    eos: bool = True,
    pad_rows: int = 5,
    seed: int = 0,
) -> Path:
    """A random-weight LLM of two layers with a byte-level tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary["at"] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "t")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    extra = {"eos_token": "<|end|>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **extra)
    torch.manual_seed(seed)
    rows = len(tokenizer) + pad_rows
    if kind == "llama":
        lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    else:
        lm = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=rows, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    # Larger than the usual 0.02, so that what it computes is no noise.
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(base: Path, stamp: CodecStamp = STAMP) -> "SpeechTextTokenizer":
    """The LLM's own tokens and plain codes."""
    from slm.models.ar import load_base
    from slm.tokenization.tokenizer import SpeechTextTokenizer
    from slm.tokenization.vocabulary import Vocabulary

    loaded = load_base(base)
    return SpeechTextTokenizer(Vocabulary.of(loaded.lm, loaded.tokenizer, stamp), loaded.tokenizer)


def make_rows(
    count: int, *, seed: int = 0, most_frames: int = 40, sizes: tuple[int, ...] = SIZES
) -> list[TokenRow]:
    """Random codes and words: nothing to learn but by heart."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        frames = int(random.integers(12, most_frames))
        codes = np.stack([random.integers(0, size, frames) for size in sizes]).astype(np.uint16)
        text = " ".join(random.choice(WORDS.split(), size=3))
        rows.append(TokenRow(f"item-{index}", text, f"s{index % 2}", "en", frames / 25, codes))
    return rows


def save_shard(path: Path, count: int = 12, stamp: CodecStamp = STAMP, **kwargs: int) -> Path:
    write_shard(path, make_rows(count, sizes=stamp.codebook_sizes, **kwargs), stamp)
    return path


TEXT = "the cat sat on a mat"
"""What the voice of `save_voice` has been trained on, one would say."""


def save_voice(root: Path, codec_folder: Path) -> Path:
    """A voice whose models know nothing, with a shipped prompt named ann; its LLM is beside it."""
    from codec import load_codec
    from slm.config import ARConfig, LoRAConfig, NARConfig
    from slm.data.coverage import Coverage
    from slm.data.prompts import Prompt
    from slm.models.ar import SpeechLM
    from slm.models.nar import NAR

    voice = root / "a voice"
    codec = load_codec(codec_folder)
    codec.save_pretrained(voice / "codec")
    config = ARConfig(base=str(save_base(root / "base")), lora=LoRAConfig(rank=2))
    SpeechLM.create(config, codec.stamp, seed=0).save(voice / "ar")
    Coverage.of([TEXT], longest_frames=60).save(voice / "ar")
    torch.manual_seed(0)
    nar = NARConfig(
        codebook_sizes=codec.codebook_sizes, num_layers=1, num_heads=2, width=16, feedforward=16
    )
    NAR(nar).save_pretrained(voice / "nar")
    prompt = Prompt(codes=np.zeros((3, 10), np.int64), text="a cat", credit="nobody")
    prompt.save(voice / "prompts", "ann")
    return voice


def run_slm(*arguments: str | Path) -> int:
    """Exit status of the command `slm`."""
    from slm.__main__ import main

    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def speak_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models know no end: what loaded voices say is kept short."""
    from slm.voice import Voice

    original = Voice.from_pretrained.__func__  # type: ignore[attr-defined]

    def load(cls: type, *args, **kwargs) -> Voice:
        voice = original(cls, *args, **kwargs)
        voice.sampling = replace(
            voice.sampling, frames_per_token=(0.2, 0.5), spare_seconds=0.0, max_attempts=2
        )
        return voice

    monkeypatch.setattr(Voice, "from_pretrained", classmethod(load))


def copy_of(voice: Path, folder: Path) -> Path:
    """A copy of such a voice and its LLM."""
    shutil.copytree(voice.parent, folder / "copy")
    return folder / "copy" / voice.name


def quiet() -> list[pytest.MarkDecorator]:
    """What libraries warn of, and we can do nothing about."""
    return [
        # peft asks transformers for an attribute under its old name.
        pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
        # peft sets right by itself what GPT-2's transposed layers need.
        pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    ]


def voice_inputs(root: Path, codec: Path) -> list[str]:
    """A tiny LLM, codec and tokens, as overrides of recipes/tts.py."""
    from codec import load_codec

    stamp = load_codec(codec).stamp
    save_shard(root / "train.parquet", 16, stamp)
    save_shard(root / "dev.parquet", 6, stamp, seed=1)
    tokens = (f"{name}={root / name}.parquet" for name in ("train", "dev"))
    return [f"ar.base={save_base(root / 'base')}", f"codec={codec}", *tokens]
