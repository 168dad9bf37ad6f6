from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def clean_state():
    """A test starts without another's Pyro parameters, checks arguments, and keeps torch's defaults."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
