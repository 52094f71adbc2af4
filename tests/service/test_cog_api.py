"""Cog's API over HTTP, with a real generator behind."""

import base64
import json
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from replicate.client import Client
from replicate.exceptions import ReplicateError
from replicate.helpers import FileOutput

from flux_lora.request import Request
from flux_lora.settings import Settings
from tests.conftest import MINI, ROOT
from tests.server.conftest import SMALL, wait_for
from tests.service.local import LocalReplica, local_front, serving
from tests.sources.internet import Internet, answer, in_turn

WITNESS = {"prompt": "a tomato", "seed": 7, **SMALL}
LONG = {"prompt": "a long one", "seed": 1, "num_inference_steps": 50, "num_outputs": 4, "aspect_ratio": "21:9"}
ASYNC = {"Prefer": "respond-async"}


def post(address: str, inputs: dict[str, Any], headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return httpx.post(f"{address}/predictions", json={"input": inputs, **body}, headers=headers, timeout=60)


def get(address: str, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{address}/predictions/{name}").json()
    return answer


def ended(address: str, name: str) -> dict[str, Any]:
    wait_for(lambda: get(address, name)["completed_at"] is not None)
    return get(address, name)


def drawn(replica: LocalReplica, **inputs: Any) -> list[bytes]:
    """What the generator draws when nothing is before it."""
    return [path.read_bytes() for path in replica.studio.generator.draw(Request.parse(**inputs))]


def contents(prediction: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(uri.partition(",")[2]) for uri in prediction["output"]]


def test_a_prediction_is_what_the_generator_draws(address: str, replica: LocalReplica) -> None:
    response = post(address, WITNESS | {"num_outputs": 2})
    assert response.status_code == 200, response.text
    prediction = response.json()
    assert prediction["status"] == "succeeded"
    assert contents(prediction) == drawn(replica, **WITNESS, num_outputs=2)
    assert prediction["output"][0].startswith("data:image/webp;base64,")
    assert "100%|██████████| 2/2 image 2/2" in prediction["logs"]
    assert prediction["metrics"]["images"] == 2
    assert prediction["metrics"]["predict_time"] > 0
    assert prediction["input"] == WITNESS | {"num_outputs": 2}
    assert get(address, prediction["id"]) == prediction


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "prompt is required"),
        (WITNESS | {"num_outputs": 5}, "num_outputs must be a whole number from 1 to 4, not 5"),
        (WITNESS | {"output_format": "gif"}, "output_format must be one of webp, jpg, png"),
    ],
)
def test_a_bad_input_is_refused_by_name(address: str, inputs: dict[str, Any], named: str) -> None:
    response = post(address, inputs)
    assert response.status_code == 422
    assert named in response.json()["detail"][0]["msg"]


def test_what_cannot_be_drawn_fails_with_a_reason(address: str) -> None:
    prediction = post(address, WITNESS | {"replicate_weights": "no-such-file.safetensors"}).json()
    assert prediction["status"] == "failed"
    assert prediction["output"] is None
    assert "no-such-file.safetensors" in prediction["error"]


def test_inputs_of_other_models_and_nulls_are_left_out_as_cog_does(address: str, replica: LocalReplica) -> None:
    prediction = post(address, WITNESS | {"negative_prompt": "no", "width": 256, "replicate_weights": None}).json()
    assert contents(prediction) == drawn(replica, **WITNESS)
    assert "not an input of this model, and so ignored: negative_prompt" in prediction["logs"]


@pytest.mark.parametrize(
    "body",
    [
        {"id": "../up"},
        {"webhook": "http://example.com"},
        {"webhook": "https://127.0.0.1/"},
        {"webhook_events_filter": ["finished"]},
    ],
)
def test_what_a_front_has_to_check_is_checked(address: str, body: dict[str, Any]) -> None:
    response = post(address, WITNESS, **body)
    assert response.status_code == 422
    assert next(iter(body)) in response.json()["detail"][0]["msg"]


def test_a_put_that_is_sent_again_draws_once(address: str, replica: LocalReplica) -> None:
    before = len(replica.drawn)
    urls = [f"{address}/predictions/mine"] * 3
    answers = [httpx.put(url, json={"input": WITNESS}, headers=ASYNC, timeout=60) for url in urls]
    assert [a.json()["id"] for a in answers] == ["mine"] * 3
    assert answers[0].status_code == 202
    prediction = httpx.put(urls[0], json={"input": WITNESS}, timeout=60)
    assert prediction.status_code == 200
    assert prediction.json()["status"] == "succeeded"
    assert len(replica.drawn) == before + 1
    assert post(address, WITNESS, id="mine").status_code == 409


def test_cancelling_what_runs_and_what_waits(address: str, replica: LocalReplica) -> None:
    before = len(replica.drawn)
    running, waiting = (post(address, LONG, ASYNC).json()["id"] for _ in range(2))
    wait_for(lambda: get(address, running)["status"] == "processing")
    assert get(address, waiting)["status"] == "starting"
    for name in (waiting, running):
        assert httpx.post(f"{address}/predictions/{name}/cancel").status_code == 200
    assert ended(address, running)["status"] == ended(address, waiting)["status"] == "canceled"
    assert len(replica.drawn) == before + 1
    assert contents(post(address, WITNESS).json()) == drawn(replica, **WITNESS)


def test_a_caller_who_hangs_up_ends_the_drawing(address: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.put(f"{address}/predictions/left", json={"input": LONG}, timeout=0.5)
    assert ended(address, "left")["status"] == "canceled"


def test_a_deadline_ends_what_runs_and_what_waits(address: str) -> None:
    names = [post(address, LONG, ASYNC | {"Cancel-After": "1s"}).json()["id"] for _ in range(2)]
    for name in names:
        prediction = ended(address, name)
        assert prediction["status"] == "failed"
        assert "not drawn by the deadline" in prediction["error"]
    assert post(address, WITNESS, {"Cancel-After": "soon"}).status_code == 422


def test_a_full_queue_says_when_to_try_again(replica: LocalReplica) -> None:
    with serving(local_front([replica], limit=2)) as address:
        answers = [post(address, LONG, ASYNC) for _ in range(4)]
        assert [response.status_code for response in answers] == [202, 202, 202, 503]
        assert int(answers[3].headers["retry-after"]) >= 1
        assert "The queue is full" in answers[3].json()["detail"]
        for response in answers[:3]:
            httpx.post(f"{address}/predictions/{response.json()['id']}/cancel")
        assert post(address, WITNESS).json()["status"] == "succeeded"


def test_withheld_pictures_are_a_failure_that_names_their_seeds() -> None:
    replica = LocalReplica("strict", Settings(weights=MINI, safety_threshold=0))
    with serving(local_front([replica])) as address:
        prediction = post(address, WITNESS | {"num_outputs": 2}).json()
        assert prediction["status"] == "failed"
        assert "7, 8" in prediction["error"]
        assert prediction["metrics"]["withheld_seeds"] == [7, 8]
        assert metrics(address)["flux_lora_withheld_total"] == 2
    replica.studio.close()


def metrics(address: str, headers: dict[str, str] | None = None) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics", headers=headers).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {s.name + "".join(v for k, v in s.labels.items() if k != "le"): s.value for s in samples}


def test_metrics_count_what_happens(replica: LocalReplica) -> None:
    with serving(local_front([replica])) as address:
        post(address, WITNESS | {"num_outputs": 2, "lora_scale": 0.5})
        post(address, WITNESS | {"num_outputs": 1, "lora_scale": 1})
        post(address, WITNESS | {"replicate_weights": "none.safetensors"})
        found = metrics(address)
    assert found["flux_lora_requests_totalsucceeded"] == 2
    assert found["flux_lora_requests_totaladapter"] == 1
    assert found["flux_lora_images_total"] == 3
    assert found["flux_lora_merges_total"] == 2
    assert found["flux_lora_stage_seconds_countdenoise"] == 3
    assert found["flux_lora_stage_seconds_sumdenoise"] > 0
    assert found["flux_lora_replicas"] == 1
    assert found["flux_lora_waiting"] == found["flux_lora_running"] == 0


def test_health_is_a_status_code(address: str) -> None:
    assert httpx.get(f"{address}/health").status_code == 200
    with serving(local_front([])) as empty:
        assert httpx.get(f"{empty}/health").status_code == 503
        assert httpx.get(f"{empty}/health-check").json() == {"status": "STARTING"}


def test_what_is_old_or_too_much_is_forgotten(replica: LocalReplica) -> None:
    with serving(local_front([replica], keep_seconds=0.2)) as address:
        name = post(address, WITNESS).json()["id"]
        wait_for(lambda: httpx.get(f"{address}/predictions/{name}").status_code == 404, 5)
    with serving(local_front([replica], keep_bytes=1)) as address:
        assert httpx.get(f"{address}/predictions/{post(address, WITNESS).json()['id']}").status_code == 404


def test_webhooks_are_told_through_the_guard(replica: LocalReplica, internet: Internet) -> None:
    internet.reset()
    url = internet.serve("https://hooks.example.com/done", in_turn(answer(500), answer(204)))
    front = local_front([replica], network=internet.network())
    with serving(front) as address:
        prediction = post(address, WITNESS, webhook=url).json()
        wait_for(lambda: len(internet.asked) >= 4, 20)
    told = [json.loads(exchange.body) for exchange in internet.asked]
    assert next(t["status"] for t in told if not t["output"]) == "processing"
    assert told[-1] | {"urls": 0} == prediction | {"urls": 0}
    assert told[-1]["status"] == "succeeded"
    assert {exchange.headers["content-type"] for exchange in internet.asked} == {"application/json"}


def test_a_webhook_whose_name_leads_inside_later_is_not_told(replica: LocalReplica, internet: Internet) -> None:
    internet.reset()
    internet.serve("https://hooks.example.com/done", answer(204))
    addresses = iter([["8.8.8.8"]])
    internet.resolve = lambda host: next(addresses, ["127.0.0.1"])  # noqa: ARG005
    with serving(local_front([replica], network=internet.network())) as address:
        filtered: dict[str, Any] = {"webhook": "https://hooks.example.com/done", "webhook_events_filter": ["completed"]}
        assert post(address, WITNESS, **filtered).status_code == 200
        time.sleep(0.5)
    assert internet.connected == []


def test_the_official_client_draws_and_cancels(replica: LocalReplica) -> None:
    with serving(local_front([replica]), keys=("a-key-of-sixteen-letters",)) as address:
        client = Client(api_token="a-key-of-sixteen-letters", base_url=address)
        client.poll_interval = 0.05
        output = client.run("anybody/flux-lora", input=WITNESS)
        assert all(isinstance(file, FileOutput) for file in output)
        assert [file.read() for file in output] == drawn(replica, **WITNESS)
        with (ROOT / "docs" / "miniature.webp").open("rb") as unused:  # a file among the inputs becomes a data: URI
            prediction = client.predictions.create(
                version="any", input=WITNESS | {"image": unused}, file_encoding_strategy="base64"
            )
        prediction.wait()
        assert prediction.status == "succeeded"
        assert prediction.progress is not None
        assert prediction.progress.percentage == 1
        assert prediction.id in [p.id for p in client.predictions.list().results]
        long = client.predictions.create(version="any", input=LONG)
        long.cancel()
        assert long.status == "canceled"
        with pytest.raises(ReplicateError, match="num_outputs"):
            client.predictions.create(version="any", input=WITNESS | {"num_outputs": 9})


def test_one_document_holds_the_paths_and_the_documented_inputs(address: str) -> None:
    document = httpx.get(f"{address}/openapi.json").json()
    documented = json.loads((ROOT / "openapi.json").read_text())["components"]["schemas"]
    ours = document["components"]["schemas"]["Input"]["properties"]
    assert list(ours) == list(documented["Input"]["properties"])
    for name, theirs in documented["Input"]["properties"].items():
        plain = documented[name] if "allOf" in theirs else {}
        for key in ("minimum", "maximum", "default", "description", "x-order"):
            assert ours[name].get(key) == theirs.get(key), (name, key)
        assert ours[name].get("enum") == plain.get("enum")
    assert document["components"]["schemas"]["Output"]["items"] == documented["Output"]["items"]
    assert {"/predictions", "/predictions/{prediction_id}", "/v1/predictions", "/health", "/metrics"} <= set(
        document["paths"]
    )
    assert httpx.get(f"{address}/docs").status_code == 200
