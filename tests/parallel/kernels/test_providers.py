"""How packages are found: by the specs of their modules, without importing them."""

import sys

import pytest

from parallel.kernels.providers import ApexPackage, Package, is_installed

APEX = ApexPackage(("fused_layer_norm_cuda",), "build it")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages on the path; importing one of them fails."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(*paths):
        for path in paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("raise RuntimeError('imported')\n", encoding="utf-8")

    return add


def test_a_module_inside_a_package_is_found_without_importing_either(site):
    site("outer_package/__init__.py", "outer_package/inner.py", "plain_module.py")
    assert is_installed("outer_package") and is_installed("outer_package.inner") and is_installed("plain_module")
    assert not is_installed("outer_package.other") and not is_installed("plain_module.inner")
    assert not is_installed("no_such_package.inner")
    assert "outer_package" not in sys.modules


def test_a_missing_package_says_which_module_and_how_to_get_it(site):
    site("first_module.py")
    package = Package(("first_module", "second_module"), "pip install second")
    assert package.missing() == "module second_module is not installed: pip install second"
    site("second_module.py")
    assert package.missing() is None


def test_apex_is_its_extension_modules():
    assert APEX.missing() == "module fused_layer_norm_cuda is not installed: build it"


def test_the_extension_is_enough(site):
    site("fused_layer_norm_cuda.py")
    assert APEX.missing() is None


def test_another_projects_apex_is_told_from_nvidias(site):
    site("apex/__init__.py")
    assert APEX.missing().startswith("the installed 'apex' is not NVIDIA's: module fused_layer_norm_cuda is not installed")


def test_nvidias_apex_without_extensions_is_told_too(site):
    site("apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
    assert APEX.missing().startswith("NVIDIA's apex is installed without its CUDA extensions: module fused_layer_norm_cuda")
