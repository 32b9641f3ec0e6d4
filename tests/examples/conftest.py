"""What the tests of the examples share."""

import pytest

from examples import short


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return short.small_data(tmp_path_factory.mktemp("small_data"))
