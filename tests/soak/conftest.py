"""Forks of long tests have loaded more modules: there are hundreds of them."""

from collections.abc import Iterator

import pytest
from forking import ForkServer

MODULES = (
    *("recipes.asr", "recipes.benchmark", "recipes.export_tokens", "recipes.prepare_data"),
    *("pesq", "pystoi", "slm.__main__", "slm.batch_tts", "slm.voice", "tensorboard"),
)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer(MODULES)
    yield server
    server.close()
