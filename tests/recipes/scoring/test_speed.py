"""recipes/scoring/speed.py."""

from pathlib import Path

import pytest
import torch
from tiny_baselines import ENCODEC, save_baseline
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoConfig

from codec import load_codec
from eval.benchmark import Row
from recipes.benchmark import main, parse_arguments
from recipes.scoring import speed
from recipes.scoring.rows import read_rows

FILE = """codec:
  {family: seanet, seanet: {num_filters: 2, dimension: 8}, quantizer: {num_codebooks: 2}}
losses: {weights: {adversarial: 1}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slow.yaml"
    path.write_text(FILE)
    return path


def run(tmp_path: Path, *arguments: object) -> list[Row]:
    settings = ["--seconds", "0.3", "--repeats", "3", "--out", str(tmp_path / "out")]
    main(["speed", *settings, *map(str, arguments)])
    return read_rows(tmp_path / "out" / "rows.jsonl")


def test_rows_of_all_kinds_of_codecs_in_order(
    tmp_path, tiny_codec_folder, file, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(speed.PUBLISHED, "encodec", ("tiny/encodec", ENCODEC))
    baseline = save_baseline(tmp_path / "mimi", "mimi")
    rows = run(
        tmp_path, "--random", "encodec", "--codec", baseline, "--unfolded", file,
        "--config", file, "--codec", tiny_codec_folder, "--unfolded", tiny_codec_folder,
        "--codec", tiny_codec_folder, "--codebooks", 3,
        "--codec", f"a={tiny_codec_folder}", "--unfolded", f"b={file}",
    )  # fmt: skip
    tiny = str(tiny_codec_folder)
    names = [
        "tiny/encodec, random weights", str(baseline), "slow, random weights, unfolded",
        "slow, random weights, folded", f"{tiny}, folded", f"{tiny}, unfolded",
        f"{tiny}, folded #2", "a", "b",
    ]  # fmt: skip
    assert list(dict.fromkeys(row.system for row in rows)) == names
    assert {row.part for row in rows} == {"speed"}
    whole = {(row.system, row.metric): row.value for row in rows if row.utterance is None}
    assert [whole[name, "codebooks"] for name in names] == [3, 3, 2, 2, 3, 3, 3, 3, 2]
    printed = capsys.readouterr().out
    assert all(f"| {name} | synthetic voice, 0.3 s | 3 |" in printed for name in names)
    digests = {row.system: row.model for row in rows}
    assert digests[names[4]] == digests[names[5]] == load_codec(tiny_codec_folder).stamp.digest
    assert digests[names[2]] == digests[names[3]], "the same weights, folded or not"
    assert {row.n for row in rows if row.utterance is None} == {3}
    assert all("1 thread(s)" in row.machine and row.git and row.config for row in rows)


def test_ratios_are_medians_of_ratios_per_repeat(tmp_path, tiny_codec_folder, monkeypatch) -> None:
    class Clock:
        """Seconds per reading: the warm-up, then two codecs' encode and decode by turns."""

        script = iter([9.0] * 4 + [1, 2, 3, 4] + [2, 4, 6, 4] + [4, 1, 2, 4])

        def __init__(self, _device: torch.device) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def read(self) -> float:
            return float(next(self.script))

    monkeypatch.setattr(speed, "Stopwatch", Clock)
    rows = run(tmp_path, "--codec", tiny_codec_folder, "--unfolded", tiny_codec_folder)
    value = {(row.system, row.utterance, row.metric): row.value for row in rows}
    first, second = dict.fromkeys(row.system for row in rows)
    repeats = [value[second, f"repeat {number}", "encode_seconds"] for number in (1, 2, 3)]
    assert repeats == [3, 6, 2]
    assert value[second, None, "encode_seconds"] == 3
    assert value[second, None, "encode_rtf"] == pytest.approx(10)
    assert value[second, None, "encode_ratio"] == 3  # Of 3, 3 and 0.5.
    assert value[second, None, "decode_ratio"] == 2  # Of 2, 1 and 4.
    assert value[first, None, "decode_ratio"] == 1


def test_weight_norm_is_folded_as_named(tiny_codec_folder, file) -> None:
    def normed(kind: str, source: object) -> bool:
        _, codec = speed.build(speed.CodecSource(kind, str(source)))
        assert not codec.training
        return any(is_parametrized(module, "weight") for module in codec.modules())

    assert not normed("config", file)
    assert normed("unfolded", file)
    assert not normed("codec", tiny_codec_folder)


def test_recording_is_truncated_and_a_short_one_refused(
    tmp_path, tiny_codec_folder, write_wav
) -> None:
    wave = write_wav(tmp_path / "hello.wav", 0.4)
    rows = run(tmp_path, "--codec", tiny_codec_folder, "--wave", wave)
    assert {row.list for row in rows} == {"hello.wav, 0.3 s"}
    args = parse_arguments(
        ["speed", "--wave", str(wave), "--seconds", "0.3", "--out", str(tmp_path)]
    )
    assert speed.speech(args, 24_000).shape == (7200,)
    args.wave = None
    assert speed.speech(args, 16_000).shape == (4800,)
    with pytest.raises(ValueError, match=r"lasts 0\.40 s"):
        run(tmp_path, "--codec", tiny_codec_folder, "--wave", wave, "--seconds", "2")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "name codecs"),
        (["--random", "opus"], "must be one of encodec, mimi, dac"),
        (["--random", "mimi", "--repeats", "0"], "--repeats must be at least 1"),
        (["--random", "mimi", "--seconds", "0"], "--seconds must be positive"),
        (["--random", "mimi", "--device", "abacus"], "cannot be used here"),
    ],
)
def test_user_errors(tmp_path, arguments, what) -> None:
    with pytest.raises(ValueError, match=what):
        main(["speed", *arguments, "--out", str(tmp_path)])


def test_unfolded_baseline_is_refused(tmp_path) -> None:
    folder = save_baseline(tmp_path / "dac", "dac")
    with pytest.raises(ValueError, match="codecs of transformers are not folded"):
        speed.build(speed.CodecSource("unfolded", str(folder)))


def test_published_architectures() -> None:
    """What config.json of facebook/encodec_24khz, kyutai/mimi and descript/dac_24khz say."""
    said = {
        "encodec": {
            "sampling_rate": 24_000, "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
            "upsampling_ratios": [8, 5, 4, 2], "num_filters": 32, "hidden_size": 128,
            "num_lstm_layers": 2, "num_residual_layers": 1, "kernel_size": 7,
            "last_kernel_size": 7, "residual_kernel_size": 3, "compress": 2,
            "dilation_growth_rate": 2, "norm_type": "weight_norm", "normalize": False,
            "use_causal_conv": True, "codebook_size": 1024, "codebook_dim": 128,
        },
        "mimi": {
            "sampling_rate": 24_000, "upsampling_ratios": [8, 6, 5, 4], "num_filters": 64,
            "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64,
            "intermediate_size": 2048, "sliding_window": 250, "num_residual_layers": 1,
            "kernel_size": 7, "last_kernel_size": 3, "residual_kernel_size": 3, "compress": 2,
            "upsample_groups": 512, "use_conv_shortcut": False, "codebook_size": 2048,
            "codebook_dim": 256, "vector_quantization_hidden_dimension": 256,
        },
        "dac": {
            "sampling_rate": 24_000, "downsampling_ratios": [2, 4, 5, 8],
            "upsampling_ratios": [8, 5, 4, 2], "n_codebooks": 32, "codebook_size": 1024,
            "codebook_dim": 8, "encoder_hidden_size": 64, "decoder_hidden_size": 1536,
            "hidden_size": 1024,
        },
    }  # fmt: skip
    assert said.keys() == speed.PUBLISHED.keys()
    for kind, values in said.items():
        config = AutoConfig.for_model(kind, **speed.PUBLISHED[kind][1])
        found = {name: getattr(config, name) for name in values}
        assert {
            name: list(each) if isinstance(each, tuple) else each for name, each in found.items()
        } == values
