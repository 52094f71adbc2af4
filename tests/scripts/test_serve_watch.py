"""What ``scripts/serve`` reads in Cog's log, and a server that is busy with nothing."""

import http.server
import json
import threading
import time

import pytest

from flux_lora.commands.serving import log, records, watch
from flux_lora.commands.serving.log import Slot


def line(message: str, *, level: str = "INFO", target: str = "coglet::prediction", **fields: object) -> str:
    return json.dumps({"level": level, "target": target, "fields": {"message": message, **fields}})


def shown(*lines: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, Slot]:
    log.show(lines, slot := Slot(), threading.Event())
    return capsys.readouterr().err, slot


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (line("drawing", source="Stdout"), "drawing\n"),
        (line(" 50%|█████     | 1/2 image 1/1", source="Stdout"), ""),
        (line("Starting prediction", prediction_id="a"), ""),
        (line("Prediction failed", error="Prediction failed: FormatError: no."), "prediction failed: no.\n"),
        (line("Prediction failed", error="Prediction failed: KeyError: 7"), "prediction failed: KeyError: 7\n"),
        (line("Stripped unknown input fields", fields='["x"]'), 'not an input of this model, and so ignored: ["x"]\n'),
        (line("Failed to send webhook", level="WARN", error="no route"), "cog: Failed to send webhook: no route\n"),
        (line("Setup failed", level="ERROR"), ""),
        ("Traceback (most recent call last):", "Traceback (most recent call last):\n"),
        ('{"level": "INFO"}', '{"level": "INFO"}\n'),
        (line("a\x1b[2J\r\u202eb\u2028c", source="Stdout"), "a\\x1b[2J\\r\\u202eb\\u2028c\n"),
        (line("カラス\u3000 – é 🍅", source="Stdout"), "カラス\u3000 – é 🍅\n"),
        ("[" * 100_000, "[" * 100_000 + "\n"),
    ],
)  # fmt: skip
def test_a_line_is_shown_as_people_read_it(capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    assert shown(text, capsys=capsys)[0] == expected


@pytest.mark.parametrize(
    ("lines", "running", "lost"),
    [
        ([line("Starting prediction", prediction_id="a")], "a", ""),
        ([line("Starting prediction", prediction_id="a"), line("Prediction failed", prediction_id="a")], "", ""),
        ([line("Starting prediction", prediction_id="a"), line("Prediction cancelled", prediction_id="a")], "", ""),
        ([line("Slot poisoned", level="WARN", target="coglet::orchestrator")], "", "Slot poisoned"),
        ([line("PermitInUse dropped without …", level="ERROR")], "", "PermitInUse dropped without …"),
        ([line("PermitInUse dropped", level="ERROR", source="Stdout")], "", ""),  # a prompt, printed by the model
    ],
)  # fmt: skip
def test_the_log_says_whether_the_slot_is_there(
    capsys: pytest.CaptureFixture[str], lines: list[str], running: str, lost: str
) -> None:
    slot = shown(*lines, capsys=capsys)[1]
    assert (slot.running, slot.lost) == (running, lost)


class Health(http.server.BaseHTTPRequestHandler):
    status = "BUSY"

    def do_GET(self) -> None:
        body = json.dumps({"status": self.status}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_busy_without_a_prediction_is_a_lost_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cog may lose the slot without a word; a server that only says BUSY stands in for it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        idleness, slot = watch.Idleness(), Slot()

        def asked_for(seconds: int) -> bool:
            said = []
            for _ in range(seconds):
                now[0] += 1
                said.append(idleness.of(address, slot))
            return any(said)

        assert not asked_for(50)
        slot.running = "a"
        assert not asked_for(100)
        slot.running = ""
        assert not asked_for(60)
        assert asked_for(10)
        Health.status = "READY"
        asked_for(6)
        assert not asked_for(100)
    finally:
        Health.status = "BUSY"
        server.shutdown()


def test_a_line_of_another_shape_is_no_record() -> None:
    assert records.read('{"fields": 7, "level": "INFO", "target": "x"}') is None
    assert records.read("[1]") is None
