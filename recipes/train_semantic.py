"""Trains the semantic codebook of an LM-SPT codec on a pretrained Whisper's encoder.

    accelerate launch recipes/train_semantic.py --config recipes/configs/semantic/small.yaml
    accelerate launch recipes/train_codec.py --config recipes/configs/codec/lmspt_whisper.yaml

The first command writes `codec/`, a codec whose semantic half is trained, and `reader/`, a CTC
recognizer of letters from codebook 1 (for recipes/make_clips.py). The second command trains the
rest of the codec and keeps the semantic half. The lists of cuts must have transcripts.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from codec import Codec
from codec.config import AuxiliaryConfig, CodecConfig, LMSPTConfig, at_least
from codec.distillation.asr_supervision import (
    SemanticStudent,
    TranscribedBatch,
    greedy_labels,
    transcript_nll,
)
from codec.distillation.ctc_reader import STEPS, CodeRecognizer, letters_in, transcript_labels
from codec.distillation.word_alignment import min_ctc_steps
from codec.json_lines import append_json_lines
from codec.modules.quantize import codebook_usage, count_codes
from codec.modules.ssl_encoders import config_for_whisper, load_whisper
from codec.tokenize import text_of
from codec.training.codec_fit import list_bad, save_codec
from codec.training.config import SupervisedOptimConfig
from codec.training.data import Share, load_cut, read_cuts
from codec.training.loop import Losses
from codec.training.run import make_accelerator, start_run
from codec.training.supervised import dev_metrics, fit_supervised
from recipes.lib.config import current_keys
from recipes.lib.run import PROFILE_HELP, finished, load_config, run_recipe, split_profile
from slm.config import BatchConfig
from slm.data.batching import Plan

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)

NUM_LISTED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticWeights:
    """Factors of the losses."""

    letters: float = 0.5
    """CTC loss in nats per letter of the transcript."""
    features: float = 1.0
    """Squared error of Whisper's normalized features."""
    commitment: float = 0.25
    """Distance of the latent to its codebook entries."""

    def __post_init__(self) -> None:
        at_least(
            0,
            weights__letters=self.letters,
            weights__features=self.features,
            weights__commitment=self.commitment,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSemanticConfig:
    """One training of a semantic codebook."""

    out: str = "out/smoke/semantic"
    """Run folder; resumes an earlier start with the same configuration."""
    train: str = "out/smoke/cuts/train.jsonl.gz"
    """Cuts with transcripts (recipes/prepare_data.py writes them)."""
    dev: str = "out/smoke/cuts/dev.jsonl.gz"
    """Cuts to validate on: speakers that are not in `train`."""
    seed: int = 0
    """Seed of initial weights and batches."""
    whisper: str = "models/whisper-tiny.en-transformers"
    """Whisper by hub id or folder; its encoder becomes a part of the codec."""
    codec: CodecConfig = field(
        default_factory=lambda: CodecConfig(
            family="lmspt",
            lmspt=LMSPTConfig(semantic_subtraction=False, auxiliary=AuxiliaryConfig(kind="none")),
        )
    )
    """Architecture. codec.lmspt.semantic, and the sizes in codec.lmspt.whisper that Whisper
    determines, are replaced by those of `whisper`."""
    weights: SemanticWeights = field(default_factory=SemanticWeights)
    """Factors of the losses."""
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(positions=2400, max_items=64))
    """Batches of complete recordings; positions are the codec's frames."""
    optim: SupervisedOptimConfig = field(default_factory=SupervisedOptimConfig)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        if self.codec.family != "lmspt":
            raise ValueError(f"codec.family must be lmspt, got {self.codec.family}")
        if self.batch.packed is not None:
            raise ValueError("batch.packed: recordings are not packed here; leave it out")
        if self.codec.quantizer.learning != "ema":
            raise ValueError(
                "codec.quantizer.learning: moving averages update the semantic codebook here; "
                "set it to ema"
            )


class Recordings:
    """Recordings in batches of similar lengths; implements `codec.training.data.Data`."""

    def __init__(
        self, cuts: Sequence["Cut"], letters: str, codec: CodecConfig, batch: BatchConfig,
        seed: int, bad_file: Path,
    ):  # fmt: skip
        """
        Args:
            letters: characters of the CTC labels.
            bad_file: JSON Lines file of the recordings that cannot be read.

        Raises:
            ValueError: no recording can be used.
        """
        self._sample_rate, self._bad_file = codec.sample_rate, bad_file
        letter_labels = [transcript_labels(text_of(cut), letters) for cut in cuts]
        frame_rate = codec.sample_rate / codec.hop_length
        frames = [int(np.ceil(cut.duration * frame_rate)) for cut in cuts]
        transcribed, longest = np.array([bool(labels) for labels in letter_labels]), batch.positions
        short = np.array(frames) <= longest
        fits = np.array([
            not labels or min_ctc_steps(labels) <= STEPS * count
            for labels, count in zip(letter_labels, frames, strict=True)
        ])  # fmt: skip
        for keep, why in (
            (transcribed, "without a transcript in letters"),
            (short, f"longer than batch.positions ({longest} frames)"),
            (fits, f"needing more than {STEPS} CTC steps a frame"),
        ):
            _warn_skipped([cuts[i].id for i in np.flatnonzero(~keep).tolist()], why)
        kept = np.flatnonzero(transcribed & short & fits).tolist()
        if not kept:
            raise ValueError(
                "no recording is left: each needs a transcript in letters, at most batch.positions "
                f"({longest}) frames, and at most {STEPS} CTC steps a frame; see above"
            )
        self._cuts = [cuts[i] for i in kept]
        self._labels: list[Any] = [letter_labels[i] for i in kept]
        self._plan = Plan(np.array([frames[i] for i in kept]), batch, seed)
        self.padding_share = self._plan.padding_share
        self._bad: set[str] = set()

    def num_steps(self, world: int, accumulate: int) -> int:
        """Returns the steps of an epoch with `world` processes of `accumulate` batches each."""
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        """Returns batch `micro` of `rank` in a step.

        Raises:
            ValueError: no recording of the list can be read.
        """
        size, slot = world * accumulate, micro * world + rank
        group, num_fill = self._plan.group(step, size)
        targets = sum(len(self._labels[item]) for rows in group for row in rows for item in row)
        weight = 0.0 if slot >= size - num_fill else 1.0
        batch = self._batch([int(row[0]) for row in group[slot]])
        for other in self._plan.epoch(0) if batch is None else ():
            # No recording of it can be read; every rank needs a batch, so another one is used.
            if batch is None:
                batch = self._batch([int(row[0]) for row in other])
        if batch is None:
            raise ValueError(f"none of the recordings can be read; see {self._bad_file}")
        return Share(batch, targets / size, weight)

    def _batch(self, items: Sequence[int]) -> TranscribedBatch | None:
        waves, labels = [], []
        for item in items:
            cut = self._cuts[item]
            try:
                wave = load_cut(cut, self._sample_rate, allow_silence=True)
            except (ValueError, OSError) as error:
                if cut.id not in self._bad:
                    self._bad.add(cut.id)
                    append_json_lines(self._bad_file, [{"id": cut.id, "why": str(error)}])
                    logger.warning("left out: %s", error)
                continue
            waves.append(torch.from_numpy(wave))
            labels.append(torch.tensor(self._labels[item]))
        if not waves:
            return None
        lengths = torch.tensor([len(wave) for wave in waves])
        wave = pad_sequence(waves, batch_first=True)[:, None]
        return TranscribedBatch(wave, lengths, pad_sequence(labels, batch_first=True))


def semantic_step(
    model: nn.Module,
    batch: TranscribedBatch,
    num_targets: float,
    *,
    weights: SemanticWeights,
    hop: int,
) -> Losses:
    """Returns the weighted losses of a batch: CTC in nats per letter, features and commitment as
    means over its frames. In evaluation, correct letters (all, minus the edit distance) are counted
    too: "accuracy" is 1 - CER.

    Args:
        num_targets: mean number of letters per batch of the step.
        hop: samples per frame of the codec.
    """
    output = model(batch)
    spelling = transcript_nll(output, batch, hop).sum()
    total = (
        weights.letters * spelling / num_targets
        + weights.features * output.features
        + weights.commitment * output.commitment
    )
    letters, frames = (batch.labels != 0).sum(), output.codes.numel()
    right = letters.new_zeros(()) if model.training else letters - _distance(output, batch, hop)
    zero = spelling.new_zeros(())
    return Losses(
        total,
        {
            "nll": torch.stack([spelling, output.features * frames]),
            "correct": torch.stack([right.to(zero), zero]),
            "targets": torch.stack([letters.to(zero), zero + frames]),
        },
    )


def main(argv: list[str]) -> None:
    """Trains the semantic codebook and evaluates it on the dev list."""
    profile_steps, argv = split_profile(argv)
    config = load_config(TrainSemanticConfig, argv, f"{__doc__}\n{PROFILE_HELP}")
    accelerator = make_accelerator(
        Path(config.out), handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise ValueError(
            "the semantic codebook does not train under DeepSpeed; launch with "
            "recipes/accelerate/ddp.yaml (or cpu.yaml)"
        )
    config = replace(config, codec=config_for_whisper(config.whisper, config.codec))
    train, dev = list(read_cuts(config.train)), list(read_cuts(config.dev))
    letters = letters_in([text_of(cut) for cut in train])
    bad_file = Path(config.out) / "skipped.jsonl"
    data, held = (
        Recordings(cuts, letters, config.codec, config.batch, config.seed, bad_file)
        for cuts in (train, dev)
    )
    run = start_run(
        config,
        config.out,
        seed=config.seed,
        accelerator=accelerator,
        current_keys=current_keys,
        profile_steps=profile_steps,
    )
    codec = Codec(config.codec)
    student = SemanticStudent(codec, letters)
    load_whisper(student.encoder, config.whisper)
    logger.info("letters: %s", letters)
    step = partial(semantic_step, weights=config.weights, hop=codec.hop_length)
    model = fit_supervised(student, step, data, held, run, config.optim)
    scores = dev_metrics(
        model, step, held, accelerator, held.num_steps(1, 1), SemanticStudent.groups
    )
    use = _use(student, held, accelerator)
    if accelerator.is_main_process:
        list_bad(bad_file)
        # The training moved only the semantic half to its device.
        save_codec(codec.cpu().eval(), run.folder / "codec")
        CodeRecognizer(student.reader.cpu(), codec.entries()[0]).save(run.folder / "reader")
        results = {
            "codec": str(run.folder / "codec"),
            "reader": str(run.folder / "reader"),
            "dev_cer": round(1 - scores["dev/letters_accuracy"], 4),
            "dev_features": round(scores["dev/features_loss"], 4),
            "entries_used": round(float(use.share), 3),
            "perplexity": round(float(use.perplexity), 1),
        }
        print(json.dumps(results))
        trained, tokens = run.folder / "codec", run.folder / "tokens"
        finished(
            f"codec with a trained semantic codebook, dev CER {results['dev_cer']:.1%}",
            trained,
            f"python recipes/export_tokens.py cuts={config.train} codec={trained} out={tokens} && "
            "accelerate launch recipes/train_codec.py "
            "--config recipes/configs/codec/lmspt_whisper.yaml "
            f"train={config.train} dev={config.dev} start_from={trained} semantic_codes={tokens}",
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _use(student: SemanticStudent, held: Recordings, accelerator: Any) -> Any:
    """Returns the use of the codebook by the dev list: share of entries and perplexity."""
    size = student.quantizer.config.sizes[0]
    counts = torch.zeros(1, size, dtype=torch.long)
    student.eval()
    with torch.inference_mode():
        for index in range(held.num_steps(1, 1)):
            batch = held.share(index, 0, 0, 1, 1).batch
            output = student(TranscribedBatch(*(part.to(accelerator.device) for part in batch)))
            counts += count_codes(output.codes[None, None].cpu(), size)
    return codebook_usage(counts, [size])


def _distance(output: Any, batch: TranscribedBatch, hop: int) -> torch.Tensor:
    from torchaudio.functional import edit_distance

    labels_found = greedy_labels(output, batch.lengths, hop)
    rows = (row[row != 0].tolist() for row in batch.labels)
    return torch.tensor(sum(edit_distance(a, b) for a, b in zip(labels_found, rows, strict=True)))


def _warn_skipped(ids: Sequence[str], why: str) -> None:
    if ids:
        named = ", ".join(ids[:NUM_LISTED]) + (" ..." if len(ids) > NUM_LISTED else "")
        logger.warning("%d recordings left out, %s: %s", len(ids), why, named)


if __name__ == "__main__":
    run_recipe(main)
