"""Words with start and end times: of recognized speech, or by forced alignment of a transcript.

CTC models (Graves et al. 2006): greedy decoding, or the best path through the transcript's letters
(Kuerzinger et al. 2020, arXiv 2007.09127). Whisper (Radford et al. 2022, arXiv 2212.04356): dynamic
time warping (DTW) of the cross-attention of its alignment heads, as in openai/whisper.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from codec.audio import SILENCE_PEAK
from codec.distillation.teachers import (
    WaveTeacher,
    WhisperTeacher,
    loading,
    network_dtype,
)
from codec.program import quiet_transformers
from codec.transcripts import lowercase_words
from codec.weights import check_layers, check_sizes, weights_of

CTC_KINDS = ("wav2vec2", "hubert", "wavlm")
PAD_SECONDS = 1.0
"""Silence appended to a recording whose transcript Whisper aligns (it is trained on 30 s)."""
WORD_START = chr(0x120)
"""The leading space of a token in byte-level vocabularies."""
MEDIAN_WIDTH = 7
"""Frames of the median filter over attention, as in openai/whisper."""
PAUSE_ABOVE_FLOOR = 6.0
"""dB. A pause is at most this much above the recording's 5th percentile of power ..."""
PAUSE_BOUNDS = (-40.0, -25.0)
"""dB. ... and this threshold is clamped to these bounds, relative to the loudest 20 ms."""


class Word(NamedTuple):
    """A word and its times in seconds."""

    text: str
    start: float
    end: float


class Span(NamedTuple):
    """A word and its frames [start, stop)."""

    text: str
    start: int
    stop: int


@runtime_checkable
class Transcriber(Protocol):
    """Speech at `sample_rate` to words with times; `name` is the model's."""

    name: str
    sample_rate: int

    def words(
        self,
        wave: Float[Tensor, "B 1 S"],
        lengths: Int[Tensor, " B"] | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[list[Word]]:
        """Words of each item, in order; times lie within the item. Silent items have none.

        Args:
            lengths: samples of each item; the rest is padding.
            texts: transcripts to align. Word i is then `texts[item].split()[i]`, unchanged. Without
                texts the words are recognized.

        Raises:
            ValueError: a text cannot be aligned.
        """
        ...


class _Piece(NamedTuple):
    """A part of item `item` from sample `start` on, and its words where a text is given."""

    item: int
    start: int
    wave: Tensor
    words: list[str] | None


class _BatchedTranscriber:
    """Splits recordings into pieces of at most `max_seconds` and batches pieces of similar length.

    A subclass implements `_spans`.
    """

    sample_rate = 16_000
    hop_length = 320
    max_seconds = math.inf

    def __init__(self, name: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size

    def words(
        self,
        wave: Float[Tensor, "B 1 S"],
        lengths: Int[Tensor, " B"] | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[list[Word]]:
        """See `Transcriber`."""
        if texts is not None and len(texts) != len(wave):
            raise ValueError(f"{len(wave)} recordings but {len(texts)} texts; give one for each")
        samples = [wave.shape[-1]] * len(wave) if lengths is None else lengths.tolist()
        pieces = []
        for item, count in enumerate(samples):
            row = wave[item, 0, :count].detach().float()
            if texts is not None and count > self.max_seconds * self.sample_rate:
                raise ValueError(
                    f"recording {item} lasts {count / self.sample_rate:.1f} s: this model aligns a "
                    f"text to {self.max_seconds:g} s at most; cut the recording and its text"
                )
            for start, stop in split_at_low_energy(row, self.max_seconds * self.sample_rate):
                piece = _Piece(item, start, row[start:stop], texts[item].split() if texts else None)
                if piece.wave.abs().amax() >= SILENCE_PEAK and piece.words != []:
                    pieces.append(piece)
        pieces.sort(key=lambda piece: len(piece.wave))
        timed: dict[tuple[int, int], list[Word]] = {}
        for first in range(0, len(pieces), self.batch_size):
            batch = pieces[first : first + self.batch_size]
            given = None if texts is None else [piece.words or [] for piece in batch]
            found = self._spans([piece.wave for piece in batch], given)
            for piece, spans in zip(batch, found, strict=True):
                timed[piece.item, piece.start] = self._in_seconds(piece, spans)
        words: list[list[Word]] = [[] for _ in samples]
        for (item, _), found in sorted(timed.items(), key=lambda pair: pair[0]):
            words[item] += found
        return words

    def _in_seconds(self, piece: _Piece, spans: Sequence[Span]) -> list[Word]:
        """Frames of a piece to seconds of its recording, clipped to the piece's end."""
        words = []
        for text, *frames in spans:
            samples = [min(frame * self.hop_length, len(piece.wave)) for frame in frames]
            start, end = ((piece.start + count) / self.sample_rate for count in samples)
            words.append(Word(text, start, end))
        return words

    def _spans(
        self, waves: Sequence[Float[Tensor, " _"]], texts: Sequence[list[str]] | None
    ) -> list[list[Span]]:
        """Words and frames of a batch of pieces."""
        raise NotImplementedError


class CTCTranscriber(_BatchedTranscriber):
    """wav2vec2, HuBERT or WavLM with a CTC head over letters, on recordings of any length.

    Letters that are not in the vocabulary are ignored; a word without any other letter gets the
    time between its neighbors.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, normalize: bool, batch_size: int
    ) -> None:
        super().__init__(name, batch_size)
        self.encoder = WaveTeacher(model.base_model, name=name, layer="last", normalize=normalize)
        self.head: nn.Linear = model.lm_head
        self.hop_length = self.encoder.hop_length
        self.blank = int(model.config.pad_token_id)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.delimiter = vocabulary.get(tokenizer.word_delimiter_token)
        special = {self.blank, self.delimiter, *tokenizer.all_special_ids}
        self.letters = {
            name: number for name, number in vocabulary.items() if number not in special
        }

    @torch.no_grad()
    def _spans(
        self, waves: Sequence[Float[Tensor, " _"]], texts: Sequence[list[str]] | None
    ) -> list[list[Span]]:
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = pad_sequence(list(waves), batch_first=True)[:, None]
        features = self.encoder(padded.to(self.encoder.device), lengths)
        logits = self.head(features.values.to(self.encoder.dtype)).float()
        items = [
            log_probs[:count].cpu()
            for log_probs, count in zip(logits.log_softmax(-1), features.lengths, strict=True)
        ]
        if texts is None:
            return [self.recognize(log_probs) for log_probs in items]
        return [self.align(*pair) for pair in zip(items, texts, strict=True)]

    def recognize(self, log_probs: Float[Tensor, "T V"]) -> list[Span]:
        """Words of greedy CTC decoding; a word's frames are those of its letters."""
        names = {number: letter for letter, number in self.letters.items()}
        return ctc_words(log_probs.argmax(-1).tolist(), names, self.delimiter)

    def align(self, log_probs: Float[Tensor, "T V"], words: Sequence[str]) -> list[Span]:
        """Frames of the given words on the best CTC path.

        Raises:
            ValueError: the recording has fewer frames than the letters need.
        """
        labels = [self._labels(word) for word in words]
        frames = align_ctc(log_probs, labels, blank=self.blank, separator=self.delimiter)
        return [Span(word, *span) for word, span in zip(words, frames, strict=True)]

    def _labels(self, word: str) -> list[int]:
        found = []
        for letter in word.replace("\u2019", "'"):
            forms = (letter, letter.upper(), letter.lower())
            found += [self.letters[form] for form in forms if form in self.letters][:1]
        return found


class WhisperTranscriber(_BatchedTranscriber):
    """Whisper: greedy decoding or a given text, then word times by DTW of the cross-attention.

    Recordings of more than 30 s are recognized in pieces, split at quiet places, and cannot be
    aligned. Texts all in capitals are lower-cased for the decoder. Words are separated by spaces.

    transformers' `return_token_timestamps` runs the same algorithm, but only on tokens that it
    generates: it cannot align a transcript (LOG.md, 2026-11-30, compares the two).
    """

    max_seconds = 30.0

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, language: str, batch_size: int
    ) -> None:
        super().__init__(name, batch_size)
        self.model, self.tokenizer, self.language = model, tokenizer, language
        self.encoder = WhisperTeacher(model.model.encoder, name=name, layer="last")
        facts, config = model.generation_config, model.config
        multilingual = bool(facts.is_multilingual)
        self.options: dict[str, Any] = {"do_sample": False, "return_timestamps": False}
        if multilingual:
            self.options |= {"language": language, "task": "transcribe"}
        known = [key.strip("<|>") for key in sorted(facts.lang_to_id)] if multilingual else ["en"]
        if language not in known:
            raise ValueError(f"no language {language!r}; this Whisper has {', '.join(known)}")
        names = ["startoftranscript", *([language, "transcribe"] if multilingual else [])]
        names = [f"<|{part}|>" for part in [*names, "notimestamps"]]
        self.prompt: list[int] = tokenizer.convert_tokens_to_ids(names)
        self.end = int(config.eos_token_id)
        self.max_tokens = int(config.max_target_positions) - len(self.prompt) - 1
        layers, heads = config.decoder_layers, config.decoder_attention_heads
        # openai/whisper's default where no alignment heads are known: the upper half of the layers.
        upper = [[layer, head] for layer in range(layers // 2, layers) for head in range(heads)]
        self.heads = getattr(facts, "alignment_heads", None) or upper

    @torch.no_grad()
    def _spans(
        self, waves: Sequence[Float[Tensor, " _"]], texts: Sequence[list[str]] | None
    ) -> list[list[Span]]:
        if texts is None:
            hidden = self._encode(waves, math.inf)
            tokenized = [self._split_words(tokens) for tokens in self._generate(hidden)]
        else:
            hidden = self._encode(waves, PAD_SECONDS)
            tokenized = [self._tokenize(words) for words in texts]
        attention = self._attention(hidden, [list(chain(*tokens)) for _, tokens in tokenized])
        found = []
        for wave, (words, tokens), (query, key) in zip(waves, tokenized, attention, strict=True):
            frames = math.ceil(len(wave) / self.hop_length)
            weights = (query @ key[:, :frames].mT).softmax(-1)
            scores = attention_scores(weights)[len(self.prompt) - 1 : -1]
            starts = dtw_starts(scores.cpu().numpy())
            bounds = accumulate(map(len, tokens), initial=0)
            spans = [
                Span(word, int(starts[first]), int(starts[last]))
                for word, (first, last) in zip(words, pairwise(bounds), strict=True)
            ]
            found.append(trim_pauses([span for span in spans if span.text], wave, self.hop_length))
        return found

    def _encode(
        self, waves: Sequence[Float[Tensor, " _"]], pad_seconds: float
    ) -> Float[Tensor, "B T D"]:
        """Encoder output of the waves, continued by `pad_seconds` of silence up to 30 s in all."""
        limit = int(self.max_seconds * self.sample_rate)
        lengths = [min(limit, len(wave) + pad_seconds * self.sample_rate) for wave in waves]
        padded = torch.zeros(len(waves), 1, int(max(lengths)), device=self.encoder.device)
        for row, wave in zip(padded, waves, strict=True):
            row[0, : len(wave)] = wave
        return self.encoder(padded, torch.tensor(lengths).long()).values

    def _generate(self, hidden: Float[Tensor, "B T D"]) -> list[list[int]]:
        """Text tokens of greedy decoding, without special ones."""
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=hidden.to(self.encoder.dtype))  # pyright: ignore
        with quiet_transformers():
            tokens = self.model.generate(encoder_outputs=states, **self.options)
        rows = ([token for token in row if token < self.end] for row in tokens.tolist())
        return [row[: self.max_tokens] for row in rows]

    def _split_words(self, tokens: list[int]) -> tuple[list[str], list[list[int]]]:
        """Words and their tokens: a token with a leading space starts a word."""
        words: list[list[int]] = []
        for token in tokens:
            name = self.tokenizer.convert_ids_to_tokens(token)
            if name.startswith(WORD_START) or not words:
                words.append([])
            words[-1].append(token)
        return [self.tokenizer.decode(word).strip() for word in words], words

    def _tokenize(self, words: list[str]) -> tuple[list[str], list[list[int]]]:
        """The words of a text, unchanged, and the tokens of each."""
        spaced = [f" {word}" for word in lowercase_words(words)]
        tokens = self.tokenizer(spaced, add_special_tokens=False)["input_ids"]
        if (count := sum(map(len, tokens))) > self.max_tokens:
            raise ValueError(
                f"a text of {count} tokens is longer than the {self.max_tokens} of Whisper's "
                "decoder; cut the recording and its text"
            )
        return words, tokens

    def _attention(
        self, hidden: Float[Tensor, "B T D"], texts: Sequence[list[int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Scaled queries (H,L,d) and keys (H,T,d) of each item's alignment heads.

        The weights follow from them over an item's own frames. transformers returns weights of all
        heads over all frames, and only from its slow ("eager") attention.
        """
        rows = [torch.tensor([*self.prompt, *text, self.end]) for text in texts]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.end).to(hidden.device)
        decoder, outputs = self.model.model.decoder, {}

        def store(*key: object) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _, __, output: outputs.update({key: output.float()})

        hooks = [
            getattr(decoder.layers[layer].encoder_attn, kind).register_forward_hook(
                store(layer, kind)
            )
            for layer, kind in product({layer for layer, _ in self.heads}, ("q_proj", "k_proj"))
        ]
        try:
            states = hidden.to(self.encoder.dtype)
            decoder(input_ids=tokens, encoder_hidden_states=states, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        size = decoder.layers[0].encoder_attn.head_dim

        def of_heads(kind: str) -> Tensor:
            parts = [outputs[layer, kind].split(size, dim=-1)[head] for layer, head in self.heads]
            return torch.stack(parts, dim=1)

        queries, keys = of_heads("q_proj") * size**-0.5, of_heads("k_proj")
        return [(queries[item, :, : len(row)], keys[item]) for item, row in enumerate(rows)]


def load_transcriber(
    model: str,
    *,
    device: str | torch.device = "cpu",
    half: bool = True,
    language: str = "en",
    batch_size: int | None = None,
) -> CTCTranscriber | WhisperTranscriber:
    """Loads a Whisper, or a wav2vec2, HuBERT or WavLM with a CTC head.

    Args:
        model: hub id or a folder that transformers saved.
        half: see `codec.distillation.teachers.network_dtype`.
        language: of the speech, for a multilingual Whisper.
        batch_size: 16 by default, on a CPU 1, which is faster there.

    Raises:
        ValueError: the model is missing or cannot transcribe, or Whisper lacks the language.
    """
    import transformers

    dtype = network_dtype(device, half)
    network: Any
    normalize = False
    with loading(model, "transcriber"):
        check_layers(Path(model))
        config: Any = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        kind = config.model_type
        if kind != "whisper" and kind not in CTC_KINDS:
            raise ValueError(f"a {kind} model; whisper, {', '.join(CTC_KINDS)} can transcribe")
        if kind == "whisper":
            architecture = transformers.WhisperForConditionalGeneration
            check_sizes(lambda: architecture(config), weights_of(Path(model)))
            network = architecture.from_pretrained(model, dtype=dtype)
            tokenizer = transformers.WhisperTokenizer.from_pretrained(model)
        else:
            build = transformers.AutoModelForCTC.from_config
            check_sizes(lambda: build(config, trust_remote_code=False), weights_of(Path(model)))
            network, facts = transformers.AutoModelForCTC.from_pretrained(
                model, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
            if any(key.startswith("lm_head") for key in facts["missing_keys"]):
                raise ValueError("no CTC head; take a model that was trained to transcribe")
            tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(model)
            extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(model)
            normalize = bool(extractor.do_normalize)
    network = network.to(device).eval()
    batch_size = batch_size or (1 if torch.device(device).type == "cpu" else 16)
    if kind == "whisper":
        return WhisperTranscriber(
            network, tokenizer, name=model, language=language, batch_size=batch_size
        )
    return CTCTranscriber(
        network, tokenizer, name=model, normalize=normalize, batch_size=batch_size
    )


def split_at_low_energy(wave: Float[Tensor, " S"], limit: float | int) -> Iterator[tuple[int, int]]:
    """Parts [start, stop) of at most `limit` samples, cut where their last sixth is quietest."""
    start = 0
    while len(wave) - start > limit:
        begin, stop = start + int(limit * 5 / 6), start + int(limit)
        window = max(1, (stop - begin) // 50)
        energy = wave[begin:stop].square().unfold(0, window, max(1, window // 8)).mean(-1)
        cut = begin + int(energy.argmin()) * max(1, window // 8) + window // 2
        yield start, cut
        start = cut
    if start < len(wave):
        yield start, len(wave)


def label_runs(labels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal labels: (label, first frame, frame after the last)."""
    start = 0
    for label, run in groupby(labels):
        stop = start + len(list(run))
        yield label, start, stop
        start = stop


def ctc_words(path: Sequence[int], letters: Mapping[int, str], delimiter: int | None) -> list[Span]:
    """Words of a CTC path (a label for each frame); a word's frames are those of its letters."""
    spans: list[Span] = []
    inside = False
    for label, start, stop in label_runs(path):
        if label == delimiter:
            inside = False
        elif label in letters and inside:
            spans[-1] = Span(spans[-1].text + letters[label], spans[-1].start, stop)
        elif label in letters:
            spans.append(Span(letters[label], start, stop))
            inside = True
    return spans


def min_ctc_steps(labels: Sequence[int]) -> int:
    """Steps of the shortest CTC path: one for each label, and a blank between equal neighbors."""
    return len(labels) + sum(one == two for one, two in pairwise(labels))


def align_ctc(
    log_probs: Float[Tensor, "T V"],
    words: Sequence[Sequence[int]],
    *,
    blank: int,
    separator: int | None,
) -> list[tuple[int, int]]:
    """Forced alignment: frames [start, stop) of each word on the best CTC path.

    Args:
        words: labels of each word. Words without labels share the frames between their neighbors.
        separator: label between words, if there is one.

    Raises:
        ValueError: there are fewer frames than the labels need.
    """
    from torchaudio.functional import forced_align

    labels: list[int] = []
    owners: list[int] = []
    for index, word in enumerate(words):
        if word and labels and separator is not None:
            labels.append(separator)
            owners.append(-1)
        labels += word
        owners += [index] * len(word)
    frames = len(log_probs)
    if (needed := min_ctc_steps(labels)) > frames:
        raise ValueError(
            f"{len(labels)} letters need at least {needed} CTC steps, but the recording has "
            f"{frames}; is it the right text?"
        )
    found: dict[int, tuple[int, int]] = {}
    if labels:
        targets = torch.tensor([labels], dtype=torch.int32)
        path, _ = forced_align(log_probs[None].contiguous(), targets, blank=blank)
        owner = iter(owners)
        for label, start, stop in label_runs(path[0].tolist()):
            if label != blank and (word := next(owner)) >= 0:
                found[word] = (found.get(word, (start, 0))[0], stop)
    return fill_gaps([found.get(index) for index in range(len(words))], frames)


def fill_gaps(spans: Sequence[tuple[int, int] | None], frames: int) -> list[tuple[int, int]]:
    """Replaces None: such words share the frames between their neighbors equally."""
    filled: list[tuple[int, int]] = []
    before = 0
    for known, group in groupby(spans, key=lambda span: span is not None):
        run = list(group)
        if known:
            filled += [span for span in run if span is not None]
        else:
            following = spans[len(filled) + len(run) :]
            after = following[0][0] if following and following[0] else frames
            edges = np.linspace(before, after, len(run) + 1).round().astype(int).tolist()
            filled += list(pairwise(edges))
        before = filled[-1][1]
    return filled


def attention_scores(weights: Float[Tensor, "H L T"]) -> Float[Tensor, "L T"]:
    """Attention standardized over tokens, median-filtered over frames, mean over heads."""
    scores = weights - weights.mean(1, keepdim=True)
    scores = scores / weights.std(1, correction=0, keepdim=True).clamp(min=1e-10)
    half = MEDIAN_WIDTH // 2
    if scores.shape[-1] > half:
        padded = nn.functional.pad(scores, (half, half), mode="reflect")
        scores = padded.unfold(-1, MEDIAN_WIDTH, 1).median(-1).values
    return scores.mean(0)


def dtw_starts(scores: Float[np.ndarray, "L T"]) -> Int[np.ndarray, " L"]:
    """First frame of each token on the monotonic path of the highest total score (DTW).

    The path leads from the first token and frame to the last ones; a step advances by one token,
    one frame, or both.
    """
    cost = -scores.astype(np.float64)
    total = np.empty_like(cost)
    total[0] = cost[0].cumsum()
    for row in range(1, len(cost)):
        entry = np.minimum(total[row - 1], np.concatenate([[np.inf], total[row - 1, :-1]]))
        along = cost[row].cumsum()  # Enter at frame k, then advance: min over k at every frame.
        total[row] = along + np.minimum.accumulate(entry - along + cost[row])
    first = np.zeros(len(cost), int)
    frame = cost.shape[1] - 1
    for row in range(len(cost) - 1, 0, -1):
        while frame > 0:
            previous = min(total[row - 1, frame - 1], total[row - 1, frame])
            if total[row, frame - 1] > previous:
                break
            frame -= 1
        first[row] = frame
        if frame > 0 and total[row - 1, frame - 1] <= total[row - 1, frame]:
            frame -= 1
    return first


def trim_pauses(spans: Sequence[Span], wave: Float[Tensor, " S"], hop_length: int) -> list[Span]:
    """Removes pauses from both ends of each word: by DTW a word lasts until the next one starts."""
    frames = nn.functional.pad(wave, (0, -len(wave) % hop_length)).view(-1, hop_length)
    power = frames.square().mean(1)
    lowest, highest = (power.max() * 10 ** (bound / 10) for bound in PAUSE_BOUNDS)
    floor = torch.quantile(power, 0.05) * 10 ** (PAUSE_ABOVE_FLOOR / 10)
    loud = (power > floor.clamp(lowest, highest)).cpu().numpy()
    trimmed = []
    for span in spans:
        found = span.start + np.flatnonzero(loud[span.start : span.stop])
        if len(found):
            span = Span(span.text, int(found[0]), int(found[-1]) + 1)
        trimmed.append(span)
    return trimmed
