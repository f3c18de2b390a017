"""A voice's AR as a plain causal LM, which transformers loads without this package."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from codec.io import atomic_folder, parse_json
from codec.program import reason_of
from slm.data.interleaving import InterleavedFormat
from slm.data.sequences import asr_context, tts_context
from slm.export.voice_folder import short_path
from slm.models.ar import SpeechLM
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import Vocabulary, encode_texts

logger = logging.getLogger(__name__)

MARK = "export.json"
"""Marks the folder as an export."""
FORMAT_VERSION = 1
SAMPLES = ("Good morning.", "It is 5 o'clock, isn't it?", " two  spaces ", "caf\u00e9")
"""Texts of `as_layouts`."""


def export(lm: SpeechLM, folder: str | Path) -> None:
    """Writes the AR as a causal LM, atomically: weights (adapters merged, a tied head tied), a
    tokenizer with a token for every row of the table, and a card.

    Raises:
        ValueError: for a folder with other contents, and a tokenizer that cannot be extended.
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


def load_export(folder: str | Path) -> SpeechLM:
    """Returns an exported LLM with its forms of text and speech, for `slm.generation.asr`.

    Raises:
        ValueError: the folder is no export.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / MARK).is_file():
        raise ValueError(f"{folder}: is no LLM that `slm export` wrote ({MARK} is missing)")
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        text_tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: cannot be loaded ({reason_of(error)[:300]})") from error
    tokenizer = SpeechTextTokenizer.load(folder, text_tokenizer)
    origin = {**parse_json((folder / MARK).read_text())["base"], "adapter": False}
    return SpeechLM(lm.eval(), tokenizer, origin)


def _base(lm: SpeechLM) -> dict[str, Any]:
    name = short_path(lm.origin["name"])
    return {"name": name, **{key: lm.origin[key] for key in ("digest", "num_layers")}}


def check_free(folder: Path) -> None:
    """Raises ValueError for a folder that an export must not replace."""
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ValueError(f"{folder}: contains other files than an export; name a new folder")


def extended(tokenizer: Any, vocabulary: Vocabulary) -> Any:
    """A copy of the tokenizer with tokens for all ids; texts are encoded as before."""
    from copy import deepcopy

    from transformers import AddedToken

    vocabulary.check_free(tokenizer)
    copy, names = deepcopy(tokenizer), vocabulary.new_tokens()
    # Speech stays visible when special tokens are skipped in decoding, as servers do by default.
    copy.add_tokens(
        [
            AddedToken(name, normalized=False, special=re.match(r"<\|s_", name) is None)
            for name in names
        ]
    )
    ids = copy.convert_tokens_to_ids(names)
    if ids != list(range(vocabulary.num_text, vocabulary.size)):
        raise ValueError("the LLM's tokenizer numbers new tokens in another way than its table")
    return copy


def as_layouts(exported: Any, lm: SpeechLM) -> bool:
    """Whether the tokenizer encodes a prompt's string as our layouts have it; warns if not."""
    vocabulary, tokenizer = lm.vocabulary, lm.tokenizer
    if tokenizer.text.tts_form == "characters":
        return False
    speech = [vocabulary.first_speech, vocabulary.size - 1]
    for text in SAMPLES:
        (ids,) = encode_texts(tokenizer.text_tokenizer, [text])
        codes = f"<|s_0|><|s_{speech[1] - speech[0]}|>"
        pairs = (
            (f"<|text|>{text}<|speech|>{codes}", tts_context(vocabulary, ids, speech)),
            (f"<|speech|>{codes}<|/speech|><|text|>", asr_context(vocabulary, speech)),
        )
        for written, layout in pairs:
            if exported(written, add_special_tokens=False)["input_ids"] != layout:
                logger.warning(
                    "this tokenizer encodes %r in another way after <|text|> than alone; the card "
                    "shows how to build prompts from ids",
                    text,
                )
                return False
    return True


def export_card(lm: SpeechLM, exact: bool) -> str:
    """README.md of an exported LLM: token ids, layouts and examples.

    Args:
        exact: the tokenizer encodes a prompt's string as our layouts have it.
    """
    vocabulary, text = lm.vocabulary, lm.tokenizer.text
    end = vocabulary.specials[-1]
    if vocabulary.text_eos is not None:
        end = lm.tokenizer.text_tokenizer.convert_ids_to_tokens(vocabulary.eos)
    notes = []
    if text.normalize:
        notes.append("Numbers and abbreviations of a TTS text are expanded.")
    if text.tts_form == "phonemes":
        notes.append("A TTS text is IPA, as written by espeak.")
    if text.tts_form == "characters":
        notes.append("A TTS text has the tokens of its single characters.")
    if lm.tokenizer.writes_bytes:
        notes.append("A transcript has the tokens of its characters' bytes.")
    if vocabulary.num_merges:
        notes.append(
            f"`<|s_{vocabulary.codebook_size}|>` and later ids stand for several codes each: see "
            "`units.model` (SentencePiece)."
        )
    parts = 'list("red hen the cat")' if text.tts_form == "characters" else '["red hen the cat"]'
    made = lm.tokenizer.speech_range("tts")
    values = {
        "name": short_path(lm.origin["name"]),
        "codec": f"`{short_path(vocabulary.codec.id)}` (digest {vocabulary.codec.digest})",
        "text": vocabulary.text,
        "speech": vocabulary.speech,
        "speech_end": vocabulary.speech_end,
        "first": vocabulary.first_speech,
        "stop": made.stop,
        "written": lm.tokenizer.text_range("asr").start,
        "written_stop": lm.tokenizer.text_range("asr").stop,
        "eos": vocabulary.eos,
        "end": end,
        "parts": parts,
    }
    rows = [
        (f"0 .. {vocabulary.num_text - 1}", "text, as before"),
        *((str(vocabulary.text_size + i), f"`{n}`") for i, n in enumerate(vocabulary.specials)),
        (
            f"{vocabulary.first_speech} .. {vocabulary.size - 1}",
            f"speech, `<|s_0|>` .. `<|s_{vocabulary.num_pieces - 1}|>`",
        ),
    ]
    values |= {
        "rows": "\n".join(f"| {ids} | {what} |" for ids, what in rows),
        "notes": "".join(f" {note}" for note in notes),
    }
    if isinstance(lm.format, InterleavedFormat):
        spelled = "list(text)" if text.tts_form == "characters" else "[text]"
        return _EXPORT_HEAD.format(**values) + _INTERLEAVED_CARD.format(**values, spelled=spelled)
    prompt = (_TTS_AS_STRING if exact else _TTS_AS_IDS).format(**values)
    recording = (_ASR_AS_STRING if exact else _ASR_AS_IDS).format(**values)
    rest = _EXPORT_CARD.format(**values, prompt=prompt, recording=recording)
    return _EXPORT_HEAD.format(**values) + rest


_TTS_AS_STRING = """\
# prompt: "red hen" with the codes 3 1 4; target: "the cat"
prompt = "<|text|>red hen the cat<|speech|><|s_3|><|s_1|><|s_4|>"
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
"""
_TTS_AS_IDS = """\
# prompt: "red hen" with the codes 3 1 4; target: "the cat"
text = tokenizer({parts}, add_special_tokens=False).input_ids
ids = [{text}, *sum(text, []), {speech}, *({first} + code for code in (3, 1, 4))]
ids = torch.tensor([ids])
"""
_ASR_AS_STRING = """\
prompt = "<|speech|><|s_3|><|s_1|><|s_4|><|/speech|><|text|>"
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
"""
_ASR_AS_IDS = """\
ids = [{speech}, *({first} + code for code in (3, 1, 4)), {speech_end}, {text}]
ids = torch.tensor([ids])
"""
_EXPORT_HEAD = """\
---
library_name: transformers
tags: [text-to-speech, automatic-speech-recognition]
---
# {name} with speech

A causal LM trained on text and on codebook 1 of the codec {codec}.
The other codebooks and waves need the Parlance voice that this was exported from.

| ids | |
|---|---|
{rows}
"""
_EXPORT_CARD = """
    tts            <|text|>PROMPT'S TEXT AND NEW TEXT<|speech|>PROMPT'S CODES   up to <|/speech|>
    asr            <|speech|>CODES<|/speech|><|text|>                           up to {end}
    continuation   <|speech|>CODES                                              up to <|/speech|>

Encode strings with `add_special_tokens=False`.{notes}

Text ids and speech ids never competed in training, so restrict sampling to speech ids and
`<|/speech|>` in TTS and continuation, and to text ids and their end in ASR: with `suppress_tokens`
of `generate`, as below, or with `allowed_token_ids` of vLLM.

```python
import re
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

lm, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
speech = {{*range({first}, {stop}), {speech_end}}}
others = [token for token in range(len(tokenizer)) if token not in speech]
{prompt}options = dict(min_new_tokens=10, max_new_tokens=50, do_sample=True, top_p=0.8, top_k=25)
made = lm.generate(ids, suppress_tokens=others, **options)
string = tokenizer.decode(made[0, ids.shape[1] :])
codes = [int(code) for code in re.findall(r"<\\|s_(\\d+)\\|>", string)]
```

ASR:

```python
text = {{*range({written}, {written_stop}), {eos}}}
others = [token for token in range(len(tokenizer)) if token not in text]
{recording}made = lm.generate(ids, suppress_tokens=others, max_new_tokens=50, do_sample=False)
transcript = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
```
"""
_INTERLEAVED_CARD = """
    tts            <|text|>PROMPT'S TEXT AND NEW TEXT<|speech|>PROMPT'S CODES
                   then for each new word <|/speech|>WORD<|speech|>          up to <|/speech|>
    asr            for each 0.8 s <|speech|>CODES<|text|>, of the last one
                   <|speech|>CODES<|/speech|><|text|>                        up to {end}
    continuation   <|speech|>CODES                                           up to <|/speech|>
{notes}

Text ids and speech ids never competed in training, so restrict sampling to speech ids and
`<|/speech|>` in TTS and continuation, and to text ids and their end in ASR.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

lm, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
def spell(text):
    return sum(tokenizer({spelled}, add_special_tokens=False).input_ids, [])
speech = {{*range({first}, {stop}), {speech_end}}}
others = [token for token in range(len(tokenizer)) if token not in speech]
# prompt: "red hen" with the codes 3 1 4; target: "the cat"
ids = [{text}, *spell("red hen the cat"), {speech}, *({first} + code for code in (3, 1, 4))]
options = dict(suppress_tokens=others, eos_token_id={speech_end}, do_sample=True, top_p=0.8)
codes = []
for word in ("the", "cat"):
    ids += [{speech_end}, *spell(word), {speech}]
    made = lm.generate(torch.tensor([ids]), min_new_tokens=2, max_new_tokens=25, **options)
    new = [token for token in made[0, len(ids) :].tolist() if token != {speech_end}]
    ids += new
    codes += [token - {first} for token in new]
```

ASR, two segments of speech:

```python
text = {{*range({written}, {written_stop}), {eos}}}
others = [token for token in range(len(tokenizer)) if token not in text]
ids, transcript = [], []
for segment, end in (((3, 1, 4), []), ((1, 5), [{speech_end}])):
    ids += [{speech}, *({first} + code for code in segment), *end, {text}]
    options = dict(suppress_tokens=others, eos_token_id={eos}, do_sample=False)
    made = lm.generate(torch.tensor([ids]), max_new_tokens=50, **options)
    written = [token for token in made[0, len(ids) :].tolist() if token != {eos}]
    ids += [*written, {eos}]
    transcript += written
transcript = tokenizer.decode(transcript)
```
"""
