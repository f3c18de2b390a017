"""A voice's folder, copied whole: models, prompts, settings and card, or nothing.

The cards of a voice's folder, and of an exported LLM's.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codec.io import atomic_file, atomic_folder
from codec.tokens import CodecStamp
from slm.config import SamplingConfig, from_json
from slm.data.sequences import Coverage, Prompt, load_prompts
from slm.models.ar import SpeechLM

logger = logging.getLogger(__name__)


def short_path(path: str) -> str:
    """A path as it was given; of an absolute one the end, as what is shipped must not tell where
    somebody's files lie."""
    given = Path(path)
    return "/".join(given.parts[-2:]).lstrip("/") if given.is_absolute() else given.as_posix()


def voice_card(
    origin: Mapping[str, Any], codec: CodecStamp, coverage: Coverage, prompts: Mapping[str, Prompt]
) -> str:
    """README.md of a voice: what it grew from (`SpeechLM.origin`), what it can do, and what must be
    added by hand."""
    kind = "adapters" if origin["adapter"] else "all weights"
    tasks = [task for task, weight in origin.get("tasks", {}).items() if weight]
    base = short_path(origin["name"])
    shipped = [f"- `{name}`: {prompt.credit or 'no credit'}" for name, prompt in prompts.items()]
    return "\n".join(
        [
            "---",
            "library_name: parlance",
            "tags: [text-to-speech, automatic-speech-recognition]",
            "---",
            f"# A voice grown from {base}",
            "",
            f"- text LLM: `{base}` ({kind} trained)",
            f"- codec: `{short_path(codec.id)}` ({codec.num_codebooks} codebooks, "
            f"{codec.frame_rate:g} Hz)",
            f"- trained on: {', '.join(tasks) or 'not said'}; texts in "
            f"{', '.join(coverage.scripts)}; utterances of at most "
            f"{coverage.longest_frames / codec.frame_rate:.1f} s",
            *([f"- data: {origin['data']}"] if origin.get("data") else []),
            "",
            "    slm tts --voice . --text TEXT --prompt RECORDING --out OUT.wav",
            "    slm asr --voice . RECORDING",
            "",
            *(["Prompts:", "", *shipped, ""] if shipped else []),
            "Name here what it was trained on, with its licences, before you publish it.",
            "",
        ]
    )


def export_card(lm: SpeechLM, exact: bool) -> str:
    """README.md of an exported LLM. `exact`: a prompt's string has the layouts' own tokens."""
    vocabulary, text = lm.vocabulary, lm.tokenizer.text
    end = vocabulary.specials[-1]
    if vocabulary.text_eos is not None:
        end = lm.tokenizer.text_tokenizer.convert_ids_to_tokens(vocabulary.eos)
    notes = []
    if text.normalize:
        notes.append("Numbers and abbreviations in a text that is to be spoken are spelt out.")
    if text.tts_form == "phonemes":
        notes.append("A text that is to be spoken is IPA, as espeak writes it.")
    if text.tts_form == "characters":
        notes.append("A text that is to be spoken has the tokens of its single characters.")
    if lm.tokenizer.writes_bytes:
        notes.append("A transcript has the tokens of its characters' bytes.")
    if vocabulary.num_merges:
        notes.append(
            f"`<|s_{vocabulary.codebook_size}|>` and those behind it are several codes each: "
            "`units.model` (SentencePiece) says which."
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
    if text.interleaved:
        spelt = "list(text)" if text.tts_form == "characters" else "[text]"
        return _EXPORT_HEAD.format(**values) + _BY_WORDS.format(**values, spelt=spelt)
    prompt = (_AS_STRING if exact else _AS_IDS).format(**values)
    recording = (_HEARD_AS_STRING if exact else _HEARD_AS_IDS).format(**values)
    rest = _EXPORT_CARD.format(**values, prompt=prompt, recording=recording)
    return _EXPORT_HEAD.format(**values) + rest


_AS_STRING = """\
# "red hen" is what the codes 3 1 4 say, "the cat" what is to be said in their voice
prompt = "<|text|>red hen the cat<|speech|><|s_3|><|s_1|><|s_4|>"
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
"""
_AS_IDS = """\
# "red hen" is what the codes 3 1 4 say, "the cat" what is to be said in their voice
text = tokenizer({parts}, add_special_tokens=False).input_ids
ids = [{text}, *sum(text, []), {speech}, *({first} + code for code in (3, 1, 4))]
ids = torch.tensor([ids])
"""
_HEARD_AS_STRING = """\
prompt = "<|speech|><|s_3|><|s_1|><|s_4|><|/speech|><|text|>"
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
"""
_HEARD_AS_IDS = """\
ids = [{speech}, *({first} + code for code in (3, 1, 4)), {speech_end}, {text}]
ids = torch.tensor([ids])
"""
_EXPORT_HEAD = """\
---
library_name: transformers
tags: [text-to-speech, automatic-speech-recognition]
---
# {name} with speech

A causal LM that was trained on text and on codebook 1 of the codec {codec}.
Its other codebooks, and waves, take the Parlance voice that this was exported from.

| ids | |
|---|---|
{rows}
"""
_EXPORT_CARD = """
    tts            <|text|>PROMPT'S TEXT AND NEW TEXT<|speech|>PROMPT'S CODES   up to <|/speech|>
    asr            <|speech|>CODES<|/speech|><|text|>                           up to {end}
    continuation   <|speech|>CODES                                              up to <|/speech|>

Strings are tokenised without what a tokenizer adds of itself (`add_special_tokens=False`).{notes}

Text ids and speech ids never competed in training, so draw only from those that can follow: speech
and its end in TTS and continuation, text and its end in ASR. `generate` is told by
`suppress_tokens`, as below; engines that take a list of allowed tokens (vLLM: `allowed_token_ids`)
by the ids that are left.

```python
import re
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

lm, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
speech = {{*range({first}, {stop}), {speech_end}}}
others = [token for token in range(len(tokenizer)) if token not in speech]
{prompt}options = dict(min_new_tokens=10, max_new_tokens=50, do_sample=True, top_p=0.8, top_k=25)
made = lm.generate(ids, suppress_tokens=others, **options)
spoken = tokenizer.decode(made[0, ids.shape[1] :])
codes = [int(code) for code in re.findall(r"<\\|s_(\\d+)\\|>", spoken)]
```

and the other way:

```python
text = {{*range({written}, {written_stop}), {eos}}}
others = [token for token in range(len(tokenizer)) if token not in text]
{recording}made = lm.generate(ids, suppress_tokens=others, max_new_tokens=50, do_sample=False)
heard = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
```
"""
_BY_WORDS = """
    tts            <|text|>PROMPT'S TEXT AND NEW TEXT<|speech|>PROMPT'S CODES
                   then for each new word <|/speech|>WORD<|speech|>          up to <|/speech|>
    asr            for each 0.8 s <|speech|>CODES<|text|>, of the last one
                   <|speech|>CODES<|/speech|><|text|>                        up to {end}
    continuation   <|speech|>CODES                                           up to <|/speech|>
{notes}

Text ids and speech ids never competed in training, so draw only from those that can follow: speech
and its end in TTS and continuation, text and its end in ASR.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

lm, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
def spell(text):
    return sum(tokenizer({spelt}, add_special_tokens=False).input_ids, [])
speech = {{*range({first}, {stop}), {speech_end}}}
others = [token for token in range(len(tokenizer)) if token not in speech]
# "red hen" is what the codes 3 1 4 say, "the cat" what is to be said in their voice
ids = [{text}, *spell("red hen the cat"), {speech}, *({first} + code for code in (3, 1, 4))]
options = dict(suppress_tokens=others, eos_token_id={speech_end}, do_sample=True, top_p=0.8)
codes = []
for word in ("the", "cat"):
    ids += [{speech_end}, *spell(word), {speech}]
    made = lm.generate(torch.tensor([ids]), min_new_tokens=2, max_new_tokens=25, **options)
    said = [token for token in made[0, len(ids) :].tolist() if token != {speech_end}]
    ids += said
    codes += [token - {first} for token in said]
```

and the other way, two stretches of speech:

```python
text = {{*range({written}, {written_stop}), {eos}}}
others = [token for token in range(len(tokenizer)) if token not in text]
ids, heard = [], []
for stretch, end in (((3, 1, 4), []), ((1, 5), [{speech_end}])):
    ids += [{speech}, *({first} + code for code in stretch), *end, {text}]
    options = dict(suppress_tokens=others, eos_token_id={eos}, do_sample=False)
    made = lm.generate(torch.tensor([ids]), max_new_tokens=50, **options)
    written = [token for token in made[0, len(ids) :].tolist() if token != {eos}]
    ids += [*written, {eos}]
    heard += written
heard = tokenizer.decode(heard)
```
"""


SAMPLING_FILE = "sampling.json"


def is_voice(folder: Path) -> bool:
    """Whether there are a codec and an LLM."""
    return (folder / "codec").is_dir() and (folder / "ar").is_dir()


def load_sampling(folder: Path) -> SamplingConfig | None:
    """How a saved voice is to speak; None where its folder does not say."""
    path = folder / SAMPLING_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        return from_json(SamplingConfig, record)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no settings of sampling ({error}); mend it, or remove it for the defaults"
        ) from error


def ship(source: Path, folder: Path, finish: Callable[[Path], None]) -> None:
    """Copies a voice's folder to `folder`, which is an earlier voice or not there yet, or leaves it
    in its place; `finish` adds to it."""
    source, folder = source.resolve(), folder.resolve()
    if folder == source:
        finish(folder)
        return
    if folder in source.parents or source in folder.parents:
        raise ValueError(f"{folder}: one of it and the voice {source} is in the other; save apart")
    if folder.exists() and not is_voice(folder) and not _is_empty(folder):
        raise ValueError(f"{folder}: neither empty nor a voice; name a new folder")
    with atomic_folder(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        finish(partial)


def write_extras(
    folder: Path,
    lm: SpeechLM,
    coverage: Coverage,
    prompts: Mapping[str, Prompt],
    sampling: SamplingConfig,
) -> None:
    """Writes what is not a model. A card that a person has edited stays as it is."""
    # As the training's card has it: the codec in the folder is called by the folder's name.
    origin, stamp = lm.origin, lm.vocabulary.codec
    before = voice_card(origin, stamp, coverage, load_prompts(folder / "prompts"))
    after = voice_card(origin, stamp, coverage, dict(sorted(prompts.items())))
    for name, prompt in prompts.items():
        prompt.save(folder / "prompts", name)
    with atomic_file(folder / SAMPLING_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(sampling), indent=1), encoding="utf-8")
    card = folder / "README.md"
    if card.exists() and card.read_text(encoding="utf-8") != before:
        if before != after:
            logger.warning("%s: it was edited and stays; it lacks the prompts that are new", card)
        return
    with atomic_file(card) as temporary:
        temporary.write_text(after, encoding="utf-8")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
