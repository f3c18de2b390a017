"""New rows that begin as the letters that their codes say.

A code of a semantic codebook often says one letter or two. Rows drawn at random tell the LLM
nothing of that; rows that begin as a mixture of the letters' own let it follow a text in its speech
with what it can already do: find the place where the same stood before.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from codec.tokens import written_whole
from slm.alphabet import Alphabet

logger = logging.getLogger(__name__)


class Letters(NamedTuple):
    """How much of each letter every code says; recipes/make_clips.py writes them."""

    letters: str
    shares: Float[np.ndarray, "K L"]
    """Column 0 is a word's end, the others are the letters'."""

    def save(self, path: str | Path) -> None:
        record = {"letters": self.letters, "shares": np.round(self.shares, 4).tolist()}
        with written_whole(Path(path)) as temporary:
            temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Letters":
        """Raises ValueError for a file that is missing or none of these."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            letters, shares = record["letters"], np.array(record["shares"], dtype=np.float32)
            if shares.ndim != 2 or shares.shape[1] != len(letters) + 1:
                raise ValueError("a row must have a share for each letter and a word's end")
            if not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1:
                raise ValueError("shares lie in [0, 1]")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: no letters of codes ({error}); recipes/make_clips.py writes them"
            ) from error
        return cls(letters, shares)


def spell_rows(lm: Any, alphabet: Alphabet, path: str | Path | None) -> None:
    """Adds to the new row of each code of codebook 1 what its letters' rows are apart from the mean
    of the text rows, by the shares of a file of letters (None: nothing); in place, before any
    adapter. A merge of several codes gets the mean of what they get.

    Raises ValueError where the codebook has another size, or the LLM cannot spell a letter.
    """
    if path is None:
        return
    letters, vocabulary = Letters.load(path), alphabet.vocabulary
    if len(letters.shares) != vocabulary.codebook_size:
        raise ValueError(
            f"ar.letters is of {len(letters.shares)} codes, but codebook 1 has "
            f"{vocabulary.codebook_size}; make the letters of these tokens"
        )
    if "characters" not in (alphabet.text.spoken, alphabet.text.written):
        logger.warning(
            "ar.letters helps little where neither text.spoken nor .written is characters"
        )
    try:
        ids = alphabet.spelling_ids([" ", *letters.letters])
    except ValueError as error:
        raise ValueError(f"ar.letters: {error}; or leave ar.letters out") from error
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    pieces, units = np.arange(vocabulary.num_pieces), alphabet.pieces
    made_of = [row if units is None else units.decode(row) for row in pieces[:, None]]
    shares = torch.from_numpy(np.stack([letters.shares[codes].mean(0) for codes in made_of]))
    new_rows = torch.from_numpy(vocabulary.encode_pieces(pieces))
    with torch.no_grad():
        for table in tables:
            rows = torch.stack([table.weight[one].float().mean(0) for one in ids])
            apart = rows - table.weight[: vocabulary.num_text].float().mean(0)
            said = shares.to(apart) @ apart
            table.weight[new_rows] += said.to(table.weight.dtype)
