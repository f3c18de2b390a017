"""Writes an HTML page of synthesized sentences, each with its prompt and the judge's transcript.

    python recipes/tools/listening_page.py judged=out/small/judged out=out/small/listen.html

`judged` is the folder of recipes/judge_voice.py. The page embeds its audio (Ogg Opus). The
sentences are evenly spaced over the list, not picked.
"""

import base64
import html
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from codec import read_audio, write_audio
from codec.audio import audio_tags
from codec.config import at_least
from codec.io import atomic_file
from codec.json_lines import read_json_lines
from codec.program import counted
from recipes.lib.run import finished, load_config, run_recipe
from recipes.scoring.judges import safe_name

SAMPLE_RATE = 16_000
COLUMNS = ("text", "prompt", "synthesized", "transcript", "WER", "speaker similarity")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.4 sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid #ccc; padding: .5rem; text-align: left; vertical-align: top }}
audio {{ width: 11rem }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<table>
<tr>{head}</tr>
{rows}
</table>
</html>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageConfig:
    """The page and its source."""

    judged: Path = Path("out/small/judged")
    """The folder of recipes/judge_voice.py."""
    setting: str = "given"
    """Setting of sampling (judge_voice.py's `compare`)."""
    list: str = "cross"
    """List of items: cross or continuation."""
    num_items: int = 20
    """Maximum number of sentences."""
    title: str = "Zero-shot speech"
    """The heading."""
    out: Path = Path("out/small/listen.html")
    """File of the page."""

    def __post_init__(self) -> None:
        at_least(1, num_items=self.num_items)


def main(argv: list[str]) -> None:
    """Writes the page."""
    config = load_config(PageConfig, argv, __doc__ or "")
    records = read_records(config)
    places = (
        np.linspace(0, len(records) - 1, min(config.num_items, len(records))).round().astype(int)
    )
    chosen = [records[place] for place in places]
    rows = [row_of(line, config) for line in tqdm(chosen, desc="sentences", unit="item")]
    words = [len(line["text"].split()) for line in chosen]
    wer = sum(line["wer"] * count for line, count in zip(chosen, words, strict=True)) / sum(words)
    about = (
        f"{len(chosen)} of {len(records)} sentences of the list `{config.list}`, setting "
        f"`{config.setting}`, spread evenly over it, not picked. WER of these, weighted by their "
        f"words: {100 * wer:.1f} %. Speaker similarity: cosine of speaker embeddings of the prompt "
        "and the synthesized speech."
    )
    page = PAGE.format(
        title=html.escape(config.title), about=html.escape(about),
        head="".join(f"<th>{name}</th>" for name in COLUMNS), rows="\n".join(rows),
    )  # fmt: skip
    with atomic_file(config.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(json.dumps({"page": str(config.out), "sentences": len(chosen), "wer": round(wer, 4)}))
    finished(f"a page of {counted(len(chosen), 'sentence')}", config.out, f"xdg-open {config.out}")


def read_records(config: PageConfig) -> Sequence[Mapping[str, Any]]:
    """Returns the records of the setting and the list.

    Raises:
        ValueError: there are none, or they have no WER.
    """
    file = config.judged / "results.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; recipes/judge_voice.py writes it")
    found = [line.value for line in read_json_lines(file)]
    lines = [
        line for line in found if (line["setting"], line["list"]) == (config.setting, config.list)
    ]
    if not lines:
        there = sorted({f"{line['setting']}/{line['list']}" for line in found})
        raise ValueError(
            f"{file}: no items of {config.setting}/{config.list}; there is {', '.join(there)}"
        )
    if any(line["wer"] is None for line in lines):
        raise ValueError(f"{file}: has no WER; run judge_voice.py with judge=")
    return lines


def row_of(line: Mapping[str, Any], config: PageConfig) -> str:
    """Returns a sentence as a row of the table."""
    audio = config.judged / "audio"
    wave = audio / config.setting / config.list / (line["audio"] or "refused")
    prompt = audio / "prompts" / config.list / f"{safe_name(line['id'])}.wav"
    similarity = line.get("similarity")
    cells = [
        html.escape(line["text"]), sound(prompt), sound(wave), html.escape(line["heard"]),
        f"{100 * line['wer']:.0f} %", "" if similarity is None else f"{similarity:.2f}",
    ]  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def sound(path: Path) -> str:
    """Returns an audio element that embeds a recording with its tags, or "none" if there is no such
    file."""
    if not path.is_file():
        return "none"
    wave = read_audio(path, SAMPLE_RATE, allow_silence=True)
    with tempfile.TemporaryDirectory() as folder:
        write_audio(opus := Path(folder) / "a.opus", wave, SAMPLE_RATE, audio_tags(path))
        held = base64.b64encode(opus.read_bytes()).decode()
    return f'<audio controls preload="none" src="data:audio/ogg;base64,{held}"></audio>'


if __name__ == "__main__":
    run_recipe(main)
