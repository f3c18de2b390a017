"""The NAR: codebooks 2 to Q, one after the other, by a bidirectional Transformer.

A position of the speech part is the sum of the embeddings of the codebooks below the predicted one;
of every codebook within the prompt. Each layer's norms are the stage's, which is the codebook
predicted, counted from 0.

What the NAR is made of, and how its labels are shared among codes that sound alike.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from slm.config import NARConfig
from slm.data.nar import NUM_TEXT_SYMBOLS, NARBatch, nar_batch, text_bytes
from slm.models.ar import Scores, score
from slm.models.attention import attend

HALVINGS = 40
"""Steps of the search for a temperature."""


class StageHead(nn.Module):
    """One table for the heads of all codebooks; a call computes the logits of some of its rows."""

    def __init__(self, width: int, num_rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width).normal_(std=width**-0.5))

    def forward(self, hidden: Float[Tensor, "N D"], rows: slice) -> Float[Tensor, "N K"]:
        return functional.linear(hidden, self.weight[rows])


class AdaptiveNorm(nn.Module):
    """Layer norm with a scale and a shift for each stage. Weight decay pulls to a plain one."""

    def __init__(self, width: int, num_stages: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_stages, width))
        self.shift = nn.Parameter(torch.zeros(num_stages, width))

    def forward(self, hidden: Float[Tensor, "B L D"], stage: int) -> Float[Tensor, "B L D"]:
        normed = functional.layer_norm(hidden, hidden.shape[-1:])
        return normed * (1 + self.scale[stage]) + self.shift[stage]


class Nearby(nn.Module):
    """A depthwise convolution over text and speech apart, which knows no padding."""

    def __init__(self, width: int, kernel: int, num_stages: int):
        super().__init__()
        self.norm = AdaptiveNorm(width, num_stages)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(
        self, hidden: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"],
        stage: int, num_text: int,
    ) -> Float[Tensor, "B L D"]:  # fmt: skip
        x = (self.norm(hidden, stage) * valid[..., None]).mT
        parts = x.split([num_text, x.shape[-1] - num_text], dim=-1) if num_text else [x]
        return torch.cat([self.depthwise(part) for part in parts], dim=-1).mT


class Layer(nn.Module):
    """Pre-norm: a convolution if asked for, attention to valid positions, a feed-forward part."""

    def __init__(
        self, *, width: int, num_heads: int, feedforward: int, dropout: float, num_stages: int,
        kernel: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.nearby = Nearby(width, kernel, num_stages) if kernel else None
        self.num_heads = num_heads
        self.attention_norm = AdaptiveNorm(width, num_stages)
        self.feedforward_norm = AdaptiveNorm(width, num_stages)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"],
        stage: int,
        num_text: int,
    ) -> Float[Tensor, "B L D"]:
        """`num_text`: positions of text, in front of those of speech."""
        if self.nearby is not None:
            hidden = hidden + self.dropout(self.nearby(hidden, valid, stage, num_text))
        projected = self.query_key_value(self.attention_norm(hidden, stage))
        query, key, value = rearrange(
            projected, "b l (n h d) -> n b h l d", n=3, h=self.num_heads
        ).unbind()
        attended = attend(query, key, value, valid[:, None, None])
        hidden = hidden + self.dropout(self.output(rearrange(attended, "b h l d -> b l (h d)")))
        inner = functional.gelu(self.expand(self.feedforward_norm(hidden, stage)))
        return hidden + self.dropout(self.contract(self.dropout(inner)))


class Reference(nn.Module):
    """What the prompt's frames have above that sound alike below.

    Voice conversion by nearest neighbours (kNN-VC, arXiv 2305.18975) takes a speaker's own frames
    for those that say the same; here by attention, whose query and key are one projection, so
    that like finds like from the first step on.
    """

    def __init__(self, *, width: int, num_heads: int, kernel: int, num_stages: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaptiveNorm(width, num_stages)
        self.nearby = Nearby(width, kernel, num_stages) if kernel else None
        self.place = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    @torch.no_grad()
    def begin(self) -> None:
        """As strong as what comes in: an attention that tells frames apart, and is heard."""
        for linear in (self.place, self.value, self.output):
            linear.weight.normal_(std=linear.in_features**-0.5)

    def forward(
        self, below: Float[Tensor, "B T D"], above: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"], prompt: Bool[Tensor, "B T"], stage: int,
    ) -> Float[Tensor, "B T D"]:  # fmt: skip
        """From the embeddings of codebooks below the stage, of all `valid` frames, and of the other
        codebooks, of the `prompt`'s; where that is empty, next to nothing."""
        if self.nearby is not None:
            below = below + self.nearby(below, valid, stage, 0)
        # A frame in front, of zeros, for those that find nothing like them.
        place, value, reached = (
            functional.pad(part, (0, 0, 1, 0), value=fill)
            for part, fill in (
                (self.place(self.norm(below, stage)), 0),
                (self.value(above), 0),
                (prompt[..., None], True),
            )
        )
        place, value = (
            rearrange(part, "b l (h d) -> b h l d", h=self.num_heads) for part in (place, value)
        )
        attended = attend(place, place, value, reached[:, None, None, :, 0])
        return self.output(rearrange(attended, "b h l d -> b l (h d)")[:, 1:])


@torch.no_grad()
def shares_of_neighbours(entries: Float[Tensor, "K E"], wanted: float) -> Float[Tensor, "K K"]:
    """Row k: how the label k is shared among all entries, by a Gaussian of their distance whose
    width is one for the codebook, so that the shares' perplexity is `wanted` on average."""
    distances = torch.cdist(entries, entries).square()
    scale = distances.mean().clamp(min=1e-12)
    low, high = 1e-6, 10.0
    shares = torch.eye(len(entries))
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        shares = (-distances / (scale * middle)).softmax(dim=1)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean()
        low, high = (middle, high) if float(entropy.exp()) < wanted else (low, middle)
    return shares


FILES = ("config.json", "model.safetensors")
EMBEDDING_STD = 0.5
"""As strong as the sinusoids, so that what is said counts beside where."""


class NAR(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="parlance",
    tags=["text-to-speech"],
    license="apache-2.0",
):
    """Predicts codebook `stage` from the text, the prompt and the codebooks below."""

    def __init__(self, config: NARConfig | dict[str, Any]):
        """`config`: a dict, when it comes from a config.json."""
        super().__init__()
        if isinstance(config, dict):
            config = NARConfig.from_json(config)
        sizes = config.codebook_sizes
        if len(sizes) < 2:
            raise ValueError(f"a NAR needs two codebooks or more, got codebook_sizes={sizes}")
        self.config = config
        self.groups = tuple(f"codebook_{stage + 1}" for stage in range(1, len(sizes)))
        # One table for all codebooks: then every step's gradient reaches every parameter. A bag
        # sums a frame's codebooks without a tensor, and a gradient of the table, for each.
        self._starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self.text = nn.Embedding(NUM_TEXT_SYMBOLS, config.width)
        self.codes = nn.EmbeddingBag(sum(sizes), config.width, mode="sum")
        self.kinds = nn.Embedding(2, config.width)
        self.layers = nn.ModuleList(
            Layer(
                width=config.width,
                num_heads=config.num_heads,
                feedforward=config.feedforward,
                dropout=config.dropout,
                num_stages=len(sizes),
                kernel=config.conv_kernel,
            )
            for _ in range(config.num_layers)
        )
        self.norm = AdaptiveNorm(config.width, len(sizes))
        self.head = StageHead(config.width, sum(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self._shares: list[Float[Tensor, "K K"]] = []
        self.apply(_initialise)
        # The last to draw, so that the others begin alike with and without it.
        self.reference = None
        if config.prompt_matching:
            self.reference = Reference(
                width=config.width,
                num_heads=config.num_heads,
                kernel=config.conv_kernel,
                num_stages=len(sizes),
            ).apply(_initialise)
            self.reference.begin()

    @property
    def takes_texts(self) -> bool:
        """Not if it was trained without any (text_dropout 1)."""
        return self.config.text_dropout < 1

    @torch.no_grad()
    def begin_with(self, entries: Sequence[Float[Tensor, "_ E"]], seed: int) -> None:
        """Puts a codec's entries, (K, E) of every codebook, in place of the codes' embeddings and
        heads: projected at random, as strong as those. So what sounds alike begins alike."""
        generator = torch.Generator().manual_seed(seed)
        width = self.config.width
        tables = ((self.codes.weight, EMBEDDING_STD), (self.head.weight, width**-0.5))
        for table, strength in tables:
            projection = torch.randn(entries[0].shape[1], width, generator=generator)
            for start, book in zip(self._starts[:-1], entries, strict=True):
                rows = (book - book.mean(0)).cpu().float() @ projection
                table[start : start + len(book)] = rows * (strength / rows.std().clamp(min=1e-6))
        if self.config.label_smoothing_neighbors:
            wanted = self.config.label_smoothing_neighbors
            self._shares = [shares_of_neighbours(book.cpu().float(), wanted) for book in entries]

    def forward(self, batch: NARBatch) -> Scores:
        """Losses over the frames that are asked for, summed over the batch's stages."""
        asked = _asked(batch)
        parts = []
        for stage in batch.stages.tolist():
            logits = self._logits(self._hidden(batch, stage)[asked], stage)
            labels = batch.codes[:, stage][asked]
            groups = torch.full_like(labels, stage - 1)
            parts.append(score(logits, labels, groups, len(self.groups), self._shared(stage)))
        return Scores(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)))

    def _shared(self, stage: int) -> Float[Tensor, "K K"] | None:
        """Among which codes a code's label is shared; None: it is not."""
        if not self.training or not self._shares:
            return None
        # Moved once: it is no part of the state, as it follows from the codec.
        self._shares[stage] = self._shares[stage].to(self.head.weight.device)
        return self._shares[stage]

    def _hidden(self, batch: NARBatch, stage: int) -> Float[Tensor, "B T D"]:
        """Features of the speech part."""
        kinds = self.kinds(torch.arange(2, device=batch.text.device))
        text = self.text(batch.text) + kinds[0]
        speech = self._speech(batch, stage) + kinds[1]
        joined = torch.cat([self._place(text), self._place(speech)], dim=1)
        frames = torch.arange(speech.shape[1], device=speech.device)
        valid = torch.cat([batch.text_mask, frames < batch.lengths[:, None]], dim=1)
        hidden = self.dropout(joined)
        for layer in self.layers:
            hidden = layer(hidden, valid, stage, text.shape[1])
        return self.norm(hidden[:, text.shape[1] :], stage)

    def _speech(self, batch: NARBatch, stage: int) -> Float[Tensor, "B T D"]:
        """The sum of the embeddings of the codes that a stage may see, and of what the prompt has
        in like places."""
        device = batch.codes.device
        frames = torch.arange(batch.codes.shape[2], device=device)
        codebooks = torch.arange(batch.codes.shape[1], device=device)[:, None]
        prompt = frames < batch.prompt_lengths[:, None]  # (B, T)
        lower = (codebooks < stage).expand_as(batch.codes)
        rest = ~lower & prompt[:, None]
        if self.reference is None:
            return self._embedded(batch.codes, lower | rest)
        below, above = (self._embedded(batch.codes, part) for part in (lower, rest))
        valid = frames < batch.lengths[:, None]
        return below + above + self.reference(below, above, valid, prompt, stage)

    def _embedded(
        self, codes: Int[Tensor, "B Q T"], wanted: Bool[Tensor, "B Q T"]
    ) -> Float[Tensor, "B T D"]:
        """The sum of the embeddings of each frame's wanted codes."""
        rows = codes + torch.tensor(self._starts[:-1], device=codes.device)[:, None]
        summed = self.codes(
            rearrange(rows, "b q t -> (b t) q"),
            per_sample_weights=rearrange(wanted, "b q t -> (b t) q").to(self.codes.weight.dtype),
        )
        return rearrange(summed, "(b t) d -> b t d", b=len(codes))

    def _logits(self, hidden: Float[Tensor, "N D"], stage: int) -> Float[Tensor, "N K"]:
        return self.head(hidden, slice(self._starts[stage], self._starts[stage + 1]))

    def _place(self, features: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Adds sinusoids; text and speech each count from 0: padding between them is no matter."""
        half = self.config.width // 2
        positions = torch.arange(features.shape[1], device=features.device, dtype=torch.float32)
        rates = torch.exp(torch.arange(half, device=features.device) * (-math.log(1e4) / half))
        angles = positions[:, None] * rates
        return features + torch.cat([angles.sin(), angles.cos()], dim=1).to(features.dtype)

    @torch.no_grad()
    def decode(
        self,
        texts: Sequence[str],
        prompts: Sequence[Int[np.ndarray, "Q _"]],
        first: Sequence[Int[np.ndarray, " _"]],
        *,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Int[np.ndarray, "Q _"]]:
        """Codes (Q, T) of the new part from its codebook 1.

        `texts` hold the prompt's transcript and the new text, or are empty; `prompts` the prompts'
        codes (Q, P), also of no frames; `first` codebook 1 of the new part (T,). A NAR that takes
        no texts is given none. What of the new part is finished belongs behind the prompt, with
        all its codebooks: it is context then, and a part that grows is completed piece by piece.

        Temperature 0 takes the likeliest code; above it, each item draws under its own seed.
        """
        assert not self.training
        if not self.takes_texts:
            texts = [""] * len(texts)
        joined = []
        for prompt, row in zip(prompts, first, strict=True):
            codes = np.zeros(
                (len(self.config.codebook_sizes), prompt.shape[1] + len(row)), np.int64
            )
            codes[:, : prompt.shape[1]] = prompt
            codes[0, prompt.shape[1] :] = row
            joined.append(codes)
        starts = [prompt.shape[1] for prompt in prompts]
        batch = nar_batch([text_bytes(text) for text in texts], joined, starts, [])
        device = self.head.weight.device
        batch = NARBatch(*(part.to(device) for part in batch))
        seeds = list(seeds) if seeds is not None else [0] * len(texts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        asked = _asked(batch)
        num_asked = asked.sum(1).tolist()
        for stage in range(1, len(self.config.codebook_sizes)):
            logits = self._logits(self._hidden(batch, stage)[asked], stage).float()
            items = zip(logits.split(num_asked), generators, strict=True)
            chosen = [_choose(one, temperature, generator) for one, generator in items]
            batch.codes[:, stage][asked] = torch.cat(chosen)
        codes = batch.codes.cpu().numpy()
        return [
            codes[row, :, start : one.shape[1]]
            for row, (start, one) in enumerate(zip(starts, joined, strict=True))
        ]

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", **download: Any
    ) -> "NAR":
        """Part of `from_pretrained`: every tensor is loaded, strictly."""
        folder = Path(model_id)
        if not folder.is_dir():
            keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {key: download[key] for key in keys if key in download}
            for name in FILES:
                folder = Path(hf_hub_download(model_id, name, **options)).parent
        return cls._read(folder).to(map_location)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "NAR":
        """For generation. Raises ValueError when the folder is not whole."""
        return cls._read(Path(folder)).to(dtype).eval().requires_grad_(False)

    @classmethod
    def _read(cls, folder: Path) -> "NAR":
        for name in FILES:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no NAR here ({name} is missing)")
        try:
            config = json.loads((folder / "config.json").read_text())
            if not isinstance(config, dict):
                raise ValueError("its config.json is no JSON object")
            tensors = load_file(folder / "model.safetensors")
            if "stages.weight" in tensors:
                raise ValueError("its norms are of an earlier revision; train it again")
            nar = cls(config)
            nar.load_state_dict(tensors)
        except (RuntimeError, TypeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: not a whole NAR: {reason[:300]}") from error
        return nar


def _asked(batch: NARBatch) -> Bool[Tensor, "B T"]:
    """Frames behind the prompt."""
    frames = torch.arange(batch.codes.shape[2], device=batch.codes.device)
    return (frames >= batch.prompt_lengths[:, None]) & (frames < batch.lengths[:, None])


def _choose(logits: Float[Tensor, "T K"], temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # On the CPU: a seed means the same on every machine.
    probabilities = torch.softmax(logits.cpu() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
