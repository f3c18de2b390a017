"""Scripts and characters of the training texts, to which the model's input is limited."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from codec.io import DAMAGE, atomic_file, parse_json
from codec.program import reason_of
from codec.transcripts import check_unicode, has_words
from slm.config import from_json
from slm.tokenization.text_normalization import SIGN_LETTERS, clean_text, script_of

logger = logging.getLogger(__name__)

COVERAGE_FILE = "coverage.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Scripts and characters of the training texts, and the longest training utterance."""

    scripts: tuple[str, ...]
    characters: str
    """All characters that occur, sorted."""
    longest_frames: int
    """Frames of the longest training utterance."""

    @classmethod
    def of(cls, texts: Iterable[str], longest_frames: int) -> "Coverage":
        """Of training texts."""
        characters = sorted(set().union(*map(set, texts)))
        scripts = sorted({script_of(letter) for letter in characters if letter.isalpha()})
        return cls(
            scripts=tuple(scripts), characters="".join(characters), longest_frames=longest_frames
        )

    def check(self, text: str, what: str = "the text") -> None:
        """Raises ValueError for a text without a letter or digit, with an unknown script, or with
        half of a surrogate pair."""
        check_unicode(text, what)
        if not has_words(text):
            raise ValueError(f"{what} {text!r} has no words; give it a letter or a digit")
        for letter in clean_text(text):
            known = letter in SIGN_LETTERS or script_of(letter) in self.scripts
            if letter.isalpha() and not known:
                raise ValueError(
                    f"{what} has {letter!r} of the script {script_of(letter)}; this model was "
                    f"trained on {', '.join(self.scripts)}"
                )

    def log_unseen(self, text: str) -> None:
        """Logs the characters that no training text has."""
        unseen = sorted({c for c in text if not c.isspace()} - set(self.characters))
        if unseen:
            logger.warning("characters that no training text has: %s", " ".join(unseen))

    def check_length(
        self, prompt: int, least: int, frame_rate: float, what: str = "the text"
    ) -> None:
        """Raises ValueError if `prompt` frames and at least `least` more exceed all training."""
        if prompt + least > self.longest_frames:
            raise ValueError(
                f"{what} is too long for the model: {prompt / frame_rate:.1f} s of prompt and at "
                f"least {least / frame_rate:.1f} s of speech, but it was trained on no more than "
                f"{self.longest_frames / frame_rate:.1f} s; split the text or shorten the prompt"
            )

    def save(self, folder: str | Path) -> None:
        """Writes coverage.json."""
        with atomic_file(Path(folder) / COVERAGE_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Coverage":
        """Raises ValueError for a missing or damaged file."""
        path = Path(folder) / COVERAGE_FILE
        try:
            return from_json(cls, parse_json(path.read_text()))
        except DAMAGE as error:
            raise ValueError(
                f"{path}: missing or damaged ({reason_of(error)}); save the voice again"
            ) from error
