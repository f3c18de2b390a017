"""The released LM-SPT in memory: its tensors, and ours for them.

LM-SPT (arXiv 2506.16738, github.com/kakao/lmspt). Its tensors are ours under other names, bit for
bit, and theirs come back from us as they were; what ours lose on the way there, `to_lmspt` says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.lmspt_original_config import NUM_UNITS, config_from_lmspt, config_to_lmspt
from codec.model import Codec
from codec.original import (
    WEIGHT_NORM,
    Original,
    check_unfolded,
    fitting,
    outlined,
    some,
)

LEAVES = WEIGHT_NORM | {"entries": "weight"}
USAGE = ("quantizer.semantic_vocab_usage", "quantizer.acoustic_vocab_usage")
SEMANTIC, ACOUSTIC = "semantic_encoder.", "acoustic_encoder."
AUXILIARY = "aux_decoder."


def from_lmspt(original: Original) -> Codec:
    """A codec with the original's tensors, either way of naming weight norm.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable tensors.
    """
    return filled_lmspt(config_from_lmspt(original.config), original.state)


def filled_lmspt(config: CodecConfig, state: Mapping[str, Tensor]) -> Codec:
    """A codec of `config` with the original's tensors. Raises `ValueError` as `from_lmspt`.

    Of a shared encoder's two names either is enough. A state without any tensor of an auxiliary
    decoder makes a codec without one.
    """
    if not any(name.startswith(AUXILIARY) for name in state):
        none = replace(config.lmspt.auxiliary, kind="none")
        config = replace(config, lmspt=replace(config.lmspt, auxiliary=none))
    counts = {
        "n_codebooks": config.quantizer.num_codebooks,
        "encoder_rates": len(config.lmspt.conv.strides),
        "decoder_rates": len(config.lmspt.conv.upsampling),
        "aux_decoder.rates": len(config.lmspt.auxiliary.strides),
    }
    outline = outlined(config, counts, len(state))
    names, ours = lmspt_tensor_names(outline), outline.state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in names.items()}
    sizes = config.quantizer.sizes
    shapes |= {USAGE[0]: (1, sizes[0]), USAGE[1]: (len(sizes) - 1, max(sizes[1:]))}
    if config.lmspt.shared_encoder:
        shapes |= {_other_encoder(name): shapes[name] for name in shapes if _is_encoder(name)}
        twins = {_other_encoder(name): name for name in state if _is_encoder(name)}
        state = {name: state[twin] for name, twin in twins.items()} | dict(state)
    found = fitting(state, shapes)
    different = [
        name
        for name in shapes
        if name.startswith(ACOUSTIC)
        and config.lmspt.shared_encoder
        and not torch.equal(found[name], found[_other_encoder(name)])
    ]
    if different:
        raise ValueError(
            "does not fit its configuration: use_shared_encoder is true, and there are two "
            f"encoders, of different {some(different)}"
        )
    codec = Codec(config)
    ours = codec.state_dict()
    for name, theirs in names.items():
        ours[name].copy_(found[theirs])
    usage = [found[USAGE[0]][0], *found[USAGE[1]]]
    for book, row in zip(_codebooks(config), usage, strict=True):
        size = ours[f"{book}.cluster_size"]
        size.copy_(row[: len(size)])
        ours[f"{book}.num_updates"].fill_(1)
    return codec.eval()


def to_lmspt(codec: Codec) -> Original:
    """What `from_lmspt` takes, with copies of the tensors, on the CPU.

    What came from an original goes back bit for bit. A codec of ours that goes there and back codes
    and decodes alike, but each codebook's number of updates becomes 1, hence another digest in the
    stamp, and what only training reads of the quantizer's configuration becomes our defaults.
    The codebooks' use is the original's record of shares, and counts of ours. The original's own
    code has one size for all acoustic codebooks: others go into lists, their use padded with zeros.
    A shared encoder has both names, as in the original's state_dict.

    Raises `ValueError` for another family, for what the original has no place for, and for a
    folded codec.
    """
    config, tensors = config_to_lmspt(codec.config), codec.state_dict()
    check_unfolded(codec)
    state = {}
    for name, theirs in lmspt_tensor_names(codec).items():
        state[theirs] = tensors[name].detach().cpu().clone().contiguous()
    if codec.config.lmspt.shared_encoder:
        state |= {_other_encoder(name): state[name] for name in state if _is_encoder(name)}
    use = [tensors[f"{book}.cluster_size"].detach().cpu() for book in _codebooks(codec.config)]
    for name, rows in zip(USAGE, (use[:1], use[1:]), strict=True):
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        state[name] = padded.contiguous()
    return Original(config, state)


def lmspt_tensor_names(codec: Codec) -> dict[str, str]:
    """Our name of every tensor of an unfolded codec, and theirs, but for the codebooks' use.

    A shared encoder is there once, as their semantic one.
    """
    names = {}
    for ours, theirs in _modules(codec.config):
        for leaf in codec.get_submodule(ours).state_dict():
            names[f"{ours}.{leaf}"] = f"{theirs}.{LEAVES.get(leaf, leaf)}"
    use = [
        f"{book}.{leaf}"
        for book in _codebooks(codec.config)
        for leaf in ("cluster_size", "num_updates")
    ]
    for name in use:
        del names[name]
    assert names.keys() | set(use) == codec.state_dict().keys()
    return names


def _codebooks(config: CodecConfig) -> list[str]:
    """Our names of the tables, in the order of the streams."""
    return [f"{ours}.codebook" for ours, _ in _quantizers(config)]


def _quantizers(config: CodecConfig) -> Iterator[tuple[str, str]]:
    yield "quantizer.semantic.codebooks.0", "quantizer.rvq_first.quantizers.0"
    for index in range(config.quantizer.num_codebooks - 1):
        yield f"quantizer.acoustic.codebooks.{index}", f"quantizer.rvq_rest.quantizers.{index}"


def _is_encoder(name: str) -> bool:
    return name.startswith((SEMANTIC, ACOUSTIC))


def _other_encoder(name: str) -> str:
    one, other = (SEMANTIC, ACOUSTIC) if name.startswith(SEMANTIC) else (ACOUSTIC, SEMANTIC)
    return other + name.removeprefix(one)


def _modules(config: CodecConfig) -> Iterator[tuple[str, str]]:
    """Names of all modules that hold tensors, ours and theirs.

    Theirs are numbered in the order of computation, inside blocks too.
    """
    lmspt = config.lmspt
    encoder = _encoder(len(lmspt.conv.strides), lmspt.causal)
    sides = [("encoder.semantic.network", "semantic_encoder.block", encoder)]
    if not lmspt.shared_encoder:
        sides.append(("encoder.acoustic.network", "acoustic_encoder.block", encoder))
    decoder = _decoder(len(lmspt.conv.upsampling), lmspt.causal)
    auxiliary = _decoder(len(lmspt.auxiliary.strides), lmspt.auxiliary.causal)
    sides.append(("decoder", "decoder.model", decoder))
    if lmspt.auxiliary.kind != "none":
        sides.append(("auxiliary", "aux_decoder.model", auxiliary))
    for ours, theirs, slots in sides:
        for name, number in slots.items():
            yield f"{ours}.{name}", f"{theirs}.{number}"
    for ours, theirs in _quantizers(config):
        yield f"{ours}.project_in", f"{theirs}.in_proj"
        yield f"{ours}.project_out", f"{theirs}.out_proj"
        yield f"{ours}.codebook", f"{theirs}.codebook"


def _encoder(num_stages: int, causal: bool) -> dict[str, str]:
    conv = ".conv" if causal else ""
    slots = {"embed.conv": f"0{conv}"}
    for stage in range(num_stages):
        block = f"{stage + 1}.block"
        for unit in range(NUM_UNITS):
            slots |= _unit(f"stages.{stage}.units.{unit}", f"{block}.{unit}", conv)
        slots[f"stages.{stage}.activation"] = f"{block}.{NUM_UNITS}"
        slots[f"stages.{stage}.down.conv"] = f"{block}.{NUM_UNITS + 1}{conv}"
    return slots | {"activation": f"{num_stages + 1}", "project.conv": f"{num_stages + 2}{conv}"}


def _decoder(num_stages: int, causal: bool) -> dict[str, str]:
    conv = ".conv" if causal else ""
    slots = {"embed.conv": f"0{conv}"}
    for stage in range(num_stages):
        block = f"{stage + 1}.block"
        slots[f"stages.{stage}.activation"] = f"{block}.0"
        slots[f"stages.{stage}.up.conv"] = f"{block}.1{conv}"
        for unit in range(NUM_UNITS):
            slots |= _unit(f"stages.{stage}.units.{unit}", f"{block}.{unit + 2}", conv)
    return slots | {"activation": f"{num_stages + 1}", "project.conv": f"{num_stages + 2}{conv}"}


def _unit(ours: str, theirs: str, conv: str) -> dict[str, str]:
    return {
        f"{ours}.activation_in": f"{theirs}.block.0",
        f"{ours}.conv_in.conv": f"{theirs}.block.1{conv}",
        f"{ours}.activation_out": f"{theirs}.block.2",
        f"{ours}.conv_out.conv": f"{theirs}.block.3{conv}",
    }
