"""Text as it is spoken."""


def normalize(text: str) -> str:
    return text


def phonemes(text: str) -> str:
    return text
