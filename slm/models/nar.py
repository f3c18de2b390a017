"""The NAR: codebooks 2 to Q, one after the other, by a bidirectional Transformer.

The input is the text and the speech: at each frame the sum of the embeddings of the codebooks below
the predicted one, within the prompt of all codebooks. The norms of each layer depend on the stage,
which is the predicted codebook, counted from 0.
"""

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

from codec.io import DAMAGE, apply_umask_to_weights, parse_json
from codec.weights import build_outline, check_shapes, stored_shapes
from slm.config import NARConfig
from slm.data.nar import NUM_TEXT_SYMBOLS, NARBatch, nar_batch, text_bytes
from slm.models.ar import Scores, score
from slm.models.attention import attend

FILES = ("config.json", "model.safetensors")
EMBEDDING_STD = 0.5
"""Like the sinusoids', so that contents and position have equal weight."""
BISECTION_STEPS = 40
"""Of the search for the bandwidth of label smoothing."""


class StageHead(nn.Module):
    """The output heads of all codebooks in one table."""

    def __init__(self, width: int, num_rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width).normal_(std=width**-0.5))

    def forward(self, hidden: Float[Tensor, "N D"], rows: slice) -> Float[Tensor, "N K"]:
        return functional.linear(hidden, self.weight[rows])


class AdaptiveNorm(nn.Module):
    """Layer norm with a scale and a shift for each stage, as offsets from 1 and 0."""

    def __init__(self, width: int, num_stages: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_stages, width))
        self.shift = nn.Parameter(torch.zeros(num_stages, width))

    def forward(self, hidden: Float[Tensor, "B L D"], stage: int) -> Float[Tensor, "B L D"]:
        normed = functional.layer_norm(hidden, hidden.shape[-1:])
        return normed * (1 + self.scale[stage]) + self.shift[stage]


class LocalConv(nn.Module):
    """Depthwise convolution over text and speech separately; padding is masked."""

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
    """Pre-norm Transformer layer: an optional convolution, attention to valid positions, and a
    feed-forward block."""

    def __init__(
        self, *, width: int, num_heads: int, feedforward: int, dropout: float, num_stages: int,
        kernel: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.nearby = LocalConv(width, kernel, num_stages) if kernel else None
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
        """`num_text`: text positions, before those of speech."""
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


class PromptMatching(nn.Module):
    """Adds to each frame the higher codebooks of similar prompt frames, by their lower codebooks.

    After voice conversion by nearest neighbors (kNN-VC, arXiv 2305.18975), with attention, whose
    query and key have one projection, so that similar frames match from the first step on.
    """

    def __init__(self, *, width: int, num_heads: int, kernel: int, num_stages: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaptiveNorm(width, num_stages)
        self.nearby = LocalConv(width, kernel, num_stages) if kernel else None
        self.place = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Projections that keep the scale of their input, so that attention is selective."""
        for linear in (self.place, self.value, self.output):
            linear.weight.normal_(std=linear.in_features**-0.5)

    def forward(
        self, below: Float[Tensor, "B T D"], above: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"], prompt: Bool[Tensor, "B T"], stage: int,
    ) -> Float[Tensor, "B T D"]:  # fmt: skip
        """The features that are added to each frame.

        Args:
            below: embeddings of the codebooks below the stage.
            above: embeddings of the prompt's other codebooks.
            valid: frames that are no padding.
            prompt: frames of the prompt; without any, about 0 is added.
            stage: the predicted codebook.
        """
        if self.nearby is not None:
            below = below + self.nearby(below, valid, stage, 0)
        # A frame of zeros in front, for frames without a similar one.
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
def smoothed_labels(entries: Float[Tensor, "K E"], perplexity: float) -> Float[Tensor, "K K"]:
    """Target distribution of each label over the codebook: a Gaussian of the entries' distance,
    whose bandwidth gives the wanted perplexity on average."""
    distances = torch.cdist(entries, entries).square()
    scale = distances.mean().clamp(min=1e-12)
    low, high = 1e-6, 10.0
    shares = torch.eye(len(entries))
    for _ in range(BISECTION_STEPS):
        middle = (low * high) ** 0.5
        shares = (-distances / (scale * middle)).softmax(dim=1)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean()
        low, high = (middle, high) if float(entropy.exp()) < perplexity else (low, middle)
    return shares


class NAR(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="parlance",
    tags=["text-to-speech"],
    license="apache-2.0",
):
    """Predicts a codebook from the text, the prompt and the codebooks below."""

    def __init__(self, config: NARConfig | dict[str, Any]):
        """`config`: a dict if read from config.json."""
        super().__init__()
        if isinstance(config, dict):
            config = NARConfig.from_json(config)
        sizes = config.codebook_sizes
        if len(sizes) < 2:
            raise ValueError(f"a NAR needs two codebooks or more, got codebook_sizes={sizes}")
        self.config = config
        self.groups = tuple(f"codebook_{stage + 1}" for stage in range(1, len(sizes)))
        # One table for all codebooks, so that each step's gradient reaches every parameter. A bag
        # sums a frame's codebooks without a tensor and a table gradient for each of them.
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
        self._smoothed: list[Float[Tensor, "K K"]] = []
        self.apply(_initialize)
        # Initialized last, so that the other parameters are the same with and without it.
        self.reference = None
        if config.prompt_matching:
            self.reference = PromptMatching(
                width=config.width,
                num_heads=config.num_heads,
                kernel=config.conv_kernel,
                num_stages=len(sizes),
            ).apply(_initialize)
            self.reference.reset_parameters()

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        apply_umask_to_weights(save_directory)

    @property
    def takes_texts(self) -> bool:
        """False for a NAR that was trained without texts (text_dropout 1)."""
        return self.config.text_dropout < 1

    @torch.no_grad()
    def init_from_codec(self, entries: Sequence[Float[Tensor, "_ E"]], seed: int) -> None:
        """Initialises code embeddings and heads from the codec's entries, (K, E) of each codebook,
        projected at random and scaled to the usual spread: similar codes start alike."""
        generator = torch.Generator().manual_seed(seed)
        width = self.config.width
        tables = ((self.codes.weight, EMBEDDING_STD), (self.head.weight, width**-0.5))
        for table, std in tables:
            projection = torch.randn(entries[0].shape[1], width, generator=generator)
            for start, book in zip(self._starts[:-1], entries, strict=True):
                rows = (book - book.mean(0)).cpu().float() @ projection
                table[start : start + len(book)] = rows * (std / rows.std().clamp(min=1e-6))
        if self.config.label_smoothing_neighbors:
            perplexity = self.config.label_smoothing_neighbors
            self._smoothed = [smoothed_labels(book.cpu().float(), perplexity) for book in entries]

    def forward(self, batch: NARBatch) -> Scores:
        """Losses over the frames after the prompt, for each of the batch's stages."""
        targets = _target_frames(batch)
        parts = []
        for stage in batch.stages.tolist():
            logits = self._logits(self._hidden(batch, stage)[targets], stage)
            labels = batch.codes[:, stage][targets]
            groups = torch.full_like(labels, stage - 1)
            parts.append(score(logits, labels, groups, len(self.groups), self._label_shares(stage)))
        return Scores(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)))

    def _label_shares(self, stage: int) -> Float[Tensor, "K K"] | None:
        """Smoothed labels in training; None: one-hot."""
        if not self.training or not self._smoothed:
            return None
        # Moved once. Not a buffer, since it follows from the codec.
        self._smoothed[stage] = self._smoothed[stage].to(self.head.weight.device)
        return self._smoothed[stage]

    def _hidden(self, batch: NARBatch, stage: int) -> Float[Tensor, "B T D"]:
        """Output features of the speech positions."""
        kinds = self.kinds(torch.arange(2, device=batch.text.device))
        text = self.text(batch.text) + kinds[0]
        speech = self._speech(batch, stage) + kinds[1]
        joined = torch.cat([self._positioned(text), self._positioned(speech)], dim=1)
        frames = torch.arange(speech.shape[1], device=speech.device)
        valid = torch.cat([batch.text_mask, frames < batch.lengths[:, None]], dim=1)
        hidden = self.dropout(joined)
        for layer in self.layers:
            hidden = layer(hidden, valid, stage, text.shape[1])
        return self.norm(hidden[:, text.shape[1] :], stage)

    def _speech(self, batch: NARBatch, stage: int) -> Float[Tensor, "B T D"]:
        """Input of the speech positions: the sum of their visible codes' embeddings, and the output
        of prompt matching."""
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
        self, codes: Int[Tensor, "B Q T"], selected: Bool[Tensor, "B Q T"]
    ) -> Float[Tensor, "B T D"]:
        """The sum of the embeddings of each frame's selected codes."""
        rows = codes + torch.tensor(self._starts[:-1], device=codes.device)[:, None]
        summed = self.codes(
            rearrange(rows, "b q t -> (b t) q"),
            per_sample_weights=rearrange(selected, "b q t -> (b t) q").to(self.codes.weight.dtype),
        )
        return rearrange(summed, "(b t) d -> b t d", b=len(codes))

    def _logits(self, hidden: Float[Tensor, "N D"], stage: int) -> Float[Tensor, "N K"]:
        return self.head(hidden, slice(self._starts[stage], self._starts[stage + 1]))

    def _positioned(self, features: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Adds sinusoidal positions; text and speech each count from 0."""
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
        """Codes (Q, T) of new parts from their codebook 1.

        Args:
            texts: the prompt's transcript and the new text, or empty; ignored by a NAR without
                texts.
            prompts: codes (Q, P) of the prompts, also of no frames. Finished frames of a new part
                belong here too: it can be decoded in chunks.
            first: codebook 1 (T,) of the new parts.
            temperature: of the softmax; 0: greedy.
            seeds: one for each item.
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
        targets = _target_frames(batch)
        num_targets = targets.sum(1).tolist()
        for stage in range(1, len(self.config.codebook_sizes)):
            logits = self._logits(self._hidden(batch, stage)[targets], stage).float()
            items = zip(logits.split(num_targets), generators, strict=True)
            chosen = [_choose(one, temperature, generator) for one, generator in items]
            batch.codes[:, stage][targets] = torch.cat(chosen)
        codes = batch.codes.cpu().numpy()
        return [
            codes[row, :, start : one.shape[1]]
            for row, (start, one) in enumerate(zip(starts, joined, strict=True))
        ]

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", **download: Any
    ) -> "NAR":
        """Hook of `from_pretrained`; loads all tensors, strictly."""
        folder = Path(model_id)
        if not folder.is_dir():
            keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {key: download[key] for key in keys if key in download}
            for name in FILES:
                folder = Path(hf_hub_download(model_id, name, **options)).parent
        return cls._read(folder).to(map_location)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "NAR":
        """For inference. Raises ValueError for a folder that is incomplete or damaged."""
        return cls._read(Path(folder)).to(dtype).eval().requires_grad_(False)

    @classmethod
    def _read(cls, folder: Path) -> "NAR":
        for name in FILES:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no NAR here ({name} is missing)")
        try:
            config = parse_json((folder / "config.json").read_text())
            if not isinstance(config, dict):
                raise ValueError("its config.json is no JSON object")
            file = folder / "model.safetensors"
            shapes = stored_shapes(file)
            if "stages.weight" in shapes:
                raise ValueError("its norms are of an earlier revision; train it again")
            outline = build_outline(lambda: cls(config), len(shapes))
            check_shapes(outline, shapes, file)
            nar = cls(config)
            nar.load_state_dict(load_file(file))
        except (*DAMAGE, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: incomplete or damaged NAR: {reason[:300]}") from error
        return nar


def _target_frames(batch: NARBatch) -> Bool[Tensor, "B T"]:
    """Frames after the prompt."""
    frames = torch.arange(batch.codes.shape[2], device=batch.codes.device)
    return (frames >= batch.prompt_lengths[:, None]) & (frames < batch.lengths[:, None])


def _choose(logits: Float[Tensor, "T K"], temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # On the CPU, so that a seed gives the same codes on every machine.
    probabilities = torch.softmax(logits.cpu() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
