"""Cog's API over HTTP, with a real generator behind."""

import base64

import httpx

from flux_lora.request import Request
from tests.server.conftest import SMALL
from tests.service.local import LocalReplica

WITNESS = {"prompt": "a tomato", "seed": 7, **SMALL}


def test_a_prediction_is_what_the_generator_draws(address: str, replica: LocalReplica) -> None:
    answer = httpx.post(f"{address}/predictions", json={"input": WITNESS | {"num_outputs": 2}}, timeout=60)
    assert answer.status_code == 200, answer.text
    prediction = answer.json()
    assert prediction["status"] == "succeeded"
    files = replica.studio.generator.draw(Request.parse(**WITNESS, num_outputs=2))
    assert [base64.b64decode(uri.partition(",")[2]) for uri in prediction["output"]] == [f.read_bytes() for f in files]
    assert "100%|██████████| 2/2 image 2/2" in prediction["logs"]
    assert prediction["metrics"]["images"] == 2
