"""What a run is said to be made with."""

import jax

from jaxdistill.versions import version, versions


def test_versions_of_packages_and_devices():
    found = versions()
    assert found["jax"] == jax.__version__
    assert found["devices"] == "8 x cpu"


def test_a_package_that_is_only_a_directory_on_the_path():
    assert version("jaxdistill-that-nobody-installed") == "not installed"
