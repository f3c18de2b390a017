"""slm/batch_vc.py: lists of conversions, resumed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from codec.json_lines import read_json_lines, write_json_lines
from slm.batch_vc import convert_list, read_vc_list
from slm.voice import Voice


class FakeVoice(Voice):
    """Converts anything but "bad.wav"; counts its calls."""

    digest = "0123"
    sampling = None

    def __init__(self) -> None:
        self.prompts = {"anna": None}
        self.calls: list[tuple] = []

    def convert(self, source: Path, target: Path | str, *texts: str | None) -> SimpleNamespace:
        if source.name == "bad.wav":
            raise ValueError(f"{source}: is silent")
        self.calls.append((source.name, str(target).rpartition("/")[2], *texts))
        failure = "empty" if target == "anna" else None
        return SimpleNamespace(wave=np.zeros(8), text="t", prompt_text="p", failure=failure)

    def save(self, _speech: SimpleNamespace, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"wave")


def test_a_list_is_converted_and_resumed(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav", "bad.wav"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [
        {"id": "1", "source": "a.wav", "target": "b.wav", "source_text": "hello"},
        {"id": "x/2", "source": "b.wav", "target": "anna"},
        {"id": "3", "source": "bad.wav", "target": "a.wav"},
    ]
    write_json_lines(tmp_path / "l.jsonl", lines)
    voice, out = FakeVoice(), tmp_path / "out"

    def run() -> int:
        voice.calls.clear()
        return convert_list(voice, read_vc_list(tmp_path / "l.jsonl"), tmp_path, out)

    assert run() == 2
    assert voice.calls == [("a.wav", "b.wav", "hello", None), ("b.wav", "anna", None, None)]
    records = [line.value for line in read_json_lines(out / "results.jsonl")]
    assert [one["audio"] for one in records] == ["1.wav", "x/2.wav", None]
    assert [one["failure"] for one in records] == [None, "empty", "refused"]
    assert records[2]["reason"].endswith("bad.wav: is silent")
    assert run() == 2
    assert not voice.calls
    (out / "1.wav").unlink()
    (tmp_path / "b.wav").write_bytes(b"another")
    run()
    assert [call[0] for call in voice.calls] == ["a.wav", "b.wav"]
    assert [line.value["id"] for line in read_json_lines(out / "results.jsonl")] == [
        "1",
        "x/2",
        "3",
    ]
    write_json_lines(tmp_path / "l.jsonl", lines[2:])
    with pytest.raises(ValueError, match=r"no line is usable; 3: .*is silent"):
        run()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the list is empty"),
        ([{"id": "a", "source": "s"}], "line 1: target is missing"),
        ([{"id": "a", "source": "s", "target": 3}], "line 1: target must be a string, got 3"),
        (2 * [{"id": "a", "source": "s", "target": "t"}], "line 2: the id 'a' comes twice"),
    ],
)
def test_bad_lists_of_conversions(tmp_path: Path, lines: list[dict], message: str) -> None:
    write_json_lines(tmp_path / "l.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        read_vc_list(tmp_path / "l.jsonl")
