"""On a GPU a reference that runs says so once; here it is asked for, or tested for by name."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:.*the slower reference runs:RuntimeWarning"))
