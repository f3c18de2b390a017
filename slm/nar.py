"""The NAR: codebooks 2 to Q in one pass each, by a bidirectional Transformer.

A position of the speech part is the sum of the embeddings of the codebooks below the predicted one;
of every codebook within the prompt. Each layer's norms are adapted to the stage, which is the
codebook predicted, counted from 0.
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

from slm.ar import Scores, score
from slm.config import NARConfig
from slm.nar_data import NUM_TEXT_SYMBOLS, NARBatch, nar_batch, text_bytes

FILES = ("config.json", "model.safetensors")


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
        # One table for all codebooks: then every step's gradient reaches every parameter.
        self._starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self.text = nn.Embedding(NUM_TEXT_SYMBOLS, config.width)
        self.codes = nn.Embedding(sum(sizes), config.width)
        self.stages = nn.Embedding(len(sizes), config.width)
        self.kinds = nn.Embedding(2, config.width)
        self.layers = nn.ModuleList(
            Layer(
                width=config.width,
                num_heads=config.num_heads,
                feedforward=config.feedforward,
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        )
        self.norm = AdaptiveNorm(config.width)
        self.head = StageHead(config.width, sum(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)

    def forward(self, batch: NARBatch) -> Scores:
        """Losses over the frames behind the prompt, summed over the batch's stages."""
        frames = torch.arange(batch.codes.shape[2], device=batch.codes.device)
        target = (frames >= batch.prompt_lengths[:, None]) & (frames < batch.lengths[:, None])
        parts = []
        for stage in batch.stages.tolist():
            logits = self._logits(self._hidden(batch, stage)[target], stage)
            labels = batch.codes[:, stage][target]
            parts.append(
                score(logits, labels, torch.full_like(labels, stage - 1), len(self.groups))
            )
        return Scores(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)))

    def _hidden(self, batch: NARBatch, stage: int) -> Float[Tensor, "B T D"]:
        """Features of the speech part."""
        frames = torch.arange(batch.codes.shape[2], device=batch.codes.device)
        in_prompt = (frames < batch.prompt_lengths[:, None])[..., None]  # (B, T, 1)
        speech = torch.zeros((), device=batch.codes.device)
        for codebook in range(batch.codes.shape[1]):
            embedded = self.codes(batch.codes[:, codebook] + self._starts[codebook])
            speech = speech + (embedded if codebook < stage else embedded * in_prompt)
        kinds = self.kinds(torch.arange(2, device=frames.device))
        text = self.text(batch.text) + kinds[0]
        joined = torch.cat([self._place(text), self._place(speech + kinds[1])], dim=1)
        valid = torch.cat([batch.text_mask, frames < batch.lengths[:, None]], dim=1)
        condition = self.stages(torch.tensor(stage, device=frames.device))
        hidden = self.dropout(joined)
        for layer in self.layers:
            hidden = layer(hidden, valid[:, None, None], condition)
        return self.norm(hidden[:, text.shape[1] :], condition)

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

        `texts` hold the prompt's transcript and the new text, `prompts` the prompts' codes (Q, P),
        `first` codebook 1 of the new part (T,). Temperature 0 takes the likeliest code; above it,
        each item draws under its own seed.
        """
        assert not self.training
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
        batch = NARBatch(*(tensor.to(self.head.weight.device) for tensor in batch))
        seeds = list(seeds) if seeds is not None else [0] * len(texts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for stage in range(1, len(self.config.codebook_sizes)):
            hidden = self._hidden(batch, stage)
            for row, (start, codes) in enumerate(zip(starts, joined, strict=True)):
                logits = self._logits(hidden[row, start : codes.shape[1]], stage)
                chosen = _choose(logits.float().cpu(), temperature, generators[row])
                batch.codes[row, stage, start : codes.shape[1]] = chosen.to(batch.codes.device)
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
            nar = cls(config)
            nar.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, TypeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: not a whole NAR: {reason[:300]}") from error
        return nar


def _choose(logits: Float[Tensor, "T K"], temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0 or not len(logits):
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class StageHead(nn.Module):
    """One table for the heads of all codebooks; a call computes the logits of some of its rows."""

    def __init__(self, width: int, num_rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width).normal_(std=width**-0.5))

    def forward(self, hidden: Float[Tensor, "N D"], rows: slice) -> Float[Tensor, "N K"]:
        return functional.linear(hidden, self.weight[rows])


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift depend on the stage."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Linear(width, 2 * width)

    def forward(
        self, hidden: Float[Tensor, "B L D"], condition: Float[Tensor, " D"]
    ) -> Float[Tensor, "B L D"]:
        scale, shift = self.project(condition).chunk(2)
        return functional.layer_norm(hidden, hidden.shape[-1:]) * (1 + scale) + shift


class Layer(nn.Module):
    """Pre-norm attention over valid positions, and a feed-forward part."""

    def __init__(self, *, width: int, num_heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = AdaptiveNorm(width)
        self.feedforward_norm = AdaptiveNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B 1 1 L"],
        condition: Float[Tensor, " D"],
    ) -> Float[Tensor, "B L D"]:
        projected = self.query_key_value(self.attention_norm(hidden, condition))
        query, key, value = rearrange(
            projected, "b l (n h d) -> n b h l d", n=3, h=self.num_heads
        ).unbind()
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=valid)
        hidden = hidden + self.dropout(self.output(rearrange(attended, "b h l d -> b l (h d)")))
        inner = functional.gelu(self.expand(self.feedforward_norm(hidden, condition)))
        return hidden + self.dropout(self.contract(self.dropout(inner)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        # As strong as the sinusoids, so that what is said counts beside where.
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
