"""Every module of the installed packages can be imported on this Python, with this JAX."""

import importlib
import pkgutil

import pytest

import pallas_kernels
import pdjax


@pytest.mark.smoke
def test_every_module_is_imported():
    for package in (pdjax, pallas_kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
