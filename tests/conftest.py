"""What several tests need: where the golden numbers and the real data are."""

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden fixtures (see its README)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real text and weights that are not part of the project; skips where there is none."""
    folder = Path(os.environ.get("LCKV_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data absent: set LCKV_TEST_DATA to its folder")
    return folder
