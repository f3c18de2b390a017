"""The folder of a voice: copying it, its sampling settings, prompts and card."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codec.io import DAMAGE, atomic_file, atomic_folder, hub_reason, parse_json
from codec.program import reason_of
from codec.tokens import CodecStamp
from slm.config import SamplingConfig, from_json
from slm.data.coverage import Coverage
from slm.data.prompts import Prompt, load_prompts
from slm.models.ar import BASE_FILE, SpeechLM, check_task
from slm.tokenization.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SAMPLING_FILE = "sampling.json"


def is_voice(folder: Path) -> bool:
    """Whether the folder has a codec and an AR."""
    return (folder / "codec").is_dir() and (folder / "ar").is_dir()


def local_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a voice; downloads a hub id.

    Raises:
        ValueError: neither a voice's folder nor a hub id that can be downloaded.
    """
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        if folder.is_absolute() or str(path_or_hub_id).count("/") != 1:
            raise ValueError(f"{path_or_hub_id}: no such voice folder, nor a hub id (owner/name)")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(path_or_hub_id)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path_or_hub_id}: no such voice folder, and it cannot be downloaded from the hub "
                f"({hub_reason(error)}); check the name"
            ) from error
    for part in ("codec", "ar"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder}: not a voice folder, {part}/ is missing")
    return folder


NO_CONVERSION = (
    "this voice has no nar/, so it cannot convert voices; conversion takes a codec of two or more "
    "codebooks, the first of which holds the words and the others the speaker"
)


def unknown_prompt(name: str, known: Iterable[str]) -> str:
    """The error for a name that is no shipped prompt."""
    also = f"; a recording is given as Path({name!r})" if Path(name).suffix else ""
    names = ", ".join(sorted(known)) or "none"
    return f"no prompt is named {name!r}; this voice has: {names}{also}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VoiceSummary:
    """The files of a voice except its models: enough to refuse most bad requests before loading."""

    folder: Path
    prompts: frozenset[str]
    """Names of the shipped prompts."""
    coverage: Coverage
    tasks: Mapping[str, float]
    """Weights of the training tasks; empty: an older voice, trained on TTS and ASR."""
    num_codebooks: int
    has_nar: bool

    @classmethod
    def read(cls, path_or_hub_id: str | Path) -> "VoiceSummary":
        """Of a voice's folder or hub id. Raises ValueError if it is none."""
        folder = local_folder(path_or_hub_id)
        try:
            tasks = parse_json((folder / "ar" / BASE_FILE).read_text()).get("tasks", {})
        except DAMAGE as error:
            raise ValueError(
                f"{folder}/ar/{BASE_FILE}: missing or damaged ({reason_of(error)})"
            ) from error
        return cls(
            folder=folder,
            prompts=frozenset(path.stem for path in (folder / "prompts").glob("*.json")),
            coverage=Coverage.load(folder / "ar"),
            tasks=tasks,
            num_codebooks=Vocabulary.load(folder / "ar").codec.num_codebooks,
            has_nar=(folder / "nar").is_dir(),
        )

    def check_task(self, task: str) -> None:
        """Raises ValueError for tts, asr or conversion if the voice does not have it."""
        if task == "conversion":
            if not self.has_nar:
                raise ValueError(NO_CONVERSION)
            return
        check_task(self.tasks, task)
        if task == "tts" and not self.has_nar and self.num_codebooks > 1:
            raise ValueError("this voice has no nar/: it transcribes, but has no TTS")


def load_sampling(folder: Path) -> SamplingConfig | None:
    """The sampling settings of a saved voice; None: the defaults.

    Raises:
        ValueError: for a damaged file.
    """
    path = folder / SAMPLING_FILE
    if not path.exists():
        return None
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        return from_json(SamplingConfig, record)
    except DAMAGE as error:
        raise ValueError(
            f"{path}: no sampling settings ({reason_of(error)}); correct it, or remove it for the "
            "defaults"
        ) from error


def ship(source: Path, folder: Path, finish: Callable[[Path], None]) -> None:
    """Copies the folder of a voice, atomically.

    Args:
        source: the voice.
        folder: new, empty, or an earlier voice, which is replaced; may be `source` itself.
        finish: writes the other files into the new folder.

    Raises:
        ValueError: where the folder has other contents, or one folder is inside the other.
    """
    source, folder = source.resolve(), folder.resolve()
    if folder == source:
        finish(folder)
        return
    if folder in source.parents or source in folder.parents:
        raise ValueError(f"{folder}: inside the voice {source}, or around it; name another folder")
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_voice(folder) and not is_empty:
        raise ValueError(f"{folder}: neither empty nor a voice; name a new folder")
    with atomic_folder(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        finish(partial)


def write_extras(
    folder: Path,
    lm: SpeechLM,
    coverage: Coverage,
    prompts: Mapping[str, Prompt],
    sampling: SamplingConfig,
) -> None:
    """Writes prompts, sampling settings and the card, which stays as it is if it was edited."""
    origin, stamp = lm.origin, lm.vocabulary.codec
    before = voice_card(origin, stamp, coverage, load_prompts(folder / "prompts"))
    after = voice_card(origin, stamp, coverage, dict(sorted(prompts.items())))
    for name, prompt in prompts.items():
        prompt.save(folder / "prompts", name)
    with atomic_file(folder / SAMPLING_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(sampling), indent=1), encoding="utf-8")
    card = folder / "README.md"
    if card.exists() and card.read_text(encoding="utf-8") != before:
        if before != after:
            logger.warning("%s: was edited and is kept; new prompts are not in it", card)
        return
    with atomic_file(card) as temporary:
        temporary.write_text(after, encoding="utf-8")


def voice_card(
    origin: Mapping[str, Any], codec: CodecStamp, coverage: Coverage, prompts: Mapping[str, Prompt]
) -> str:
    """README.md of a voice: its base LLM (`SpeechLM.origin`), codec, tasks and prompts."""
    kind = "adapters" if origin["adapter"] else "all weights"
    tasks = [task for task, weight in origin.get("tasks", {}).items() if weight]
    base = short_path(origin["name"])
    shipped = [f"- `{name}`: {prompt.credit or 'no credit'}" for name, prompt in prompts.items()]
    return "\n".join(
        [
            "---",
            "library_name: parlance",
            "tags: [text-to-speech, automatic-speech-recognition]",
            "---",
            f"# A voice trained from {base}",
            "",
            f"- text LLM: `{base}` ({kind} trained)",
            f"- codec: `{short_path(codec.id)}` ({codec.num_codebooks} codebooks, "
            f"{codec.frame_rate:g} Hz)",
            f"- trained on: {', '.join(tasks) or 'unknown'}; texts in "
            f"{', '.join(coverage.scripts)}; utterances of at most "
            f"{coverage.longest_frames / codec.frame_rate:.1f} s",
            *([f"- data: {origin['data']}"] if origin.get("data") else []),
            "",
            "    slm tts --voice . --text TEXT --prompt RECORDING --out OUT.wav",
            "    slm asr --voice . RECORDING",
            "",
            *(["Prompts:", "", *shipped, ""] if shipped else []),
            "Files that a voice generates state in their metadata that they are synthetic. This is "
            "no watermark: a conversion may remove it.",
            "Use a person's recording as a prompt only with their consent.",
            "",
            "Before you publish this voice, name its training data and their licences here.",
            "",
        ]
    )


def short_path(path: str) -> str:
    """A relative path as it is, the last two parts of an absolute one: shipped files must not
    contain paths of the machine that they were made on."""
    given = Path(path)
    return "/".join(given.parts[-2:]).lstrip("/") if given.is_absolute() else given.as_posix()
