"""The cards of a voice's folder, and of an exported LLM's."""

from collections.abc import Mapping

from slm.ar import SpeechLM
from slm.prompts import Prompt
from slm.speaking import Models


def voice_card(models: Models, prompts: Mapping[str, Prompt]) -> str:
    """README.md of a voice: what it grew from, what it can do, and what must be added by hand."""
    origin, codec = models.lm.origin, models.lm.vocabulary.codec
    kind = "adapters" if origin["adapter"] else "all weights"
    tasks = [task for task, weight in origin.get("tasks", {}).items() if weight]
    coverage = models.coverage
    shipped = [f"- `{name}`: {prompt.credit or 'no credit'}" for name, prompt in prompts.items()]
    return "\n".join(
        [
            "---",
            "library_name: parlance",
            "tags: [text-to-speech, automatic-speech-recognition]",
            "---",
            f"# A voice grown from {origin['name']}",
            "",
            f"- text LLM: `{origin['name']}` ({kind} trained)",
            f"- codec: `{codec.id}` ({codec.num_codebooks} codebooks, {codec.frame_rate:g} Hz)",
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
    vocabulary, text = lm.vocabulary, lm.alphabet.text
    encode = "tokenizer(prompt, add_special_tokens=False, return_tensors='pt').input_ids"
    notes = []
    if lm.alphabet.text.normalize:
        notes.append("Spell numbers and abbreviations out in a text that is to be spoken.")
    if text.spoken == "phonemes":
        notes.append("A text that is to be spoken is IPA, as `espeak` writes it for English.")
    if not exact:
        encode = (
            "torch.tensor([[i for part in re.split(r'(<\\|.*?\\|>)', prompt) for i in ids(part)]])"
        )
        notes.append("A text's tokens are those that `ids` below makes, not those of the string.")
    if vocabulary.num_merges:
        notes.append(
            f"`<|s_{vocabulary.codebook_size}|>` and those behind it stand for several codes each: "
            "`units.model` (SentencePiece) says for which."
        )
    example = _EXAMPLE.format(encode=encode)
    if not exact:
        example = example.replace("prompt = ", _IDS[text.spoken] + "prompt = ", 1)
    return _EXPORT_CARD.format(
        name=lm.origin["name"],
        num_text=vocabulary.num_text,
        specials=", ".join(
            f"{vocabulary.text_size + number} `{name}`"
            for number, name in enumerate(vocabulary.specials)
        ),
        first=vocabulary.first_speech,
        last=vocabulary.size - 1,
        most=vocabulary.size - 1 - vocabulary.first_speech,
        codec=f"`{vocabulary.codec.id}` (digest {vocabulary.codec.digest})",
        eos=lm.alphabet.tokenizer.convert_ids_to_tokens(vocabulary.eos)
        if vocabulary.text_eos is not None
        else vocabulary.specials[-1],
        notes="".join(f"\n{note}" for note in notes) + ("\n" if notes else ""),
        example=example,
    )


_IDS = {
    "characters": (
        "def ids(text):  # Special tokens have one id, other text those of its characters.\n"
        "    parts = [text] if text.startswith('<|') else list(text)\n"
        "    return [i for p in parts for i in tokenizer(p, add_special_tokens=False).input_ids]\n"
    )
}
_IDS["tokens"] = _IDS["phonemes"] = (
    _IDS["characters"]
    .replace("those of its characters", "its own")
    .replace(
        "    parts = [text] if text.startswith('<|') else list(text)\n", "    parts = [text]\n"
    )
)

_EXAMPLE = """\
import re
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

lm, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
prompt = "<|text|>red hen the cat<|speech|><|s_3|><|s_1|><|s_4|>"  # "red hen" is what 3 1 4 says
made = lm.generate({encode}, max_new_tokens=50, do_sample=True)[0]
spoken = tokenizer.decode(made).split("<|speech|>")[1]
codes = [int(code) for code in re.findall(r"<\\|s_(\\d+)\\|>", spoken)]  # with the prompt's own
"""
_EXPORT_CARD = """\
---
library_name: transformers
tags: [text-to-speech, automatic-speech-recognition]
---
# {name} with speech

A causal LM that Parlance trained on text and codebook 1 of the codec {codec}. The other codebooks and
waves are not its affair: they take the voice that it was exported from.

| ids | |
|---|---|
| 0 .. {num_text} | text, as before |
| {specials} | specials |
| {first} .. {last} | speech: `<|s_0|>` .. `<|s_{most}|>` |

    tts            <|text|>PROMPT'S TEXT TEXT<|speech|>PROMPT'S CODES   goes on to <|/speech|>
    asr            <|speech|>CODES<|/speech|><|text|>                   goes on to {eos}
    continuation   <|speech|>CODES                                      goes on to <|/speech|>

A prompt's string is tokenised without the tokenizer's own beginning (`add_special_tokens=False`).
{notes}
```python
{example}```
"""
