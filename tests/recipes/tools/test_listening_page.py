"""recipes/tools/listening_page.py."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
import soundfile
from conftest import voiced

from codec import write_audio
from recipes.tools.listening_page import main


@pytest.fixture
def judged(tmp_path: Path, write_wav) -> Path:
    folder, lines = tmp_path / "judged", []
    for number in range(6):
        name = f"item-{number}.wav"
        write_wav(folder / "audio" / "prompts" / "cross" / name, 0.5, seed=number)
        wave, tags = voiced(0.5, seed=number), {"comment": "synthetic speech"}
        write_audio(folder / "audio" / "given" / "cross" / name, wave, 16_000, tags)
        lines.append({
            "setting": "given", "list": "cross", "id": f"item-{number}", "audio": name,
            "text": f"say <{number}> & go", "heard": "say it & go", "wer": number / 10,
            "similarity": None if number == 5 else 0.9,
        })  # fmt: skip
    lines.append({**lines[0], "list": "continuation", "text": "not this one"})
    folder.joinpath("results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_page_embeds_audio_of_evenly_spaced_items(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (judged / "audio" / "prompts" / "cross" / "item-2.wav").unlink()
    out = tmp_path / "page.html"
    main([f"judged={judged}", f"out={out}", "num_items=3", "title=A & B"])
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed == {"page": str(out), "sentences": 3, "wer": pytest.approx(0.2333, abs=1e-3)}
    page = out.read_text(encoding="utf-8")
    assert "<h1>A &amp; B</h1>" in page
    assert "3 of 6 sentences" in page
    # Spread over the list: the first, one in the middle, the last.
    assert re.findall(r"say &lt;(\d)&gt; &amp; go", page) == ["0", "2", "5"]
    assert "not this one" not in page
    assert "<td>none</td>" in page
    held = re.findall(r'src="data:audio/ogg;base64,([^"]+)"', page)
    assert len(held) == 5
    for encoded, comment in zip(held, ("", "synthetic speech"), strict=False):
        with soundfile.SoundFile(io.BytesIO(base64.b64decode(encoded))) as file:
            assert file.frames / file.samplerate == pytest.approx(0.5, abs=0.01)
            assert file.comment == comment


def test_refused_item_has_no_audio(judged: Path, tmp_path: Path) -> None:
    file, out = judged / "results.jsonl", tmp_path / "page.html"
    first, *others = map(json.loads, file.read_text().splitlines())
    first |= {"audio": None, "heard": "", "wer": 1.0, "similarity": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))
    main([f"judged={judged}", f"out={out}", "num_items=1"])
    page = out.read_text(encoding="utf-8")
    assert "<td>100 %</td><td></td>" in page
    assert page.count("data:audio") == 1  # Its prompt.
    file.write_text(json.dumps(first | {"wer": None}) + "\n")
    with pytest.raises(ValueError, match="has no WER"):
        main([f"judged={judged}", f"out={out}"])


def test_missing_inputs_are_user_errors(judged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no items of given/long; there is given/continuation, "):
        main([f"judged={judged}", "list=long"])
    with pytest.raises(ValueError, match=r"judge_voice\.py writes it"):
        main([f"judged={tmp_path}"])
    with pytest.raises(ValueError, match="num_items must be at least 1"):
        main([f"judged={judged}", "num_items=0"])
