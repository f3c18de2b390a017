"""Words and when they are said: recognised, or a given text aligned, by CTC models or Whisper.

CTC (Graves et al. 2006): recognised words are the best path's; given ones are aligned by the best
path through their letters (Kuerzinger et al. 2020, arXiv 2007.09127). Whisper (Radford et al. 2022,
arXiv 2212.04356): dynamic time warping of the cross-attention heads that follow the speech, as
openai/whisper does for its word timestamps.

Arithmetic of word times: paths through attention, pauses, and quiet places to cut.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, groupby, pairwise, product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from codec.audio import SILENCE_PEAK
from codec.distillation.teachers import (
    WaveTeacher,
    WhisperTeacher,
    in_small_letters,
    loading,
    network_dtype,
    quiet,
)

# A pause is no louder than this above the recording's quietest twentieth, within these bounds below
# its loudest 20 ms. Decibels.
ABOVE_FLOOR, PAUSE_BOUNDS = 6.0, (-40.0, -25.0)
MEDIAN_WIDTH = 7  # Frames, as openai/whisper smooths attention.


class Span(NamedTuple):
    """A word and its frames, `stop` excluded."""

    text: str
    start: int
    stop: int


def quiet_cuts(wave: Float[Tensor, " S"], limit: float | int) -> Iterator[tuple[int, int]]:
    """Stretches of at most `limit` samples that end where a piece's last sixth is quietest."""
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


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each stretch of one label: the label, its first frame, and the frame after its last."""
    start = 0
    for label, run in groupby(labels):
        stop = start + len(list(run))
        yield label, start, stop
        start = stop


def spelled(labels: Sequence[int], letters: Mapping[int, str], delimiter: int | None) -> list[Span]:
    """The words that a CTC path spells; a word's frames are those of its letters."""
    spans: list[Span] = []
    inside = False
    for label, start, stop in runs(labels):
        if label == delimiter:
            inside = False
        elif label in letters and inside:
            spans[-1] = Span(spans[-1].text + letters[label], spans[-1].start, stop)
        elif label in letters:
            spans.append(Span(letters[label], start, stop))
            inside = True
    return spans


def fill_gaps(spans: Sequence[tuple[int, int] | None], frames: int) -> list[tuple[int, int]]:
    """Words without a time share what lies between their neighbours."""
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


def follow(weights: Float[Tensor, "H L T"]) -> Float[Tensor, "L T"]:
    """How far each token looks at each frame: normalised over tokens, smoothed, heads averaged."""
    scores = weights - weights.mean(1, keepdim=True)
    scores = scores / weights.std(1, correction=0, keepdim=True).clamp(min=1e-10)
    half = MEDIAN_WIDTH // 2
    if scores.shape[-1] > half:
        padded = nn.functional.pad(scores, (half, half), mode="reflect")
        scores = padded.unfold(-1, MEDIAN_WIDTH, 1).median(-1).values
    return scores.mean(0)


def warp(scores: Float[np.ndarray, "L T"]) -> Int[np.ndarray, " L"]:
    """The first frame of each token on the monotonic path of the highest total score.

    The path leads from the first token and frame to the last ones; a step moves on by one token,
    one frame, or both.
    """
    cost = -scores.astype(np.float64)
    total = np.empty_like(cost)
    total[0] = cost[0].cumsum()
    for row in range(1, len(cost)):
        entry = np.minimum(total[row - 1], np.concatenate([[np.inf], total[row - 1, :-1]]))
        walked = cost[row].cumsum()  # Enter at frame k, then walk: min over k at every frame.
        total[row] = walked + np.minimum.accumulate(entry - walked + cost[row])
    first = np.zeros(len(cost), int)
    frame = cost.shape[1] - 1
    for row in range(len(cost) - 1, 0, -1):
        while frame > 0:
            both, token, stay = (
                total[row - 1, frame - 1],
                total[row - 1, frame],
                total[row, frame - 1],
            )
            if stay > min(both, token):
                break
            frame -= 1
        first[row] = frame
        if frame > 0 and total[row - 1, frame - 1] <= total[row - 1, frame]:
            frame -= 1
    return first


def without_pauses(spans: Sequence[Span], wave: Float[Tensor, " S"], hop_length: int) -> list[Span]:
    """Cuts pauses off words' edges: by cross-attention a word lasts until the next one starts."""
    frames = nn.functional.pad(wave, (0, -len(wave) % hop_length)).view(-1, hop_length)
    power = frames.square().mean(1)
    lowest, highest = (power.max() * 10 ** (bound / 10) for bound in PAUSE_BOUNDS)
    floor = torch.quantile(power, 0.05) * 10 ** (ABOVE_FLOOR / 10)
    loud = (power > floor.clamp(lowest, highest)).cpu().numpy()
    cut = []
    for span in spans:
        heard = span.start + np.flatnonzero(loud[span.start : span.stop])
        if len(heard):
            span = Span(span.text, int(heard[0]), int(heard[-1]) + 1)
        cut.append(span)
    return cut


CTC_KINDS = ("wav2vec2", "hubert", "wavlm")
# Silence after a recording whose text is aligned; Whisper was trained with it up to 30 s.
PAD_SECONDS = 1.0
WORD_START = chr(0x120)  # Byte-level vocabularies write a leading space so.


class Word(NamedTuple):
    """A word and its time in seconds."""

    text: str
    start: float
    end: float


class Transcriber(Protocol):
    """Speech to words with times, for waves at `sample_rate`; `name` is the model's."""

    name: str
    sample_rate: int

    def words(
        self,
        wave: Float[Tensor, "B 1 S"],
        lengths: Int[Tensor, " B"] | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[list[Word]]:
        """The words of each item, of which `lengths` samples count.

        With `texts` word i of an item is `texts[item].split()[i]`, as written there; without, the
        words are recognised. Times never decrease and lie within the item. An empty or silent item
        has no words. ValueError when a text cannot be aligned.
        """
        ...


class _Piece(NamedTuple):
    """A stretch of a recording, from sample `start` on, and its text if it is given."""

    item: int
    start: int
    wave: Tensor
    words: list[str] | None


class _Batched:
    """What transcribers share: items become pieces, and pieces of like lengths batches."""

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
            for start, stop in quiet_cuts(row, self.max_seconds * self.sample_rate):
                piece = _Piece(item, start, row[start:stop], texts[item].split() if texts else None)
                if piece.wave.abs().amax() >= SILENCE_PEAK and piece.words != []:
                    pieces.append(piece)
        pieces.sort(key=lambda piece: len(piece.wave))
        spans: dict[tuple[int, int], list[Word]] = {}
        for start in range(0, len(pieces), self.batch_size):
            batch = pieces[start : start + self.batch_size]
            given = None if texts is None else [piece.words or [] for piece in batch]
            found = self._spans([piece.wave for piece in batch], given)
            for piece, piece_spans in zip(batch, found, strict=True):
                spans[piece.item, piece.start] = self._timed(piece, piece_spans)
        made: list[list[Word]] = [[] for _ in samples]
        for (item, _), found in sorted(spans.items(), key=lambda pair: pair[0]):
            made[item] += found
        return made

    def _timed(self, piece: _Piece, spans: Sequence[Span]) -> list[Word]:
        """Frames of a piece to seconds of its recording; the last frame may end after it."""
        made = []
        for text, *frames in spans:
            samples = [min(frame * self.hop_length, len(piece.wave)) for frame in frames]
            made.append(
                Word(text, *((piece.start + count) / self.sample_rate for count in samples))
            )
        return made

    def _spans(
        self, waves: Sequence[Float[Tensor, " _"]], texts: Sequence[list[str]] | None
    ) -> list[list[Span]]:
        """Words and frames of a batch."""
        raise NotImplementedError


class CTCTranscriber(_Batched):
    """wav2vec2, HuBERT or WavLM with a CTC head over letters.

    Letters that the head lacks are left out; a word without any other gets the time that its
    neighbours leave. Recordings of any length can be aligned.
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
        place, lengths = self.encoder.place, torch.tensor([len(wave) for wave in waves])
        padded = pad_sequence(list(waves), batch_first=True)[:, None]
        features = self.encoder(padded.to(place["device"]), lengths)
        logits = self.head(features.values.to(place["dtype"])).float()
        emissions = [
            emission[:count].cpu()
            for emission, count in zip(logits.log_softmax(-1), features.lengths, strict=True)
        ]
        if texts is None:
            return [self.recognise(emission) for emission in emissions]
        return [self.align(*pair) for pair in zip(emissions, texts, strict=True)]

    def recognise(self, emission: Float[Tensor, "T V"]) -> list[Span]:
        """Words of the best path; a word's frames are those of its letters."""
        names = {number: letter for letter, number in self.letters.items()}
        return spelled(emission.argmax(-1).tolist(), names, self.delimiter)

    def align(self, emission: Float[Tensor, "T V"], words: Sequence[str]) -> list[Span]:
        """The frames of the given words on the best path through their letters."""
        from torchaudio.functional import forced_align

        labels: list[int] = []
        owners: list[int | None] = []
        for index, word in enumerate(words):
            letters = self._letters(word)
            if letters and labels and self.delimiter is not None:
                labels.append(self.delimiter)
                owners.append(None)
            labels += letters
            owners += [index] * len(letters)
        frames = len(emission)
        if len(labels) + sum(one == two for one, two in pairwise(labels)) > frames:
            raise ValueError(
                f"a recording of {frames} frames is too short for a text of {len(labels)} letters; "
                "is it the right text?"
            )
        found: dict[int, tuple[int, int]] = {}
        if labels:
            owner = iter(owners)
            path, _ = forced_align(emission[None], torch.tensor([labels]), blank=self.blank)
            for label, start, stop in runs(path[0].tolist()):
                if label != self.blank and (word := next(owner)) is not None:
                    found[word] = (found.get(word, (start, 0))[0], stop)
        filled = fill_gaps([found.get(index) for index in range(len(words))], frames)
        return [Span(word, *times) for word, times in zip(words, filled, strict=True)]

    def _letters(self, word: str) -> list[int]:
        found = []
        for letter in word.replace("\u2019", "'"):
            forms = (letter, letter.upper(), letter.lower())
            found += [self.letters[form] for form in forms if form in self.letters][:1]
        return found


class WhisperTranscriber(_Batched):
    """Whisper: greedy, or a given text, timed by one pass of the decoder over the whole text.

    Longer recordings than 30 s are recognised in pieces cut where they are quiet, and cannot be
    aligned. Texts all in capitals are read in small letters, which Whisper knows better. Words are
    what spaces separate.
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
            raise ValueError(f"no language {language!r}; this Whisper knows {', '.join(known)}")
        names = ["startoftranscript", *([language, "transcribe"] if multilingual else [])]
        names = [f"<|{part}|>" for part in [*names, "notimestamps"]]
        self.prompt: list[int] = tokenizer.convert_tokens_to_ids(names)
        self.end = int(config.eos_token_id)
        self.max_tokens = int(config.max_target_positions) - len(self.prompt) - 1
        layers, heads = config.decoder_layers, config.decoder_attention_heads
        # openai/whisper's choice for models whose heads nobody has looked at.
        upper = [[layer, head] for layer in range(layers // 2, layers) for head in range(heads)]
        self.heads = getattr(facts, "alignment_heads", None) or upper

    @torch.no_grad()
    def _spans(
        self, waves: Sequence[Float[Tensor, " _"]], texts: Sequence[list[str]] | None
    ) -> list[list[Span]]:
        if texts is None:
            hidden = self._encoded(waves, math.inf)
            pieces = [self._split(tokens) for tokens in self._recognised(hidden)]
        else:
            hidden = self._encoded(waves, PAD_SECONDS)
            pieces = [self._tokenised(words) for words in texts]
        attention = self._attention(hidden, [list(chain(*tokens)) for _, tokens in pieces])
        made = []
        for wave, (words, tokens), (query, key) in zip(waves, pieces, attention, strict=True):
            frames = math.ceil(len(wave) / self.hop_length)
            weights = (query @ key[:, :frames].mT).softmax(-1)
            starts = warp(follow(weights)[len(self.prompt) - 1 : -1].cpu().numpy())
            bounds = accumulate(map(len, tokens), initial=0)
            spans = [
                Span(word, int(starts[first]), int(starts[last]))
                for word, (first, last) in zip(words, pairwise(bounds), strict=True)
            ]
            made.append(
                without_pauses([span for span in spans if span.text], wave, self.hop_length)
            )
        return made

    def _encoded(
        self, waves: Sequence[Float[Tensor, " _"]], pad_seconds: float
    ) -> Float[Tensor, "B T D"]:
        """The encoder's states of the waves with silence after them, up to 30 s in all."""
        limit = int(self.max_seconds * self.sample_rate)
        lengths = [min(limit, len(wave) + pad_seconds * self.sample_rate) for wave in waves]
        padded = torch.zeros(len(waves), 1, int(max(lengths)), device=self.encoder.place["device"])
        for row, wave in zip(padded, waves, strict=True):
            row[0, : len(wave)] = wave
        return self.encoder(padded, torch.tensor(lengths).long()).values

    def _recognised(self, hidden: Float[Tensor, "B T D"]) -> list[list[int]]:
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=hidden.to(self.encoder.place["dtype"]))  # pyright: ignore
        with quiet():
            tokens = self.model.generate(encoder_outputs=states, **self.options)
        rows = ([token for token in row if token < self.end] for row in tokens.tolist())
        return [row[: self.max_tokens] for row in rows]

    def _split(self, tokens: list[int]) -> tuple[list[str], list[list[int]]]:
        """Words of recognised tokens: a leading space starts one."""
        words: list[list[int]] = []
        for token in tokens:
            name = self.tokenizer.convert_ids_to_tokens(token)
            if name.startswith(WORD_START) or not words:
                words.append([])
            words[-1].append(token)
        return [self.tokenizer.decode(word).strip() for word in words], words

    def _tokenised(self, words: list[str]) -> tuple[list[str], list[list[int]]]:
        shown = [f" {word}" for word in in_small_letters(words)]
        tokens = self.tokenizer(shown, add_special_tokens=False)["input_ids"]
        if (count := sum(map(len, tokens))) > self.max_tokens:
            raise ValueError(
                f"a text of {count} tokens is longer than the {self.max_tokens} that Whisper "
                "reads at once; cut the recording and its text"
            )
        return words, tokens

    def _attention(
        self, hidden: Float[Tensor, "B T D"], texts: Sequence[list[int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Each item's queries (H,L,d), scaled, and keys (H,T,d) of the heads that follow speech."""
        rows = [torch.tensor([*self.prompt, *text, self.end]) for text in texts]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.end).to(hidden.device)
        decoder, caught = self.model.model.decoder, {}

        def keep(*key: object) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _, __, output: caught.update({key: output.float()})

        hooks = [
            getattr(decoder.layers[layer].encoder_attn, kind).register_forward_hook(
                keep(layer, kind)
            )
            for layer, kind in product({layer for layer, _ in self.heads}, ("q_proj", "k_proj"))
        ]
        try:
            states = hidden.to(self.encoder.place["dtype"])
            decoder(input_ids=tokens, encoder_hidden_states=states, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        size = decoder.layers[0].encoder_attn.head_dim

        def of_heads(kind: str) -> Tensor:
            parts = [caught[layer, kind].split(size, dim=-1)[head] for layer, head in self.heads]
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
    """A Whisper, or a wav2vec2, HuBERT or WavLM with a CTC head, by hub id or local folder.

    `half`: see `codec.teachers.network_dtype`; `language` is for multilingual Whispers;
    `batch_size` is 16 unless given, on a CPU 1, which is faster there.
    ValueError when the model is not there or cannot transcribe.
    """
    import transformers

    dtype = network_dtype(device, half)
    network: Any
    normalize = False
    with loading(model, "transcriber"):
        kind = transformers.AutoConfig.from_pretrained(model).model_type
        if kind != "whisper" and kind not in CTC_KINDS:
            raise ValueError(f"a {kind} model; whisper, {', '.join(CTC_KINDS)} can transcribe")
        if kind == "whisper":
            architecture = transformers.WhisperForConditionalGeneration
            network = architecture.from_pretrained(model, dtype=dtype)
            tokenizer = transformers.WhisperTokenizer.from_pretrained(model)
        else:
            network, facts = transformers.AutoModelForCTC.from_pretrained(
                model, dtype=dtype, output_loading_info=True
            )
            if any(key.startswith("lm_head") for key in facts["missing_keys"]):
                raise ValueError("no CTC head; take a model that was trained to transcribe")
            tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(model)
            extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(model)
            normalize = bool(extractor.do_normalize)
    network = network.to(device).eval()
    named: Any = {
        "name": model,
        "batch_size": batch_size or (1 if torch.device(device).type == "cpu" else 16),
    }
    if kind == "whisper":
        return WhisperTranscriber(network, tokenizer, language=language, **named)
    return CTCTranscriber(network, tokenizer, normalize=normalize, **named)
