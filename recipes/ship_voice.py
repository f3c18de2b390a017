"""Compresses a trained voice: low-rank adapters, half precision, few prompts.

    python recipes/ship_voice.py voice=out/small/tts/voice prompts=my-prompts.jsonl out=models/small

A fully fine-tuned AR becomes LoRA adapters (truncated SVD) and embedding rows of its LLM
(slm/models/lora.py); a lower rank makes a smaller folder and a larger error. The codec must have
been rounded (`codec halve`) before its tokens were exported: rounding changes its codes. Each line
of `prompts` is a JSON object with name, audio, text and credit. Prints the sizes as one JSON line.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from codec import Codec
from codec.config import at_least
from codec.io import apply_umask, atomic_folder, check_id
from codec.json_lines import read_json_lines
from codec.models.codec import is_half_precision, save_half_precision
from recipes.lib.run import finished, load_config, run_recipe
from slm.data.coverage import Coverage
from slm.data.prompts import Prompt
from slm.export.voice_folder import is_voice, short_path, write_extras
from slm.models.lora import as_adapters
from slm.tokenization.vocabulary import Vocabulary
from slm.voice import Voice

MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ShipConfig:
    """A voice to ship."""

    voice: Path = Path("out/small/tts/voice")
    """Folder of the trained voice."""
    base: str = "models/smollm2-135m-instruct"
    """Its text LLM: folder or hub id."""
    out: Path = Path("out/small/shipped")
    """Folder to write; an earlier voice there is replaced, except for its cards."""
    rank: int = 128
    """Rank of the adapters."""
    prompts: Path | None = None
    """JSON Lines file of the prompts to ship; null: those of the voice."""

    def __post_init__(self) -> None:
        at_least(1, rank=self.rank)


def main(argv: list[str]) -> None:
    """Compresses a voice."""
    config = load_config(ShipConfig, argv, __doc__ or "")
    if config.out.exists() and not is_voice(config.out) and any(config.out.iterdir()):
        raise ValueError(f"{config.out}: neither empty nor a voice; choose a new folder")
    codec = Codec.from_pretrained(config.voice / "codec")
    if not is_half_precision(codec):
        raise ValueError(
            f"{config.voice / 'codec'}: is not in half precision; run `codec halve`, export the "
            "tokens with its result and train on them, because rounding changes the codes"
        )
    voice = Voice.from_pretrained(config.voice)
    prompts = voice.prompts if config.prompts is None else read_prompts(voice, config.prompts)
    coverage = Coverage.load(config.voice / "ar")
    with atomic_folder(config.out) as folder:
        save_half_precision(codec, folder / "codec")
        lm = voice.lm
        if lm.origin["adapter"]:
            shutil.copytree(config.voice / "ar", folder / "ar")
            lm.save_origin(folder / "ar", loaded_from=config.voice / "ar")
        else:
            lm = as_adapters(lm, config.base, config.rank, coverage)
            lm.save(folder / "ar")
        for pattern in ("tokenizer*", "chat_template.jinja", "special_tokens_map.json"):
            for file in (folder / "ar").glob(pattern):
                file.unlink()  # The LLM's folder has them.
        halve_file(folder / "ar" / "adapter_model.safetensors")
        vocabulary = Vocabulary.load(folder / "ar")
        stamp = replace(vocabulary.codec, id=short_path(vocabulary.codec.id))
        replace(vocabulary, codec=stamp).save(folder / "ar")  # Without absolute paths.
        coverage.save(folder / "ar")
        if voice.nar is not None:
            voice.nar.save_pretrained(folder / "nar")
            (folder / "nar" / "README.md").unlink(missing_ok=True)
            halve_file(folder / "nar" / "model.safetensors")
        for card in ("README.md", "codec/README.md", "nar/README.md"):
            if (config.out / card).is_file() and (folder / card).parent.is_dir():
                shutil.copy(config.out / card, folder / card)
        write_extras(folder, lm, coverage, prompts, voice.sampling)
        Voice.from_pretrained(folder)  # An error here keeps the earlier voice.
    sizes = {
        str(file.relative_to(config.out)): round(file.stat().st_size / MEGABYTE, 2)
        for file in sorted(config.out.rglob("*"))
        if file.is_file() and file.stat().st_size > MEGABYTE / 10
    }
    total = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(json.dumps({"out": str(config.out), "mb": round(total / MEGABYTE, 2), "files": sizes}))
    name = next(iter(prompts), "RECORDING.wav")
    finished(
        f"voice of {total / MEGABYTE:.0f} MB", config.out,
        f"slm tts --voice {config.out} --text TEXT --prompt {name} --out OUT.wav",
    )  # fmt: skip


def read_prompts(voice: Voice, path: Path) -> dict[str, Prompt]:
    """Returns the prompts of a JSON Lines file.

    Args:
        path: each line has name, audio (relative to the file), text and credit.

    Raises:
        ValueError: a line is invalid, or a recording cannot be used.
    """
    prompts = {}
    for number, record, _ in read_json_lines(path):
        try:
            name, audio, text, credit = (record[key] for key in ("name", "audio", "text", "credit"))
            check_id(name, ".json")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: needs name, audio, text and credit ({error})"
            ) from error
        made = voice.prompt(path.parent / audio, text)
        prompts[name] = Prompt(codes=made.codes, text=made.text, credit=credit)
    return prompts


def halve_file(path: Path) -> None:
    """Rounds the tensors of a safetensors file to float16, in place."""
    tensors = load_file(path)
    save_file(
        {name: each.to(torch.float16).contiguous() for name, each in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    apply_umask(path)


if __name__ == "__main__":
    run_recipe(main)
