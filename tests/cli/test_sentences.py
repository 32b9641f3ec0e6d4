from fastformer.cli.workloads import SENTENCES

LINES = SENTENCES.read_text(encoding="utf-8").splitlines()
LENGTHS = sorted(len(line.split()) for line in LINES)


def test_many_different_sentences() -> None:
    assert len(LINES) >= 64
    assert len({line.lower() for line in LINES}) == len(LINES)
    assert all(line == line.strip() and line[0].isupper() and line[-1] in ".?!" for line in LINES)


def test_of_very_different_lengths() -> None:
    assert LENGTHS[0] == 3 and 100 <= LENGTHS[-1] <= 120
    assert sum(length <= 6 for length in LENGTHS) >= 5
    assert sum(8 <= length <= 25 for length in LENGTHS) >= 32
    assert sum(40 <= length <= 60 for length in LENGTHS) >= 3
    assert sum(length >= 80 for length in LENGTHS) >= 3
