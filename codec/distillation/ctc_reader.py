"""A CTC recognizer over the codes of codebook 1, and the alignment of transcripts with codes.

recipes/train_semantic.py trains it together with the semantic codebook. It holds a copy of the
codebook's entries, so it needs no codec. Its character error rate measures how much text the codes
hold; its forced alignment gives word boundaries in frames. Sources: CTC, Graves et al. 2006;
alignment, Kuerzinger et al. 2020 (arXiv 2007.09127).
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

from codec.distillation.word_alignment import align_ctc
from codec.io import DAMAGE, atomic_files, parse_json
from codec.modules.layers import ConvNeXtBlock
from codec.program import reason_of
from codec.weights import build_outline, check_shapes, stored_shapes

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
BLANK, SPACE = 0, 1
"""Labels of CTC's blank and of the word separator; letters follow."""
STEPS = 2
"""CTC steps per frame, so a frame may hold two letters: fast speech has more than 20 a second."""
DEPTH, KERNEL = 2, 5
"""ConvNeXt blocks of the network, and kernel size of their depthwise convolutions in frames."""


def normalize_transcript(text: str) -> str:
    """Lower case, without punctuation; apostrophes are letters, hyphens separate words."""
    text = unicodedata.normalize("NFC", text.lower().replace(APOSTROPHE, "'"))
    kept = [
        letter if letter == "'" or unicodedata.category(letter)[0] in "LMN" else " "
        for letter in text
    ]
    return " ".join("".join(kept).split())


def _is_number(letter: str) -> bool:
    """Whether it is a digit or the like; Han numerals are letters."""
    return unicodedata.category(letter)[0] == "N"


def letters_in(texts: Sequence[str]) -> str:
    """The letters of transcripts, sorted: the vocabulary of a recognizer."""
    found = set().union(*(set(normalize_transcript(text)) for text in texts))
    return "".join(sorted(one for one in found - {" "} if not _is_number(one)))


def transcript_labels(text: str, letters: str) -> list[int] | None:
    """Labels of a transcript, from 1 on.

    None where no letter is left, and for a character that is not in `letters`, such as a digit,
    whose pronunciation is unknown.
    """
    text = normalize_transcript(text)
    if not text or any(_is_number(one) or one not in letters + " " for one in text):
        return None
    return [SPACE if letter == " " else letters.index(letter) + 2 for letter in text]


class RecognizerNetwork(nn.Module):
    """Codebook entries to log probabilities of labels: ConvNeXt blocks and a linear layer."""

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
        """Log probabilities of the labels, N = STEPS * T, and the hidden states of the frames."""
        x = self.embed(entries)
        for block in self.blocks:
            x = block(x, mask)
        fine = rearrange(self.widen(x), "b (s c) t -> b c (t s)", s=STEPS)
        fine = self.fine(fine, mask.repeat_interleave(STEPS, dim=-1))
        return self.spell(fine.mT).float().log_softmax(-1), x


class CodeRecognizer(nn.Module):
    """A trained `RecognizerNetwork` with the codebook entries (K,D) that it was trained on.

    Its folder holds reader.json and reader.safetensors.
    """

    entries: Tensor

    def __init__(self, network: RecognizerNetwork, entries: Float[Tensor, "K D"]) -> None:
        super().__init__()
        self.reader = network  # The name is that of the tensors in reader.safetensors.
        self.register_buffer("entries", entries.detach().clone())
        self.eval()

    @property
    def letters(self) -> str:
        """The letters of labels 2, 3, ..."""
        return self.reader.letters

    @torch.inference_mode()
    def log_probs(self, codes: Integer[np.ndarray, " T"]) -> Float[Tensor, "N V"]:
        """Log probabilities of the labels, N = STEPS * T.

        Raises:
            ValueError: a code is outside the codebook.
        """
        if codes.size and int(codes.max()) >= len(self.entries):
            raise ValueError(
                f"code {int(codes.max())} of a codebook of {len(self.entries)} entries; the "
                "recognizer belongs to another codec"
            )
        if not codes.size:
            return self.entries.new_zeros(0, len(self.letters) + 2)
        found = self.entries[torch.from_numpy(codes.astype(np.int64))]
        return self.reader(found.T[None], found.new_ones(1, 1, len(found)))[0][0]

    def transcribe(self, codes: Integer[np.ndarray, " T"]) -> str:
        """Text of greedy CTC decoding, in lower case."""
        best = self.log_probs(codes).argmax(-1).unique_consecutive().tolist()
        text = "".join(" " if one == SPACE else self.letters[one - 2] for one in best if one)
        return " ".join(text.split())

    def word_boundaries(self, codes: Integer[np.ndarray, " T"], text: str) -> list[int]:
        """Frames between the words of `text.split()`, by forced alignment: one more than words.

        The first is 0, the last T; a pause is divided equally between its neighbors.

        Raises:
            ValueError: the text has no letters or other ones than `letters`, or more than fit into
                T frames.
        """
        words = text.split()
        labels = []
        for word in words:
            found = transcript_labels(word, self.letters)
            if found is None and any(one.isalnum() for one in word):
                raise ValueError(f"{word!r} has characters that are not among the recognizer's")
            labels.append(found or [])
        if not any(labels):
            raise ValueError(f"{text!r} has no letters")
        spans = align_ctc(self.log_probs(codes), labels, blank=BLANK, separator=SPACE)
        between = [(one[1] + two[0]) / (2 * STEPS) for one, two in pairwise(spans)]
        return [0, *(round(edge) for edge in between), len(codes)]

    def letter_shares(self, utterances: Iterable[np.ndarray]) -> Float[np.ndarray, "K L"]:
        """Mean probability that a frame of code k contains letter l; column 0: the word separator.

        `utterances` are codes, (T,) each. Codes that do not occur have zeros.
        """
        size = len(self.entries)
        sums, counts = torch.zeros(size, len(self.letters) + 1), torch.zeros(size)
        for codes in utterances:
            probs = rearrange(self.log_probs(codes).exp(), "(t s) l -> t s l", s=STEPS)
            contained = 1 - (1 - probs[..., SPACE:]).prod(1)
            index = torch.from_numpy(codes.astype(np.int64))
            sums.index_add_(0, index, contained)
            counts.index_add_(0, index, torch.ones(len(index)))
        return (sums / counts.clamp(min=1)[:, None]).numpy()

    def save(self, folder: str | Path) -> None:
        """Writes reader.json and reader.safetensors, atomically."""
        about = {"letters": self.letters, "width": self.reader.embed.out_channels}
        with atomic_files(Path(folder)) as temporary:
            (temporary / "reader.json").write_text(json.dumps(about, indent=1) + "\n")
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()},
                temporary / "reader.safetensors",
            )

    @classmethod
    def load(cls, folder: str | Path) -> "CodeRecognizer":
        """The recognizer of a folder.

        Raises:
            ValueError: the folder has no complete recognizer.
        """
        folder = Path(folder)
        try:
            about = parse_json((folder / "reader.json").read_text())
            file = folder / "reader.safetensors"
            shapes = stored_shapes(file)

            def build() -> CodeRecognizer:
                size, dimension = shapes["entries"]
                network = RecognizerNetwork(dimension, about["width"], about["letters"])
                return cls(network, torch.zeros(size, dimension))

            check_shapes(build_outline(build, len(shapes)), shapes, file)
            recognizer = build()
            recognizer.load_state_dict(load_file(file))
        except (*DAMAGE, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder}: no complete recognizer of codes ({reason_of(error)}); "
                "recipes/train_semantic.py writes one"
            ) from error
        return recognizer
