"""A voice's AR as a plain causal LM, which transformers loads without this package."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from codec.io import atomic_folder
from slm.data.sequences import asr_context, tts_context
from slm.export.voice_folder import export_card, short_path
from slm.models.ar import SpeechLM
from slm.tokenization.vocabulary import Vocabulary, encode_texts

logger = logging.getLogger(__name__)

MARK = "export.json"
"""What tells an export from another folder."""
FORMAT_VERSION = 1
SAMPLES = ("Good morning.", "It is 5 o'clock, isn't it?", " two  spaces ", "caf\u00e9")
"""Texts whose tokens in a prompt are compared with those of the layouts."""


def export(lm: SpeechLM, folder: str | Path) -> None:
    """Writes weights (adapters merged, a tied head tied), a tokenizer that has a token for every
    row of the table, and a card. The folder is whole, or as it was.

    Raises ValueError for a folder that holds something else, and for a tokenizer that cannot be
    extended so.
    """
    from transformers import GenerationConfig

    folder = Path(folder)
    check_free(folder)
    vocabulary = lm.vocabulary
    tokenizer = extended(lm.tokenizer.text_tokenizer, vocabulary)
    kept = lm.lm.generation_config
    try:
        lm.lm.generation_config = GenerationConfig(
            eos_token_id=[vocabulary.eos, vocabulary.speech_end],
            bos_token_id=kept.bos_token_id,
            pad_token_id=vocabulary.eos if kept.pad_token_id is None else kept.pad_token_id,
        )
        with atomic_folder(folder) as partial:
            lm.lm.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            lm.tokenizer.save(partial)
            exact = as_layouts(tokenizer, lm)
            (partial / "README.md").write_text(export_card(lm, exact), encoding="utf-8")
            (partial / MARK).write_text(json.dumps({"format": FORMAT_VERSION, "base": _base(lm)}))
    finally:
        lm.lm.generation_config = kept


def _base(lm: SpeechLM) -> dict[str, Any]:
    name = short_path(lm.origin["name"])
    return {"name": name, **{key: lm.origin[key] for key in ("digest", "num_layers")}}


def check_free(folder: Path) -> None:
    """Raises ValueError for a place that an export must not take."""
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ValueError(f"{folder}: holds something else than an export; name a new folder")


def token_names(vocabulary: Vocabulary) -> list[str]:
    """The names of all ids that the LLM's tokenizer does not know, in their order: rows that only
    pad its table, the specials, and speech: <|s_0|>, <|s_1|>, ... codes of codebook 1 first, merges
    behind them."""
    padding = [f"<|unused_{row}|>" for row in range(vocabulary.num_text, vocabulary.text_size)]
    speech = [f"<|s_{number}|>" for number in range(vocabulary.size - vocabulary.first_speech)]
    return [*padding, *vocabulary.specials, *speech]


def extended(tokenizer: Any, vocabulary: Vocabulary) -> Any:
    """A copy of the tokenizer that knows every id. Old text has its old tokens."""
    from copy import deepcopy

    from transformers import AddedToken

    made, names = deepcopy(tokenizer), token_names(vocabulary)
    known = made.get_vocab()
    if taken := [name for name in names if name in known]:
        raise ValueError(
            f"the LLM's tokenizer has a token {taken[0]} of its own; export a voice of another LLM"
        )
    # Speech stays visible when special tokens are skipped in decoding, as servers do by default.
    made.add_tokens(
        [
            AddedToken(name, normalized=False, special=re.match(r"<\|s_", name) is None)
            for name in names
        ]
    )
    ids = made.convert_tokens_to_ids(names)
    if ids != list(range(vocabulary.num_text, vocabulary.size)):
        raise ValueError("the LLM's tokenizer numbers new tokens otherwise than its table")
    return made


def as_layouts(exported: Any, lm: SpeechLM) -> bool:
    """Whether a prompt's string has the very tokens of our layouts; logs where it has not."""
    vocabulary, tokenizer = lm.vocabulary, lm.tokenizer
    if tokenizer.text.tts_form == "characters":
        return False
    speech = [vocabulary.first_speech, vocabulary.size - 1]
    for text in SAMPLES:
        (ids,) = encode_texts(tokenizer.text_tokenizer, [text])
        spoken = f"<|s_0|><|s_{speech[1] - speech[0]}|>"
        pairs = (
            (f"<|text|>{text}<|speech|>{spoken}", tts_context(vocabulary, ids, speech)),
            (f"<|speech|>{spoken}<|/speech|><|text|>", asr_context(vocabulary, speech)),
        )
        for written, layout in pairs:
            if exported(written, add_special_tokens=False)["input_ids"] != layout:
                logger.warning(
                    "this tokenizer reads %r otherwise behind <|text|> than alone; the card says "
                    "how to make prompts of ids",
                    text,
                )
                return False
    return True
