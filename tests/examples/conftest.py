"""What the roads of the examples share."""

import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Programs that one road has compiled and the next one takes."""
    return str(tmp_path_factory.mktemp("compiled"))
