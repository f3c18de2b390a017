"""SLMTokBench's text alignment: a BiLSTM CTC probe that transcribes a tokenizer's codes.

Source: SpeechTokenizer (arXiv 2308.16692), section 4, which gives the network (two layers of 1,024
units on token embeddings, characters as labels) but not its training; that is ours. Its
log-likelihoods of texts are the input of the bounds in eval/mutual_information.py.

CTC labels are a to z, the apostrophe and the space. Error rates are those of eval/text.py, with its
normalization of both texts.
"""

import math
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from eval.text import ErrorCounts, WordErrors, character_errors, word_errors

LABELS = " '" + string.ascii_lowercase
"""Characters of labels 1, 2, ...; label 0 is CTC's blank."""
MAX_BATCH_FRAMES = 20_000
"""Frames of a batch in inference, including padding."""
MAX_CTC_STATES = 20_000_000
"""Frames times CTC states (2 L + 1) of the texts that are scored against one utterance at once."""


def label_text(text: str) -> str | None:
    """Returns a text in LABELS: lower case, without accents, other characters replaced by spaces.

    None if no character is left, or if there are digits, whose pronunciation is unknown.
    """
    straight = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    plain = unicodedata.normalize("NFKD", straight).lower()
    if any(character.isdigit() for character in plain):
        return None
    plain = "".join(one for one in plain if not unicodedata.combining(one))
    kept = "".join(one if one in LABELS else " " for one in plain)
    return " ".join(kept.split()) or None


def min_ctc_frames(target: Sequence[int]) -> int:
    """Returns the frames of the shortest CTC path: one per label, and a blank between equal
    neighbors."""
    return len(target) + sum(left == right for left, right in pairwise(target))


def labels_of_text(text: str) -> list[int] | None:
    """Returns the CTC labels of a text; None where `label_text` is None."""
    plain = label_text(text)
    return None if plain is None else [1 + LABELS.index(character) for character in plain]


def summed_ctc_loss(
    log_probabilities: Float[Tensor, "B T V"], targets: Sequence[list[int]], lengths: list[int]
) -> Float[Tensor, ""]:
    """Returns the negative log-likelihood of the targets in nats, summed over the batch.

    Args:
        targets: labels of each item, without blanks.
        lengths: frames of each item.
    """
    return ctc_losses(log_probabilities, targets, lengths).sum()


def ctc_losses(
    log_probabilities: Float[Tensor, "B T V"], targets: Sequence[list[int]], lengths: list[int]
) -> Float[Tensor, " B"]:
    """Returns the negative log-likelihood of each target in nats; arguments as of
    `summed_ctc_loss`."""
    return functional.ctc_loss(
        log_probabilities.transpose(0, 1),
        torch.tensor([label for target in targets for label in target]),
        torch.tensor(lengths),
        torch.tensor([len(target) for target in targets]),
        reduction="none",
    )


def decode_labels(labels: Sequence[int]) -> str:
    """Returns the text of a CTC path (a label for each frame): repeats merged, blanks removed."""
    kept = [label for label, before in zip(labels, [0, *labels], strict=False) if label != before]
    return " ".join("".join(LABELS[label - 1] for label in kept if label).split())


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Network and training; the defaults are for a hundred hours of speech and a GPU."""

    num_layers: int = 2
    """Bidirectional LSTM layers."""
    hidden: int = 1024
    """Units of a layer in each direction."""
    embedding: int = 256
    """Width of the token embeddings, unless tables are given."""
    dropout: float = 0.2
    """Dropout of the embeddings and after each layer."""
    epochs: int = 30
    """Passes over the training set; the last weights are scored, there is no model selection."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam: linear warm-up over a tenth of the steps, then decay to 0."""
    batch_frames: int = 6000
    """Frames of a batch, including padding."""
    max_gradient: float = 1.0
    """Gradient norm clipping."""
    min_frame_rate: float = 50.0
    """Hz. Frames of slower tokenizers are repeated: CTC emits at most one character per frame."""
    seed: int = 0
    """Seed of weights, batches and dropout."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden", "embedding", "epochs", "batch_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient", "min_frame_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class ProbeCorpus(NamedTuple):
    """Codes of utterances and their transcripts."""

    codes: Sequence[Integer[np.ndarray, "..."]]
    """(Q, T) of each utterance, or (T,) for one codebook."""
    texts: Sequence[str]


class Epoch(NamedTuple):
    """Results of an epoch of training."""

    train_loss: float
    """Nats per character."""
    dev_cer: float | None


class ProbeResult(NamedTuple):
    """Scores of a probe on a corpus."""

    cer: float
    wer: float
    loss: float
    """Mean negative log-likelihood of the transcripts in nats per character."""
    n: int
    """Number of utterances."""
    num_unscored: int
    """Utterances without a loss: no labels (`label_text`), or more labels than frames."""
    texts: list[str]
    """Recognized text of each utterance."""


class TextLikelihoods(NamedTuple):
    """Log-likelihoods q(y | x) in nats of texts y given codes x, summed over all CTC paths."""

    matching: Float[np.ndarray, " N"]
    """Of each text given its own codes."""
    others: Float[np.ndarray, "N K"]
    """Of each text given the codes of K other utterances; -inf where these have too few frames."""
    num_characters: Int[np.ndarray, " N"]
    """Labels of each text."""
    indices: list[int]
    """Places of the N utterances in the corpus; those without labels, or with more labels than
    frames, are left out."""


class ProbeNetwork(nn.Module):
    """Bidirectional LSTMs: codes to log-probabilities of the blank and LABELS."""

    starts: Tensor

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        config: ProbeConfig,
        tables: Sequence[Float[Tensor, "_ D"]] | None = None,
    ):
        super().__init__()
        starts = np.cumsum([0, *codebook_sizes])
        self.register_buffer("starts", torch.from_numpy(starts[:-1].copy()), persistent=False)
        if tables is None:
            self.embedding = nn.Embedding(int(starts[-1]), config.embedding)
        else:
            self.embedding = nn.Embedding.from_pretrained(torch.cat(list(tables)).float())
        width = self.embedding.embedding_dim
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        widths = [width] + [2 * config.hidden] * (config.num_layers - 1)
        self.forwards = nn.ModuleList(
            nn.LSTM(width, config.hidden, batch_first=True) for width in widths
        )
        self.backwards = nn.ModuleList(
            nn.LSTM(width, config.hidden, batch_first=True) for width in widths
        )
        self.output = nn.Linear(2 * config.hidden, 1 + len(LABELS))

    def forward(
        self, codes: Int[Tensor, "B Q T"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B T V"]:
        """Returns log-probabilities, V = 1 + len(LABELS). Items do not depend on padding."""
        tokens = rearrange(codes, "b q t -> b t q") + self.starts
        states = self.dropout(self.norm(self.embedding(tokens).sum(2)))  # (B, T, D)
        reverse = _reversal(lengths, codes.shape[2])
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            # Not packed: on a CPU a packed LSTM is eight times slower than a padded one.
            reversed_states, _ = back(_reordered(states, reverse))
            states = torch.cat([ahead(states)[0], _reordered(reversed_states, reverse)], dim=2)
            states = self.dropout(states)
        return self.output(states).log_softmax(2)


def _reversal(lengths: Int[Tensor, " B"], num_frames: int) -> Int[Tensor, "B T"]:
    """Frame indices that reverse each item within its length."""
    frames = torch.arange(num_frames, device=lengths.device)[None]
    ends = lengths[:, None]
    return torch.where(frames < ends, ends - 1 - frames, frames)


def _reordered(states: Float[Tensor, "B T D"], order: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    return states.gather(1, order[..., None].expand_as(states))


class Probe:
    """A trained probe: transcribes codes and scores the result."""

    def __init__(self, network: ProbeNetwork, codebook_sizes: Sequence[int], repeats: int):
        self.network = network
        self.codebook_sizes = tuple(codebook_sizes)
        self.repeats = repeats
        """Number of repetitions of each frame in the network's input."""
        self.history: list[Epoch] = []
        self.num_trained = 0
        """Training utterances."""
        self.num_unspelled = 0
        """Utterances left out of training because their text has no labels (`label_text`)."""
        self.num_too_short = 0
        """Utterances left out of training because they have fewer frames than CTC needs."""
        self.num_steps = 0

    def transcribe(self, codes: Sequence[Integer[np.ndarray, "..."]]) -> list[str]:
        """Returns the text of each utterance by greedy CTC decoding.

        Args:
            codes: (Q, T) of each utterance, or (T,) for one codebook.

        Raises:
            ValueError: codes are outside the codebooks.
        """
        return [text for text, _ in self._decode(codes, [None] * len(codes))]

    def score(self, corpus: ProbeCorpus) -> ProbeResult:
        """Returns error rates of greedy decoding, and the likelihood of the transcripts.

        Raises:
            ValueError: the corpus is empty, or has codes outside the codebooks.
        """
        _check(corpus)
        targets = [labels_of_text(text) for text in corpus.texts]
        texts, losses = zip(*self._decode(corpus.codes, targets), strict=True)
        scored = [target for target, loss in zip(targets, losses, strict=True) if loss is not None]
        num_characters = sum(len(target or ()) for target in scored)
        pairs = list(zip(corpus.texts, texts, strict=True))
        return ProbeResult(
            cer=sum((character_errors(*pair) for pair in pairs), ErrorCounts()).rate,
            wer=sum((word_errors(*pair) for pair in pairs), WordErrors()).wer,
            loss=sum(filter(None, losses)) / num_characters if scored else math.nan,
            n=len(pairs),
            num_unscored=len(pairs) - len(scored),
            texts=list(texts),
        )

    @torch.inference_mode()
    def likelihoods(
        self,
        corpus: ProbeCorpus,
        *,
        num_others: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> TextLikelihoods:
        """Returns the likelihood of each text given its own codes and those of other utterances.

        The time is that of N * (1 + num_others) CTC losses.

        Args:
            num_others: K; a sample without replacement for each text. Default: all N - 1.
            seed: of the sample.

        Raises:
            ValueError: fewer than two utterances can be aligned, codes are outside the codebooks,
                or num_others is below 1.
        """
        _check(corpus)
        targets = [labels_of_text(text) or [] for text in corpus.texts]
        frames = [np.shape(codes)[-1] * self.repeats for codes in corpus.codes]
        fits = [
            0 < min_ctc_frames(target) <= num for target, num in zip(targets, frames, strict=True)
        ]
        indices = np.flatnonzero(fits).tolist()
        if len(indices) < 2:
            raise ValueError(f"{len(indices)} of {len(targets)} utterances can be aligned; need 2")
        if num_others is not None and num_others < 1:
            raise ValueError(f"num_others must be at least 1, got {num_others}")
        num, kept = len(indices), [targets[index] for index in indices]
        size = min(num - 1, num_others or num - 1)
        generator = np.random.default_rng(seed)
        # Row j: utterances other than j, whose codes are given when text j is scored.
        samples = [generator.choice(num - 1, size, replace=False) for _ in range(num)]
        given = np.stack([row + (row >= text) for text, row in enumerate(samples)])
        matching, others = np.empty(num), np.full((num, size), -np.inf)
        scores = self._log_probabilities([corpus.codes[index] for index in indices])
        for utterance, own in tqdm(scores, "likelihoods", num, disable=not progress):
            texts, columns = np.nonzero(given == utterance)
            found = _log_likelihoods(own, [kept[utterance], *(kept[text] for text in texts)])
            matching[utterance] = found[0]
            others[texts, columns] = found[1:]
        return TextLikelihoods(matching, others, np.array([len(each) for each in kept]), indices)

    @torch.inference_mode()
    def _decode(
        self, codes: Sequence[np.ndarray], targets: Sequence[list[int] | None]
    ) -> list[tuple[str, float | None]]:
        """Text of each utterance, and the loss in nats of each target that can be aligned."""
        results: list[tuple[str, float | None]] = [("", None)] * len(codes)
        for index, scores in self._log_probabilities(codes):
            target, loss = targets[index], None
            if target is not None and min_ctc_frames(target) <= len(scores):
                loss = float(summed_ctc_loss(scores[None], [target], [len(scores)]))
            results[index] = (decode_labels(scores.argmax(1).tolist()), loss)
        return results

    def _log_probabilities(
        self, codes: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, Float[Tensor, "T V"]]]:
        """Yields the index of each utterance that has frames, and its log-probabilities."""
        self.network.eval()
        prepared = self._prepare(codes)
        lengths = [each.shape[1] for each in prepared]
        order = [index for index in np.argsort(lengths, kind="stable").tolist() if lengths[index]]
        for chosen in _grouped(order, lengths, MAX_BATCH_FRAMES):
            scores = self.network(*_padded([prepared[index] for index in chosen], self.device))
            for place, index in enumerate(chosen):
                yield index, scores[place, : lengths[index]]

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.network.output.weight.device

    def _prepare(self, codes: Sequence[np.ndarray]) -> list[Int[Tensor, "Q T"]]:
        return [
            _checked(each, self.codebook_sizes, number).repeat_interleave(self.repeats, dim=1)
            for number, each in enumerate(codes)
        ]


def train_probe(
    train: ProbeCorpus,
    *,
    codebook_sizes: Sequence[int],
    frame_rate: float | int,
    config: ProbeConfig | None = None,
    dev: ProbeCorpus | None = None,
    tables: Sequence[Float[Tensor, "_ D"]] | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Probe:
    """Trains a probe on `train` and returns it; reproducible for the same arguments on one CPU.

    Utterances without labels or with too few frames are left out and counted.

    Args:
        frame_rate: of the codes, in Hz.
        dev: scored after each epoch, for the progress bar and `Probe.history` only.
        tables: the codebooks' own entries, of one width; frozen, in place of trained embeddings.
            Embeddings of several codebooks are summed.

    Raises:
        ValueError: codes are outside the codebooks, tables do not match them, or no utterance can
            be trained on.
    """
    config = config or ProbeConfig()
    _check(train)
    if dev is not None:
        _check(dev)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        probe = untrained_probe(codebook_sizes, frame_rate, config, tables, device)
        items = _usable(train, probe)
        _fit(probe, items, config, dev, progress)
    return probe


def untrained_probe(
    codebook_sizes: Sequence[int],
    frame_rate: float | int,
    config: ProbeConfig,
    tables: Sequence[Float[Tensor, "_ D"]] | None = None,
    device: str = "cpu",
) -> Probe:
    """Returns a probe with random weights, into which stored weights of `Probe.network` can be
    loaded; arguments and errors as of `train_probe`."""
    if frame_rate <= 0:
        raise ValueError(f"frame_rate must be positive, got {frame_rate}")
    _check_tables(tables, codebook_sizes)
    network = ProbeNetwork(codebook_sizes, config, tables).to(device)
    return Probe(network, codebook_sizes, max(1, math.ceil(config.min_frame_rate / frame_rate)))


def _log_likelihoods(
    scores: Float[Tensor, "T V"], texts: Sequence[list[int]]
) -> Float[np.ndarray, " N"]:
    """Log-likelihood of each text given one utterance's log-probabilities."""
    num_frames, found = len(scores), np.full(len(texts), -np.inf)
    fitting = [place for place, text in enumerate(texts) if min_ctc_frames(text) <= num_frames]
    fitting.sort(key=lambda place: len(texts[place]))
    sizes = [num_frames * (2 * len(text) + 1) for text in texts]
    for chosen in _grouped(fitting, sizes, MAX_CTC_STATES):
        batch = scores.expand(len(chosen), -1, -1)
        lengths = [num_frames] * len(chosen)
        losses = ctc_losses(batch, [texts[place] for place in chosen], lengths)
        found[chosen] = -losses.double().cpu().numpy()
    return found


def _usable(train: ProbeCorpus, probe: Probe) -> list[tuple[Tensor, list[int]]]:
    """Codes and labels of the utterances to train on; the others are counted in `probe`."""
    items = []
    for codes, text in zip(probe._prepare(train.codes), train.texts, strict=True):
        target = labels_of_text(text)
        if target is None:
            probe.num_unspelled += 1
        elif min_ctc_frames(target) > codes.shape[1]:
            probe.num_too_short += 1
        else:
            items.append((codes, target))
    if not items:
        # More repetitions of each frame help.
        hint = "; raise min_frame_rate (--setting paper)"
        raise ValueError(
            f"none of {len(train.texts)} utterances can be trained on: {probe.num_unspelled} have "
            f"no labels (only digits or other scripts), {probe.num_too_short} fewer frames than "
            f"characters"
            f"{hint if probe.num_too_short else ''}"
        )
    probe.num_trained = len(items)
    return items


def _fit(
    probe: Probe,
    items: Sequence[tuple[Tensor, list[int]]],
    config: ProbeConfig,
    dev: ProbeCorpus | None,
    progress: bool,
) -> None:
    network = probe.network
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    generator = np.random.default_rng(config.seed)
    lengths = [codes.shape[1] for codes, _ in items]
    epochs = [_shuffled(lengths, config.batch_frames, generator) for _ in range(config.epochs)]
    num_steps = sum(len(batches) for batches in epochs)
    with tqdm(total=num_steps, desc="probe", unit="step", disable=not progress) as bar:
        for batches in epochs:
            network.train()
            total, num_characters = 0.0, 0
            for batch in batches:
                share = _schedule(probe.num_steps, num_steps)
                optimizer.param_groups[0]["lr"] = config.learning_rate * share
                codes, sizes = _padded([items[index][0] for index in batch], probe.device)
                targets = [items[index][1] for index in batch]
                loss = summed_ctc_loss(network(codes, sizes), targets, sizes.tolist())
                characters = sum(map(len, targets))
                optimizer.zero_grad()
                (loss / characters).backward()
                nn.utils.clip_grad_norm_(trained, config.max_gradient)
                optimizer.step()
                probe.num_steps += 1
                total, num_characters = total + float(loss.detach()), num_characters + characters
                bar.update()
            cer = None if dev is None else probe.score(dev).cer
            probe.history.append(Epoch(total / num_characters, cer))
            note = "" if cer is None else f", dev CER {cer:.3f}"
            bar.set_postfix_str(f"loss {total / num_characters:.3f}{note}")


def _schedule(step: int, num_steps: int) -> float:
    """Factor of the learning rate: linear warm-up (a tenth of the steps), then linear decay."""
    rising = max(1, num_steps // 10)
    return min((step + 1) / rising, (num_steps - step) / max(1, num_steps - rising + 1))


def _padded(
    codes: Sequence[Tensor], device: torch.device
) -> tuple[Int[Tensor, "B Q T"], Int[Tensor, " B"]]:
    lengths = torch.tensor([each.shape[1] for each in codes])
    longest = int(lengths.max())
    padded = [functional.pad(each, (0, longest - each.shape[1])) for each in codes]
    return torch.stack(padded).to(device), lengths.to(device)


def _grouped(order: Sequence[int], lengths: Sequence[int], frames: int) -> Iterator[list[int]]:
    """Splits `order` into batches of at most `frames` padded frames (at least one item)."""
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batch and longest * (len(batch) + 1) > frames:
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def _shuffled(
    lengths: Sequence[int], frames: int, generator: np.random.Generator
) -> list[list[int]]:
    """Batches of items of similar length, in random order, different in each epoch."""
    noisy = np.array(lengths) * generator.uniform(0.9, 1.1, len(lengths))
    batches = list(_grouped(np.argsort(noisy, kind="stable").tolist(), lengths, frames))
    return [batches[index] for index in generator.permutation(len(batches))]


def _checked(codes: np.ndarray, sizes: Sequence[int], number: int) -> Int[Tensor, "Q T"]:
    """Codes as (Q, T) int64."""
    codes = codes[None] if codes.ndim == 1 else codes
    if codes.ndim != 2 or len(codes) != len(sizes):
        raise ValueError(
            f"utterance {number}: codes of shape {codes.shape}, but there are {len(sizes)} "
            "codebooks; pass (Q, T), or (T,) for one"
        )
    codes = codes.astype(np.int64)
    if codes.size and (codes.min() < 0 or (codes.max(axis=1) >= np.array(sizes)).any()):
        raise ValueError(
            f"utterance {number}: codes outside the codebooks of {tuple(sizes)} entries"
        )
    return torch.from_numpy(codes)


def _check(corpus: ProbeCorpus) -> None:
    if len(corpus.codes) != len(corpus.texts):
        raise ValueError(f"{len(corpus.codes)} utterances of codes, {len(corpus.texts)} texts")
    if not corpus.texts:
        raise ValueError("the corpus is empty")


def _check_tables(tables: Sequence[Tensor] | None, sizes: Sequence[int]) -> None:
    if tables is None:
        return
    shapes = [tuple(table.shape) for table in tables]
    if [shape[0] for shape in shapes] != list(sizes) or len({shape[1] for shape in shapes}) != 1:
        raise ValueError(
            f"tables of shapes {shapes} for codebooks of {tuple(sizes)} entries; pass one (K, D) "
            "table for each, all of one width"
        )
