"""One teacher, one text and one uninterrupted run for all tests of the training job."""

import pytest
from train_cases import Files, run


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("train")).write()


@pytest.fixture(scope="session")
def whole(files):
    """The directory of a run that nothing interrupted."""
    out = files.root / "whole"
    run(files.config(out))
    return out
