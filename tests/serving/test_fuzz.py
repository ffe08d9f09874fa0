"""Every route of the schema, with what the schema allows and what it does not: never a 500."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from support.scorer_samples import reward_model

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits, Service, create_app


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    model: Path = reward_model(tmp_path_factory.mktemp("fuzz") / "model", "llama3")
    service = Service([Scorer(str(model), device="cpu")], "tiny", Limits(items=16))
    service.start()
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service))


schema = schemathesis.pytest.from_fixture("fuzzed")


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_ends_in_a_server_error(case: schemathesis.Case) -> None:
    response = case.call()
    assert response.status_code < 500
    case.validate_response(response, checks=[not_a_server_error])
