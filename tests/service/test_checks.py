"""What a front has to refuse before Cog's server sees it."""

import pytest

from flux_lora.errors import RequestError
from flux_lora.service import checks
from flux_lora.sources.guard import Network


@pytest.mark.parametrize("text", ["a", "pred_18eba8285320ba7d", "A-b_9", "x" * 64])
def test_an_id_is_a_word(text: object) -> None:
    assert checks.check_id(text) == text


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "x" * 65, "a b", "a\n", "ä", "a\0", "%2e%2e", "a.b",
     "\x1b[31m", 7, None],
)  # fmt: skip
def test_an_id_that_is_a_path_or_steers_a_terminal_is_refused(text: object) -> None:
    with pytest.raises(RequestError, match="id must be 1 to 64 of the characters") as refusal:
        checks.check_id(text)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("length", [0, 1, 100 * 1024**2])
def test_a_body_within_the_limit_passes(length: int | None) -> None:
    checks.check_size(length)


@pytest.mark.parametrize(
    ("length", "named"), [(None, "Content-Length"), (-1, "Content-Length"), (100 * 1024**2 + 1, "104,857,601 bytes")]
)
def test_a_body_beyond_it_is_refused_by_its_length(length: int | None, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        checks.check_size(length)


def test_fields_of_the_operator_are_refused_by_name() -> None:
    checks.check_fields({"id": "a", "input": {}, "webhook": "x", "webhook_events_filter": ["completed"]})
    with pytest.raises(RequestError, match="'context' cannot be given here"):
        checks.check_fields({"context": {}})
    for events in ("completed", ["finished"], [["start"]], {"start": 1}):
        with pytest.raises(RequestError, match="must be a list of start, output, logs, completed"):
            checks.check_fields({"webhook_events_filter": events})


ADDRESSES = {
    "hooks.example.com": ["93.184.216.34"],
    "inside.example.com": ["10.0.0.7"],
    "both.example.com": ["93.184.216.34", "127.0.0.1"],
    "metadata.example.com": ["169.254.169.254"],
}
NETWORK = Network(resolve=lambda host: ADDRESSES.get(host, []))


def test_a_webhook_to_a_public_host_passes() -> None:
    address = "https://hooks.example.com/done?key=1"
    assert checks.check_webhook(address, NETWORK) == address


@pytest.mark.parametrize(
    "address",
    [
        "http://hooks.example.com/", "https://hooks.example.com:8443/", "https://me:secret@hooks.example.com/",
        "https://127.0.0.1/", "https://[::1]/", "https://2130706433/", "https://localhost/", "https://0x7f.1/",
        "https://inside.example.com/", "https://both.example.com/", "https://metadata.example.com/latest",
        "https://unknown.example.com/", "ftp://hooks.example.com/", "file:///etc/passwd", "//hooks.example.com",
        "", "x", "https://hooks.example.com/" + "x" * 3000, 7, None,
    ],
)  # fmt: skip
def test_a_webhook_to_anywhere_else_is_refused(address: object) -> None:
    with pytest.raises(RequestError, match="webhook"):
        checks.check_webhook(address, NETWORK)
