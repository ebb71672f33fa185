"""A model by its hub id that cannot be fetched is refused in one line."""

from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from engines.errors import VocabtrimError
from vocabtrim_export.sources.hub import fetch

RESPONSE = Mock(headers={})  # the client library differs between versions of huggingface_hub


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route to host"), "the hub does not answer"),
        (RepositoryNotFoundError("404", response=RESPONSE), "the hub has no model"),
        (GatedRepoError("403", response=RESPONSE), "is gated"),
    ],
)
def test_a_hub_that_gives_no_model(error, message, monkeypatch):
    def refuse(*_, timeout, **__):
        assert timeout <= 5
        raise error

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(VocabtrimError, match=message):
        fetch("nobody/no-such-model")
