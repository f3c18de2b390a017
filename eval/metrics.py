"""All measures in one table: direction, range, unit, libraries, and the function of those that
need nothing but waves."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from eval import quality, speaker, speech, text


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The meaning of a number. The functions raise ValueError where it is not defined."""

    title: str
    """Heading of a column."""
    higher_is_better: bool | None = None
    """None: neither is better."""
    low: float = 0.0
    high: float = math.inf
    unit: str = ""
    libraries: tuple[str, ...] = ("numpy",)
    setting: str = ""
    """What the names of the libraries leave open, such as ViSQOL's mapper."""
    paired: Callable[..., float] | None = None
    """Of the reference wave (S,), the degraded wave (S,) and their sample rate."""
    unpaired: Callable[..., float] | None = None
    """Of the wave (S,) and its sample rate."""


MEASURES: dict[str, Measure] = {
    "wer": Measure(title="WER", higher_is_better=False, libraries=text.LIBRARIES),
    "wil": Measure(title="WIL", higher_is_better=False, high=1.0, libraries=text.LIBRARIES),
    "mer": Measure(title="MER", higher_is_better=False, high=1.0, libraries=text.LIBRARIES),
    "cer": Measure(title="CER", higher_is_better=False, libraries=text.LIBRARIES),
    "wrong": Measure(title="wrong", higher_is_better=False, high=1.0, unit="share of items"),
    "fault": Measure(title="fault", higher_is_better=False, high=1.0, unit="share of items"),
    "failure": Measure(title="failure", higher_is_better=False, high=1.0, unit="share of items"),
    "visqol": Measure(
        title="ViSQOL", higher_is_better=True, low=1.0, high=5.0, unit="MOS-LQO",
        paired=speech.visqol, setting="speech mode, lattice mapper",
    ),
    "visqol_polynomial": Measure(
        title="ViSQOL (polynomial)", higher_is_better=True, low=1.0, high=5.0, unit="MOS-LQO",
        paired=speech.visqol_polynomial, setting="speech mode, polynomial mapper",
    ),
    "stoi": Measure(title="STOI", higher_is_better=True, low=-1.0, high=1.0, paired=speech.stoi),
    "estoi": Measure(title="ESTOI", higher_is_better=True, low=-1.0, high=1.0, paired=speech.estoi),
    "pesq": Measure(
        title="PESQ-WB", higher_is_better=True, low=1.04, high=4.644, unit="MOS-LQO",
        paired=speech.pesq_wb, setting="wide band",
    ),
    "pesq_nb": Measure(
        title="PESQ-NB", higher_is_better=True, low=1.02, high=4.549, unit="MOS-LQO",
        paired=speech.pesq_nb, setting="narrow band",
    ),
    "si_sdr": Measure(
        title="SI-SDR", higher_is_better=True, low=-speech.SI_SDR_LIMIT, high=speech.SI_SDR_LIMIT,
        unit="dB", paired=speech.si_sdr,
    ),
    "mel_distance": Measure(
        title="mel distance", higher_is_better=False, paired=speech.mel_distance,
    ),
    "multi_scale_mel_distance": Measure(
        title="multi-scale mel distance", higher_is_better=False,
        paired=speech.multi_scale_mel_distance, setting="7 scales, log10, summed",
    ),
    "f0_correlation": Measure(
        title="F0 correlation", higher_is_better=True, low=-1.0, high=1.0,
        paired=speech.f0_correlation, setting="DIO and StoneMask, log F0",
    ),
    "f0_gross_error": Measure(
        title="F0 gross error", higher_is_better=False, high=1.0, unit="share of frames",
        paired=speech.f0_gross_error, setting="DIO and StoneMask, 20 %",
    ),
    "voicing_error": Measure(
        title="voicing error", higher_is_better=False, high=1.0, unit="share of frames",
        paired=speech.voicing_error, setting="DIO and StoneMask",
    ),
    "dnsmos_sig": Measure(
        title="DNSMOS SIG", higher_is_better=True, low=1.0, high=5.0, unit="MOS",
        unpaired=quality.dnsmos_sig, setting="P.835",
    ),
    "dnsmos_bak": Measure(
        title="DNSMOS BAK", higher_is_better=True, low=1.0, high=5.0, unit="MOS",
        unpaired=quality.dnsmos_bak, setting="P.835",
    ),
    "dnsmos_ovrl": Measure(
        title="DNSMOS OVRL", higher_is_better=True, low=1.0, high=5.0, unit="MOS",
        unpaired=quality.dnsmos_ovrl, setting="P.835",
    ),
    "similarity": Measure(title="similarity", higher_is_better=True, low=-1.0, high=1.0),
    "similarity_speaker": Measure(
        title="similarity to the speaker", higher_is_better=True, low=-1.0, high=1.0
    ),
    "similarity_others": Measure(
        title="similarity to others", low=-1.0, high=1.0
    ),
    "similarity_source": Measure(
        title="similarity to the source", higher_is_better=False, low=-1.0, high=1.0
    ),
    "similarity_gain": Measure(
        title="similarity to target minus source", higher_is_better=True, low=-2.0, high=2.0
    ),
    "speaking_rate": Measure(title="speaking rate", unit="words or characters / s"),
    "seconds": Measure(title="seconds", unit="s"),
    "mushra": Measure(title="MUSHRA", higher_is_better=True, high=100.0),
    "mos": Measure(title="MOS", higher_is_better=True, low=1.0, high=5.0),
    "smos": Measure(title="SMOS", higher_is_better=True, low=1.0, high=5.0),
    "probe_loss": Measure(title="loss of the probe", unit="nats / character"),
    "mi_vclub": Measure(
        title="mutual information (vCLUB)", higher_is_better=True, low=-math.inf,
        unit="nats / utterance",
    ),
    "mi_info_nce": Measure(
        title="mutual information (InfoNCE)", higher_is_better=True, low=-math.inf,
        unit="nats / utterance",
    ),
    "snmi": Measure(title="SNMI", higher_is_better=True, high=1.0),
    "snmi_chance": Measure(title="SNMI by chance", high=1.0),
    "snmi_ceiling": Measure(title="SNMI of equal codes", high=1.0),
    "snmi_acoustic": Measure(title="SNMI of codebooks 2 to Q", high=1.0),
    "entropy_bitrate": Measure(title="entropy-coded bit rate", unit="bit/s"),
    "codebook_use": Measure(title="codebook use", high=1.0, unit="share of entries"),
    "codebook_perplexity": Measure(title="codebook perplexity", low=1.0),
    "bitrate": Measure(title="bit rate", unit="bit/s"),
    "codebooks": Measure(title="codebooks"),
}  # fmt: skip
"""By metric, as rows name it."""
for _metric in ("wer", "wil", "mer", "cer"):
    MEASURES[f"asr_{_metric}"] = replace(
        MEASURES[_metric], title=f"{MEASURES[_metric].title} of the system's own transcripts"
    )
    MEASURES[f"probe_{_metric}"] = replace(
        MEASURES[_metric], title=f"{MEASURES[_metric].title} of the probe"
    )
for _change in ("noise", "gain", "resampling", "shift"):
    MEASURES[f"kept_{_change}"] = Measure(
        title=f"codes kept: {_change}", higher_is_better=True, high=1.0, unit="share of codes"
    )
for _metric, _libraries in (speech.LIBRARIES | quality.LIBRARIES).items():
    MEASURES[_metric] = replace(MEASURES[_metric], libraries=_libraries)
for _metric in [name for name in MEASURES if name.startswith("similarity")]:
    MEASURES[_metric] = replace(MEASURES[_metric], libraries=speaker.LIBRARIES)

PAIRED = {name: one.paired for name, one in MEASURES.items() if one.paired}
"""Functions of the reference wave (S,), the degraded wave (S,) and their sample rate."""
UNPAIRED = {name: one.unpaired for name, one in MEASURES.items() if one.unpaired}
"""Functions of the wave (S,) and its sample rate."""
HIGHER_IS_BETTER = {
    name: one.higher_is_better for name, one in MEASURES.items() if one.higher_is_better is not None
}
"""The measures that have a better direction: by them systems can be compared."""
