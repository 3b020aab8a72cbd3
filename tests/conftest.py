"""What every test's process is told before it loads a library, and which tests can't run in this environment."""

import importlib.util
import os
import signal

import pytest
from hypothesis import settings

# Many small models are fitted, on machines that do other things beside: threads that wait for each other cost more than
# they give. And nobody is to hear that tests are run.
for name, value in {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}.items():
    os.environ.setdefault(name, value)

# Whoever starts us in the background has us ignore Ctrl-C, and so all that we start; but some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A property's examples are the same in every run, and may take what the machine needs: neither dice nor load decide
# whether a change is good. `--hypothesis-profile=search` throws the dice.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, derandomize=False)
settings.load_profile("same")

#: Of the optional packages, the one that stands for all: `make test-extras` installs them together.
_AN_EXTRA = "shap"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs optional packages where they are not; a mark may name the one package it needs."""
    for item in items:
        mark = item.get_closest_marker("extras")
        if mark is not None and importlib.util.find_spec(*(mark.args or (_AN_EXTRA,))) is None:
            item.add_marker(pytest.mark.skip(reason="needs optional packages: make test-extras"))
