"""Every route of the schema, with what the schema allows and what it does not: never a 500."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from btrm_core.scoring import Scorer
from btrm_core.serving import Limits, Service, create_app


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_ends_in_a_server_error(scorer: Scorer, mode: GenerationMode) -> None:
    service = Service([scorer], "tiny", Limits(items=16))
    service.start()
    try:
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
        tried: dict[str, int] = {}
        for found in schema.get_all_operations():
            operation = found.ok()
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing can be wrong in a request without parameters

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def fuzz(case: schemathesis.Case) -> None:
                tried[case.path] = tried.get(case.path, 0) + 1
                assert case.call().status_code < 500

            fuzz()
    finally:
        service.stop()
    assert {"/v1/rewards", "/v1/compare", "/get_reward", "/classify", "/pooling", "/slime"} <= set(tried)
    assert tried["/v1/rewards"] >= 5
