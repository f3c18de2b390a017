"""Validation: its distances are those that training minimises."""

import torch
from conftest import voiced
from lhotse import Recording
from tiny_codec_training import LOSSES, TINY, SingleProcess

from codec import Codec
from codec.distillation.objectives import Student
from codec.training.codec_step import generator_step
from codec.training.config import CropConfig, LossConfig, LossWeights
from codec.training.validate import Validation, validate


def test_the_mel_distance_is_the_one_that_is_trained(write_wav, tmp_path) -> None:
    torch.manual_seed(0)
    student = Student(Codec(TINY))
    cut = Recording.from_file(write_wav(tmp_path / "one.wav", 0.7)).to_cut()
    wave = torch.from_numpy(voiced(0.7))[None, None]
    found = []
    for changes in (
        {},
        {"mel_form": "lmspt", "mel_linear_weight": 1.0},
        {"mel_l2_weight": 1.0},
    ):
        losses = LossConfig(weights=LossWeights(), mel_scales=LOSSES.mel_scales, **changes)
        reported = validate(
            Validation(student, None, None, [cut], CropConfig(), losses), SingleProcess(), 1
        )
        with torch.no_grad():
            out = student.eval()(wave)
            trained = generator_step(out, wave, None, losses, 16_000).parts["mel"]
        torch.testing.assert_close(reported["dev/mel"], float(trained), rtol=1e-3, atol=0)
        found.append(reported["dev/mel"])
    assert len(set(found)) == 3
