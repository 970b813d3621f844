from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def shared_data():
    """Third-party files beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no third-party data in {SHARED_DATA}")
    return SHARED_DATA
