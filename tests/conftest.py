from __future__ import annotations

import os
import signal

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib

import pyro
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """A run in the background of a shell ignores Ctrl-C; tests that send one need Python's own answer."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_state():
    """A test starts without another's Pyro parameters, checks arguments, and keeps torch's defaults."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks come first: at the end one process would run them while the others have nothing left."""
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")
