"""A Whisper of random weights and few letters, as tests save it."""

from pathlib import Path
from typing import Any

import torch

LANGUAGES = ("en", "de")


def tiny_tokenizer() -> Any:
    """Letters, `th` and Whisper's special tokens; a space starts a word's first token."""
    from transformers import WhisperTokenizer

    space = chr(0x120)  # How byte-level vocabularies write a space.
    letters = [space, *map(chr, range(33, 127)), "th", f"{space}th"]
    tokenizer = WhisperTokenizer(
        vocab={letter: number for number, letter in enumerate(letters)},
        merges=[("t", "h"), (space, "th")],
        pad_token="<|endoftext|>",
    )
    special = ["startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm"]
    special += ["startofprev", "nospeech", "notimestamps"]
    tokenizer.add_tokens([f"<|{name}|>" for name in special], special_tokens=True)
    return tokenizer


def tiny_whisper(multilingual: bool = True, seed: int = 0) -> Any:
    """Two layers of width 16, two heads; the vocabulary of the English or multilingual Whisper."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    end = tiny_tokenizer().convert_tokens_to_ids("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=51865 if multilingual else 51864,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=80,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=end + 1,
        suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # What starts at 0 or 1 would hide a tensor that went astray.
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor).mul_(0.1).half().float())
    return model


def save_whisper(folder: Path, multilingual: bool = True, **facts: Any) -> Path:
    """Model, tokenizer and generation config; `facts` change the latter."""
    from transformers import GenerationConfig

    model, tokenizer = tiny_whisper(multilingual), tiny_tokenizer()
    ids = tokenizer.get_added_vocab()
    known = {
        "alignment_heads": [[0, 1], [1, 0]],
        "is_multilingual": multilingual,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "suppress_tokens": list(range(ids["<|endoftext|>"] + 1, model.config.vocab_size)),
        "max_length": 24,
    }
    if multilingual:
        known["lang_to_id"] = {name: ids[name] for name in ("<|en|>", "<|de|>")}
        known["task_to_id"] = {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(**(known | facts))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
