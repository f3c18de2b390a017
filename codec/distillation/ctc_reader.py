"""A small network that reads letters from codes of codebook 1, and when each word is said.

recipes/train_semantic.py trains it with the semantic codebook. It needs no codec: it brings the
entries that the codes stand for. What it reads is a measure of the codes (a recogniser by CTC,
Graves et al. 2006); its alignment (Kuerzinger et al. 2020, arXiv 2007.09127) cuts training data.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Integer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codec.distillation.word_alignment import fill_gaps, runs
from codec.io import atomic_files
from codec.modules.layers import ConvNeXtBlock

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
BLANK, SPACE = 0, 1
"""CTC's blank and the end of a word; letters follow."""
STEPS = 2
"""Letters that a frame can hold, at least: fast speech has more than 20 a second."""
DEPTH, KERNEL = 2, 5
"""ConvNeXt blocks of the reader, and frames of their depthwise convolutions."""


def letters_of(texts: Sequence[str]) -> str:
    """The letters of transcripts, sorted: what is read is spelt in them."""
    found = set().union(*(set(plain(text)) for text in texts))
    return "".join(sorted(one for one in found - {" "} if not _is_number(one)))


def spell(text: str, letters: str) -> list[int] | None:
    """Labels of a transcript, from 1 on; None where it says nothing, or has what cannot be spelt,
    such as a digit: nobody knows how it was read."""
    words = plain(text)
    if not words or any(_is_number(one) or one not in letters + " " for one in words):
        return None
    return [SPACE if letter == " " else letters.index(letter) + 2 for letter in words]


def _is_number(letter: str) -> bool:
    """Digits and the like; words for numbers are letters, Han ones too."""
    return unicodedata.category(letter)[0] == "N"


def num_steps(labels: Sequence[int]) -> int:
    """How many steps a CTC path through these labels has at least."""
    return len(labels) + sum(one == two for one, two in pairwise(labels))


def plain(text: str) -> str:
    """In small letters, without punctuation; apostrophes are letters, hyphens end words."""
    small = unicodedata.normalize("NFC", text.lower().replace(APOSTROPHE, "'"))
    kept = [
        letter if letter == "'" or unicodedata.category(letter)[0] in "LMN" else " "
        for letter in small
    ]
    return " ".join("".join(kept).split())


class Reader(nn.Module):
    """A small network that spells what entries of the semantic codebook say."""

    def __init__(self, dimension: int, width: int, letters: str) -> None:
        """`dimension` of the entries, `width` of the network."""
        super().__init__()
        self.letters = letters
        self.embed = nn.Conv1d(dimension, width, 1)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(width, kernel=KERNEL, scale=1 / DEPTH) for _ in range(DEPTH)
        )
        self.widen = nn.Conv1d(width, STEPS * width, 1)
        self.fine = ConvNeXtBlock(width, kernel=KERNEL, scale=1.0)
        self.spell = nn.Linear(width, len(letters) + 2)

    def forward(
        self, entries: Float[Tensor, "B D T"], mask: Float[Tensor, "B 1 T"]
    ) -> tuple[Float[Tensor, "B N V"], Float[Tensor, "B C T"]]:
        """Log probabilities of the labels, N = STEPS * T, and the states before they are spelt."""
        x = self.embed(entries)
        for block in self.blocks:
            x = block(x, mask)
        fine = rearrange(self.widen(x), "b (s c) t -> b c (t s)", s=STEPS)
        fine = self.fine(fine, mask.repeat_interleave(STEPS, dim=-1))
        return self.spell(fine.mT).float().log_softmax(-1), x


class CodeReader(nn.Module):
    """A trained reader and the entries that the codes stand for.

    Its folder holds reader.json and reader.safetensors.
    """

    entries: Tensor

    def __init__(self, reader: Reader, entries: Float[Tensor, "K D"]) -> None:
        super().__init__()
        self.reader = reader
        self.register_buffer("entries", entries.detach().clone())
        self.eval()

    @torch.inference_mode()
    def heard(self, codes: Integer[np.ndarray, " T"]) -> Float[Tensor, "N V"]:
        """Log probabilities of the labels, STEPS a frame. ValueError for codes it does not know."""
        if codes.size and int(codes.max()) >= len(self.entries):
            raise ValueError(
                f"code {int(codes.max())} of a codebook of {len(self.entries)} entries; the reader "
                "belongs to another codec"
            )
        if not codes.size:
            return self.entries.new_zeros(0, self.reader.spell.out_features)
        found = self.entries[torch.from_numpy(codes.astype(np.int64))]
        return self.reader(found.T[None], found.new_ones(1, 1, len(found)))[0][0]

    def read(self, codes: Integer[np.ndarray, " T"]) -> str:
        """What the codes say, in small letters."""
        best = self.heard(codes).argmax(-1).unique_consecutive().tolist()
        spelt = (" " if one == SPACE else self.reader.letters[one - 2] for one in best if one)
        return " ".join("".join(spelt).split())

    def word_edges(self, codes: Integer[np.ndarray, " T"], text: str) -> list[int]:
        """Frames between which each word of `text.split()` is said: one more than words, the first
        0, the last T; pauses are halved between their neighbours.

        Raises ValueError for a text that cannot be spelt, or is too long to be said in T frames.
        """
        from torchaudio.functional import forced_align

        labels: list[int] = []
        owners: list[int] = []
        words = text.split()
        for index, word in enumerate(words):
            spelt = spell(word, self.reader.letters)
            if spelt is None and any(one.isalnum() for one in word):
                raise ValueError(f"{word!r} cannot be spelt in the reader's letters")
            if spelt and labels:
                labels, owners = [*labels, SPACE], [*owners, -1]
            labels += spelt or []
            owners += [index] * len(spelt or [])
        steps = STEPS * len(codes)
        if not labels or num_steps(labels) > steps:
            raise ValueError(f"{len(labels)} letters cannot be said in {len(codes)} frames")
        heard = self.heard(codes)[None].contiguous()
        path, _ = forced_align(heard, torch.tensor([labels], dtype=torch.int32), blank=BLANK)
        found: dict[int, tuple[int, int]] = {}
        owner = iter(owners)
        for label, start, stop in runs(path[0].tolist()):
            if label != BLANK and (word := next(owner)) >= 0:
                found[word] = (found.get(word, (start, 0))[0], stop)
        spans = fill_gaps([found.get(index) for index in range(len(words))], steps)
        between = [(one[1] + two[0]) / (2 * STEPS) for one, two in pairwise(spans)]
        return [0, *(round(edge) for edge in between), len(codes)]

    def letter_shares(self, many: Iterable[np.ndarray]) -> Float[np.ndarray, "K L"]:
        """How much of each letter (column 0: of a word's end) each code says: over the frames that
        have it, the mean chance that one of the frame's steps is that letter. `many` are codes of
        utterances, (T,) each."""
        size = len(self.entries)
        sums, counts = torch.zeros(size, len(self.reader.letters) + 1), torch.zeros(size)
        for codes in many:
            chances = rearrange(self.heard(codes).exp(), "(t s) l -> t s l", s=STEPS)
            said = 1 - (1 - chances[..., SPACE:]).prod(1)
            index = torch.from_numpy(codes.astype(np.int64))
            sums.index_add_(0, index, said)
            counts.index_add_(0, index, torch.ones(len(index)))
        return (sums / counts.clamp(min=1)[:, None]).numpy()

    def save(self, folder: str | Path) -> None:
        """Both files, whole or not at all."""
        about = {"letters": self.reader.letters, "width": self.reader.embed.out_channels}
        with atomic_files(Path(folder)) as temporary:
            (temporary / "reader.json").write_text(json.dumps(about, indent=1) + "\n")
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()},
                temporary / "reader.safetensors",
            )

    @classmethod
    def load(cls, folder: str | Path) -> "CodeReader":
        """Raises ValueError for a folder without a whole reader."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "reader.json").read_text())
            state = load_file(folder / "reader.safetensors")
            entries = state["entries"]
            made = cls(Reader(entries.shape[1], about["width"], about["letters"]), entries)
            made.load_state_dict(state)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder}: no whole reader of codes ({type(error).__name__}); "
                "recipes/train_semantic.py makes one beside its codec"
            ) from error
        return made
