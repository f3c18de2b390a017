"""From a text and a prompt to what the models are given, checked."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torchaudio.functional import edit_distance

from slm.ar import SpeechLM
from slm.config import SamplingConfig
from slm.generate import restrict_speech, speech_bounds
from slm.interleaving import script_of
from slm.long_text import Passage, Piece, room_behind, split_text
from slm.pieces import split_at_quiet
from slm.prompts import NO_SCRIPT, Prompt, has_words, in_small_letters, join_texts, tts_context
from slm.selfcheck import can_transcribe, transcripts
from slm.speaking import Models, Utterance
from slm.spelling import normalize

WORDS_PER_SECOND = 2.7
"""Of read English."""
PROMPT_SHARE = 1 / 2
"""A prompt has no more of the longest training utterance: the rest is for what is said."""


def longest_prompt(seconds: float, models: Models) -> float:
    """Seconds of a prompt that speech can follow: as many as told, or a share of the longest
    training utterance."""
    longest = models.coverage.longest_frames / models.lm.vocabulary.codec.frame_rate
    return min(seconds, longest * PROMPT_SHARE)


def beginning(wave: Float[np.ndarray, " S"], most: int) -> Float[np.ndarray, " s"]:
    """At most so many samples, cut where it is quiet: half a word would be no word of the text."""
    return wave if len(wave) <= most else next(split_at_quiet([wave], most))


def prepare(
    models: Models, text: str, prompt: Prompt, seed: int, sampling: SamplingConfig
) -> Utterance:
    """One utterance; see `Voice.prepare`."""
    lm, codec = models.lm, models.codec
    check_speaks(models)
    check_text(models, text)
    prompt.check(codec.codebook_sizes)
    if not prompt.continuation:
        check_text(models, prompt.text, "the prompt's text")
    alphabet = lm.alphabet
    (ids,) = alphabet.text_ids("tts", [join_texts(prompt.text, text)])
    speech = alphabet.speech_ids("tts", prompt.codes[0])
    context = tts_context(alphabet.vocabulary, ids, speech)
    num_tokens = alphabet.num_tokens(text)
    least, most = speech_bounds(num_tokens, codec.frame_rate, sampling)
    spoken = prompt.codes.shape[1]
    if prompt.continuation:
        least, most = max(0, least - spoken), max(1, most - spoken)
    script = NO_SCRIPT
    if alphabet.text.interleaved:
        # What has no letter is no word to say; the whole text has it.
        words = [word for word in alphabet.spelt(text).split() if has_words(word)]
        if prompt.continuation:
            said = num_said(lm, alphabet.in_words(text).split(), prompt.codes[0])
            words = words[min(said, len(words) - 1) :]
        lead, script = script_of(alphabet, words)
        context += lead
    most = restrict_speech(lm, [*context, *script.ids], least, most, "text")
    models.coverage.check_length(spoken, least, codec.frame_rate)
    return Utterance(
        text=text, prompt=prompt, context=context, bounds=(least, most), seed=seed, script=script
    )


def num_said(lm: SpeechLM, words: Sequence[str], codes: Int[np.ndarray, " T"]) -> int:
    """How many of the words the codes, which begin with them, have said: as many as are the
    likest to what the model itself hears in them; one that does not hear goes by their time."""
    if not can_transcribe(lm):
        seconds = len(codes) / lm.vocabulary.codec.frame_rate
        return min(round(seconds * WORDS_PER_SECOND), len(words))
    heard = transcripts(lm, [codes])[0].lower()
    begun = [" ".join(words[:count]).lower() for count in range(len(words) + 1)]
    distances = [edit_distance(text, heard) for text in begun]
    return min(range(len(begun)), key=lambda count: distances[count])


def passage(
    models: Models, text: str, prompt: Prompt, seed: int, sampling: SamplingConfig
) -> Passage:
    """A text of any length; see `Voice.passage`."""
    check_speaks(models)
    check_text(models, text)
    prompt.check(models.codec.codebook_sizes)
    pieces = [Piece(text, 0.0)]
    if not prompt.continuation:
        fits = room_behind(prompt, models, sampling)
        # What is said at once stays as it is.
        pieces = pieces if fits(text) else split_text(text, fits)
    utterances = [prepare(models, piece.text, prompt, seed, sampling) for piece in pieces]
    return Passage(text, utterances, [piece.pause for piece in pieces])


def check_speaks(models: Models) -> None:
    """Raises ValueError for models that only transcribe."""
    models.lm.check_task("tts")
    if models.nar is None and models.codec.num_codebooks > 1:
        raise ValueError("this voice has no nar/: it transcribes, but cannot speak")


def check_text(models: Models, text: str, what: str = "the text") -> None:
    """Numbers and abbreviations are words by the time that the model reads them, and capitals
    alone small letters."""
    text = in_small_letters(text)
    spelt_out = normalize(text) if models.lm.alphabet.text.normalize else text
    models.coverage.check(spelt_out, what)
