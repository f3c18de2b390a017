"""EnCodec, DAC, Mimi, X-Codec2: codes and waves of transformers behind SpeechCodec."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import CountingJudge, voiced
from safetensors.torch import load_file, save_file
from tiny_baselines import MODELS, save_baseline
from tiny_slm import quiet, save_voice
from transformers import EncodecModel, Xcodec2FeatureExtractor

from codec import Codec, Codes, load_codec
from codec.__main__ import main
from codec.models import base as contract
from codec.models.hf import Baseline, EncodecBaseline, MimiBaseline
from codec.tokens import TokenShard
from recipes import benchmark
from recipes.export_tokens import main as export_tokens
from recipes.lib.codec_training import TrainCodecConfig, build_models
from recipes.lib.voice_training import finish_voice
from recipes.scoring.rows import read_rows
from slm.config import SamplingConfig
from slm.voice import Voice
from tests.recipes.test_benchmark import prepare_cuts

pytestmark = quiet()

KINDS = list(MODELS)
RESIDUAL = ["encodec", "dac", "mimi"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("baselines")
    return {kind: save_baseline(root / kind, kind) for kind in KINDS}


@pytest.fixture
def codec(folders: dict[str, Path], kind: str) -> Baseline:
    return load_codec(folders[kind])


def speech(codec: Baseline, seconds: float, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(voiced(seconds, codec.sample_rate, seed))[None, None]


def in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: float, context: float = 2.0) -> None:
    monkeypatch.setattr(contract, "CHUNK_SECONDS", chunk)
    monkeypatch.setattr(contract, "CONTEXT_SECONDS", context)
    monkeypatch.setattr("codec.models.hf.CHUNK_SECONDS", chunk)


@pytest.mark.parametrize(
    ("kind", "sample_rate", "frame_rate", "sizes"),
    [
        ("encodec", 24_000, 75.0, (16,) * 3),
        ("dac", 16_000, 50.0, (16,) * 3),
        ("mimi", 16_000, 50.0, (16,) * 4),
        ("xcodec2", 16_000, 50.0, (64,)),
    ],
)
def test_what_they_are(
    codec: Baseline, folders: Any, kind: str, sample_rate: int, frame_rate: float, sizes: Any
) -> None:
    stamp = codec.stamp
    assert (stamp.sample_rate, stamp.frame_rate, stamp.codebook_sizes) == (
        sample_rate, frame_rate, sizes,
    )  # fmt: skip
    assert stamp.num_codebooks == codec.num_codebooks == len(sizes)
    assert codec.hop_length == 320
    assert stamp.id == str(folders[kind])
    assert codec.device.type == "cpu"
    assert not codec.train().training
    assert not any(parameter.requires_grad for parameter in codec.parameters())


@torch.no_grad()
def test_an_encodec_of_its_first_codebooks(folders: Any, tmp_path: Path) -> None:
    """As recipes/configs/export/valle.yaml makes VALL-E's of 8 codebooks of the hub's of 32."""
    few = EncodecModel.from_pretrained(folders["encodec"], target_bandwidths=[0.3, 0.6])
    few.save_pretrained(tmp_path / "few")
    codec, whole = load_codec(tmp_path / "few"), load_codec(folders["encodec"])
    assert codec.codebook_sizes == (16,) * 2
    wave = speech(codec, 0.5)
    assert torch.equal(codec.encode(wave).codes, whole.encode(wave, num_codebooks=2).codes)


def encoded_by_transformers(codec: Baseline, kind: str, wave: torch.Tensor) -> torch.Tensor:
    """(B,Q,T), of waves as the model's feature extractor prepares them."""
    network = codec.network
    if kind == "encodec":
        return network.encode(wave, bandwidth=0.9).audio_codes[0]
    if kind == "dac":
        filled = torch.nn.functional.pad(wave, (0, -wave.shape[-1] % 320))
        return network.encode(filled).audio_codes
    if kind == "mimi":
        return network.encode(wave).audio_codes
    extract = Xcodec2FeatureExtractor(sampling_rate=16_000, hop_length=320)
    inputs = extract(list(wave[:, 0].numpy()), sampling_rate=16_000, return_tensors="pt")
    made = network.encode(**inputs)
    return made.audio_codes[..., : -(-wave.shape[-1] // 320)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_waves_are_those_of_transformers(codec: Baseline, kind: str) -> None:
    wave = speech(codec, 1.0)[..., :15_001]
    for size in (15_001, 14_720):  # The latter is a multiple of the hop.
        expected = encoded_by_transformers(codec, kind, wave[..., :size])
        codes, lengths = codec.encode(wave[..., :size])
        assert torch.equal(codes, expected)
        assert lengths.tolist() == [-(-size // 320)]
        assert codes.dtype == torch.int64
        assert all(len(row.unique()) > 5 for row in codes[0])
    if kind == "encodec":
        decoded = codec.network.decode(codes[None], [None]).audio_values
    elif kind == "dac":
        decoded = codec.network.decode(audio_codes=codes).audio_values[:, None]
        # Its strides of 2, 4 and 5 leave that many samples out.
        assert decoded.shape[-1] == 14_720 - 8
    else:
        decoded = codec.network.decode(codes).audio_values
    made = codec.decode(codes)
    assert made.shape == (1, 1, 14_720)
    assert torch.equal(made[..., : decoded.shape[-1]], decoded)
    assert made[..., decoded.shape[-1] :].count_nonzero() == 0
    assert decoded.std() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_any_input(codec: Baseline, kind: str) -> None:
    for size in (1, 2, 319, 320, 321, 12_345):
        codes, lengths = codec.encode(speech(codec, 1.0)[..., :size])
        frames = -(-size // 320)
        assert codes.shape == (1, codec.num_codebooks, frames)
        assert lengths.tolist() == [frames]
        assert codec.decode(codes).shape == (1, 1, frames * 320)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batch_equals_single_items(codec: Baseline, kind: str) -> None:
    wave = speech(codec, 1.0)
    sizes = torch.tensor([14_000, 9_001, 641, 1, 9_001])
    batch = wave.repeat(5, 1, 1)
    batch[4] = speech(codec, 1.0, seed=4)
    codes, lengths = codec.encode(batch, sizes)
    waves = codec.decode(codes, lengths)
    assert not torch.equal(codes[4], codes[1])
    for item, size in enumerate(sizes):
        alone = codec.encode(batch[item : item + 1, :, :size]).codes
        frames = alone.shape[-1]
        assert lengths[item] == frames
        assert torch.equal(codes[item, :, :frames], alone[0])
        torch.testing.assert_close(
            waves[item, :, : frames * 320], codec.decode(alone)[0], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", RESIDUAL)
def test_any_number_of_first_codebooks(codec: Baseline, kind: str) -> None:
    wave = speech(codec, 0.5)
    codes = codec.encode(wave).codes
    waves = []
    for count in range(1, codec.num_codebooks + 1):
        assert torch.equal(codec.encode(wave, num_codebooks=count).codes, codes[:, :count])
        waves.append(codec.decode(codes[:, :count]))
    assert not torch.equal(waves[0], waves[-1])
    # An item's wave from the codebooks after the first alone.
    rest = codec.encode(wave, first_codebook=1).codes
    assert rest.shape[1] == codec.num_codebooks - 1
    # Mimi's acoustic codebooks are parallel to the semantic one, the others quantize residuals.
    assert torch.equal(rest, codes[:, 1:]) == (kind == "mimi")
    decoded = codec.decode(rest, first_codebook=1)
    assert decoded.shape == waves[0].shape
    assert not torch.equal(decoded, codec.decode(rest))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_recording_and_no_code_of_theirs(codec: Baseline, kind: str) -> None:
    wave = speech(codec, 0.1)
    codes = codec.encode(wave).codes.clone()
    last = codec.num_codebooks
    with pytest.raises(ValueError, match="average the channels"):
        codec.encode(wave.repeat(1, 2, 1))
    with pytest.raises(ValueError, match="no samples"):
        codec.encode(wave[..., :0])
    with pytest.raises(ValueError, match=f"between 1 and {last}, got {last + 1}"):
        codec.encode(wave, num_codebooks=last + 1)
    with pytest.raises(ValueError, match=f"first_codebook must lie between 0 and {last - 1}"):
        codec.encode(wave, first_codebook=last)
    with pytest.raises(ValueError, match=f"1 to {last} codebooks"):
        codec.decode(torch.cat([codes, codes[:, :1]], dim=1))
    size = codec.codebook_sizes[-1]
    codes[0, -1, 0] = size
    with pytest.raises(ValueError, match=f"codebook {last} must lie in 0..{size - 1}"):
        codec.decode(codes)


@pytest.mark.parametrize("kind", KINDS)
def test_long_recordings_in_chunks(
    codec: Baseline, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 3 s with context against one pass: equal if the receptive field is smaller.

    X-Codec2 normalizes over the recording: a quarter of its codes may change.
    """
    wave = speech(codec, 7.3)
    with torch.inference_mode():
        full = codec._encode_chunk(wave, None, range(codec.num_codebooks))
        decoded = codec._decode_chunk(full, None, 0)
    in_chunks(monkeypatch, 3.0)
    chunks = codec.encode(wave).codes
    assert chunks.shape == full.shape
    mismatch = (chunks != full).float().mean()
    assert mismatch <= {"dac": 0.0, "xcodec2": 0.25}.get(kind, 0.005)
    error = (codec.decode(full) - decoded).pow(2).mean().sqrt() / decoded.pow(2).mean().sqrt()
    assert error <= (0.25 if kind == "xcodec2" else 1e-4)
    # A batch in chunks is equal to its items alone.
    sizes = torch.tensor([wave.shape[-1], 4 * codec.sample_rate + 7])
    codes, lengths = codec.encode(wave.repeat(2, 1, 1), sizes)
    assert torch.equal(codes[0], chunks[0])
    alone = codec.encode(wave[..., : sizes[1]]).codes
    assert torch.equal(codes[1, :, : lengths[1]], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_streams_equal_batches(codec: Baseline, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 1.0, 0.5)
    wave = speech(codec, 2.7)
    codes = codec.encode(wave).codes
    blocks = np.split(wave[0, 0].numpy(), [7_001, 20_000])
    np.testing.assert_array_equal(codec.encode_stream(blocks), codes[0])
    streamed = list(codec.decode_stream(codes[0].numpy()))
    assert len(streamed) == 3
    np.testing.assert_array_equal(np.concatenate(streamed), codec.decode(codes)[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_they_are_the_same(
    codec: Baseline,
    kind: str,
    tmp_path: Path,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish_voice(tmp_path, str(folders[kind]), "A card.", {})  # As recipes/tts.py makes a voice.
    again = type(codec).from_pretrained(tmp_path / "codec")
    assert type(again) is type(codec)
    other = EncodecBaseline if kind != "encodec" else MimiBaseline
    with pytest.raises(ValueError, match=f"is not a {other.__name__}; load_codec"):
        other.from_pretrained(tmp_path / "codec")
    assert again.stamp.digest == codec.stamp.digest == load_codec(tmp_path / "codec").stamp.digest
    pushed = []
    monkeypatch.setattr(type(codec.network), "push_to_hub", lambda *given: pushed.append(given))
    again.push_to_hub("some/codec")
    assert pushed == [(again.network, "some/codec")]
    wave = speech(codec, 0.3)
    codes = codec.encode(wave).codes
    assert torch.equal(again.encode(wave).codes, codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    with torch.no_grad():
        parameters = list(again.network.parameters())
        parameters[-1] += 1
    del again.__dict__["_digest"]
    assert again.stamp.digest != codec.stamp.digest


def test_by_command_line(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folders["mimi"])
    recording, tokens = tmp_path / "a.wav", tmp_path / "t.parquet"
    soundfile.write(recording, voiced(0.71, 24_000), 24_000)
    main(["info", folder])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_codebooks"], facts["bits_per_second"]) == (4, 50 * 4 * 4)
    main(["encode", "--codec", folder, str(recording), "--out", str(tokens)])
    main(["decode", "--codec", folder, str(tokens), "--out", str(tmp_path / "decoded")])
    arguments = ["--codec", folder, "--codebooks", "1", str(recording)]
    main(["reconstruct", *arguments, "--out", str(tmp_path / "semantic")])
    waves = [soundfile.read(tmp_path / name / "a.wav")[0] for name in ("decoded", "semantic")]
    assert [len(wave) for wave in waves] == [round(0.71 * 16_000)] * 2
    assert np.abs(waves[0] - waves[1]).max() > 0
    with pytest.raises(SystemExit) as stopped:
        main(["export", "speechtokenizer", folder, str(tmp_path / "out")])
    assert stopped.value.code == 2


def test_tokens_are_exported_with_their_stamp(tmp_path: Path, folders: dict[str, Path]) -> None:
    from lhotse import CutSet, Recording

    seconds = (0.71, 0.4, 0.4)
    for number, length in enumerate(seconds):
        wave = voiced(length, seed=number)
        soundfile.write(tmp_path / f"{number}.wav", wave, 16_000, subtype="FLOAT")
    recordings = [Recording.from_file(tmp_path / f"{number}.wav") for number in range(3)]
    CutSet.from_cuts(each.to_cut() for each in recordings).to_file(tmp_path / "cuts.jsonl.gz")
    cuts, out = tmp_path / "cuts.jsonl.gz", tmp_path / "tokens"
    export_tokens([f"cuts={cuts}", f"codec={folders['dac']}", f"out={out}"])
    codec = load_codec(folders["dac"])
    shard = TokenShard.open(out, expect=codec.stamp)
    assert shard.stamp == codec.stamp
    for number, row in enumerate(shard):
        wave = torch.from_numpy(voiced(seconds[number], seed=number))[None, None]
        np.testing.assert_array_equal(row.codes, codec.encode(wave).codes[0])
    with pytest.raises(ValueError, match="is in use"):
        TokenShard.open(out, expect=load_codec(folders["mimi"]).stamp)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("encodec", {"audio_channels": 2, "normalize": True}, "use the 24 kHz model"),
        ("encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "use the 24 kHz model"),
        ("mimi", {"encoder_config": None}, "use a complete Mimi"),
        ("mimi", {"audio_channels": 2}, "use a mono Mimi"),
        ("xcodec2", {"quantization_levels": (8,) * 6}, "a codebook of 262144 entries"),
    ],
)
def test_unsupported_configurations_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], reason: str
) -> None:
    MODELS[kind](**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("encodec", {"sampling_rate": 2**63}, "cannot be loaded as a codec"),
        ("mimi", {"dtype": 0.5}, "cannot be loaded as a codec"),
        ("mimi", {"num_quantizers": 2**22}, "asks for more tensors than its weights have"),
    ],
)
def test_altered_configurations_are_refused_with_the_folder(
    tmp_path: Path, folders: dict[str, Path], kind: str, changes: dict[str, Any], reason: str
) -> None:
    shutil.copytree(folders[kind], tmp_path / kind)
    file = tmp_path / kind / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{tmp_path / kind}: .*{reason}"):
        load_codec(tmp_path / kind)


def test_damaged_weights_are_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = folders["dac"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded as a codec"):
        load_codec(tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("decoder.conv1.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack decoder\.conv1\.weight"):
        load_codec(tmp_path)
    weights["decoder.conv1.weight"] = lost * float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.conv1\.weight has NaN"):
        load_codec(tmp_path)


def test_one_that_is_larger_than_its_weights(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = shutil.copytree(folders["dac"], tmp_path / "dac")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"n_codebooks": 2**40}, {"encoder_hidden_size": 2**20}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=r"its configuration asks for"):
            load_codec(folder)


def test_they_cannot_be_trained(folders: dict[str, Path]) -> None:
    message = r"mimi: is a model of transformers \(mimi\): load_codec uses it; it cannot be trained"
    with pytest.raises(ValueError, match=message):
        Codec.from_pretrained(str(folders["mimi"]))
    with pytest.raises(ValueError, match=message):
        build_models(TrainCodecConfig(start_from=str(folders["mimi"])), "cpu")


def test_a_voice_synthesizes_with_one(tmp_path: Path) -> None:
    codec = save_baseline(tmp_path / "mimi", "mimi", num_quantizers=3)
    voice = Voice.from_pretrained(save_voice(tmp_path, codec))
    voice.sampling = SamplingConfig(frames_per_token=(0.5, 1.0), spare_seconds=0.0, max_attempts=1)
    speech = voice.tts("a cat", voiced(0.3), "the dog", seed=1)
    assert isinstance(voice.codec, Baseline)
    assert speech.codes.shape[0] == 3
    assert len(speech.wave) == speech.codes.shape[1] * 320 > 0


def test_one_is_benchmarked(
    tmp_path: Path, folders: dict[str, Path], write_wav: Any, judge: CountingJudge
) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav, count=1)
    command = ["reconstruction", "--codec", str(folders["dac"]), "--cuts", str(cuts)]
    command += ["--judge", "judge", "--out", str(tmp_path), "--measures"]
    benchmark.main([*command, "--codebooks", "2"])
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric == "bitrate"]
    assert [(row.system, row.value) for row in rows] == [("dac-2", 50 * 2 * 4)]
    with pytest.raises(ValueError, match="no auxiliary decoder"):
        benchmark.main([*command, "--auxiliary"])


def test_codes_of_a_batch(folders: dict[str, Path]) -> None:
    made = load_codec(folders["mimi"]).encode(torch.zeros(2, 1, 640))
    assert isinstance(made, Codes)
    assert made.lengths.tolist() == [2, 2]
