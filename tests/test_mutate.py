"""What tests/mutate.py changes, and which tests it runs."""

from pathlib import Path

from mutate import mirrored_tests, mutants_of

SOURCE = '''"""Text with 1 < 2."""
def f(x: "tuple[1, 2]", y=3, *, on: bool = True):
    """Not here: 4."""
    if x.name and not y:
        raise ValueError(f"{y + 1}")
    logger.info("%d", y - 1)
    assert y < 3
    return y if on else -x
'''


def test_mutants_are_single_changes_of_what_is_computed() -> None:
    found = {(each.line, each.old, each.new) for each in mutants_of(SOURCE)}
    head, condition, last = (SOURCE.splitlines()[line].strip() for line in (1, 3, 7))
    assert found == {
        (2, head, head.replace("y=3", "y=4")),
        (2, head, head.replace("True", "False")),
        (4, condition, condition.replace("and", "or")),
        (4, condition, condition.replace("not ", "")),
        (8, last, last.replace("on", "not (on)")),
        (8, last, last.replace("-", "+")),
    }


def test_a_sample_depends_on_the_seed_and_hardly_on_other_lines() -> None:
    sample = {each[1:3] for each in mutants_of(SOURCE, 3, seed=1)}
    later = {each[1:3] for each in mutants_of("A = B\n\n\n" + SOURCE, 3, seed=1)}
    assert sample == later
    assert any({each[1:3] for each in mutants_of(SOURCE, 3, seed)} != sample for seed in (2, 3, 4))


def test_files_are_tested_by_the_tests_that_mirror_them() -> None:
    def names(file: str) -> list[str]:
        return [test.name for test in mirrored_tests(Path(file))]

    assert names("slm/__main__.py") == ["test_main.py"]
    assert "test_codec_half_precision.py" in names("codec/models/codec.py")
    assert "test_codec_training.py" in names("recipes/lib/codec_training.py")
    assert "test_codec_fit.py" in names("codec/training/codec_fit.py")
