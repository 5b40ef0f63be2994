from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub import snapshots
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer

from .hub_server import Hub, serve


@pytest.fixture(scope="session")
def loaded() -> Callable[[str], Loaded]:
    """Give the function that loads a tokenizer once, and skips where it is out of reach."""
    kept: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        try:
            return kept.setdefault(name, kept.get(name) or load_tokenizer(name))
        except SourceNotFound as error:
            pytest.skip(str(error))

    return load


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub on the loopback, which this process and those that it starts ask, with an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with serve() as hub:
        cache = tmp_path / "hub-cache"
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cdm-cache"))
        monkeypatch.setattr(snapshots, "_process", snapshots._Process())
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        monkeypatch.chdir(tmp_path)
        yield hub
