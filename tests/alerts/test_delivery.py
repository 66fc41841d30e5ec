"""Apprise's real plugins against servers on this machine: what they send, and what is known of a failure."""

from __future__ import annotations

import contextlib
import email.policy
import json
import re
import threading
from collections.abc import Iterator
from email.message import EmailMessage
from email.parser import BytesParser
from typing import Any

import apprise.plugins.pagerduty as pagerduty
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from apprise.plugins.slack import NotifySlack
from apprise.plugins.whatsapp import NotifyWhatsApp

from cdcbridge.alerts.delivery import AlertUrl, is_refusal, urls
from cdcbridge.alerts.notices import Notice
from cdcbridge.alerts.tracking import Kind
from cdcbridge.config.alerts import AlertDestination, Alerts
from cdcbridge.errors import UsageError
from tests.alerts.conftest import LOADS_APPRISE
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.http import Answer, HttpTarget
from tests.harness.brokers.server import free_port

pytestmark = [
    LOADS_APPRISE,
    pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning"),
]
SLACK = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#ops"
PAGERDUTY = "pagerduty://a-secret-integration@a-secret-key/db1/cdc"
WHATSAPP = "whatsapp://asecrettoken@12345678/+15551234567"
TEXT = "warning: dead letters: billing\nbilling has 2 dead letters. `cdcbridge dead list billing`"


def target(url: str) -> AlertUrl:
    return AlertUrl(AlertDestination.model_validate({"name": "team", "urls": [url]}), url)


def notice(kind: Kind = "begins", body: str = TEXT, severity: str = "warning") -> Notice:
    return Notice("team", kind, severity, "shop: dead letters: billing", body)  # type: ignore[arg-type]


@pytest.fixture
def https(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpTarget]:
    """A server that speaks HTTPS, in the place of Slack, PagerDuty and WhatsApp. The certificate is checked."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.ca))
    with HttpTarget(tls=certificates) as server:
        monkeypatch.setattr(NotifySlack, "webhook_url", f"{server.url}slack")
        monkeypatch.setitem(pagerduty.PAGERDUTY_API_LOOKUP, pagerduty.PagerDutyRegion.US, f"{server.url}pagerduty")
        monkeypatch.setattr(NotifyWhatsApp, "notify_url", server.url + "whatsapp/{fb_ver}/{phone_id}")
        yield server


def sent(server: HttpTarget, url: str, message: Notice) -> Any:
    server.answer(Answer(200, b"ok"))
    assert target(url).send(message) is None
    request = server.requests[-1]
    return json.loads(request.body)


def test_slack(https: HttpTarget) -> None:
    body = sent(https, SLACK, notice())
    assert https.requests[0].path == "/slack/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ"
    assert body["channel"] == "#ops" and body["attachments"][0]["title"] == "shop: dead letters: billing"
    assert body["attachments"][0]["text"] == TEXT


def test_pagerduty(https: HttpTarget) -> None:
    begins = sent(https, f"{PAGERDUTY}?action=map", notice(severity="critical"))
    assert begins["event_action"] == "trigger" and begins["routing_key"] == "a-secret-integration"
    assert begins["payload"]["summary"].startswith("shop: dead letters: billing")
    assert begins["payload"]["severity"] in ("critical", "error")
    ends = sent(https, f"{PAGERDUTY}?action=map", notice("ends"))
    assert ends["event_action"] == "resolve" and ends["dedup_key"] == begins["dedup_key"]
    assert len(sent(https, PAGERDUTY, notice(body="long " * 1000))["payload"]["summary"]) <= 1024


def test_whatsapp(https: HttpTarget) -> None:
    body = sent(https, WHATSAPP, notice("ends"))
    assert https.requests[0].headers["authorization"] == "Bearer asecrettoken"
    assert body["to"] == "+15551234567" and body["type"] == "text"
    assert body["text"]["body"].startswith("Over: shop: dead letters: billing") and TEXT[:30] in body["text"]["body"]
    assert len(sent(https, WHATSAPP, notice(body="long " * 1000))["text"]["body"]) <= 1024


def test_json(https: HttpTarget) -> None:
    body = sent(https, f"jsons://127.0.0.1:{https.port}/hook", notice("lasts"))
    assert body["title"] == "Still: shop: dead letters: billing" and body["message"] == TEXT
    assert body["type"] == "warning"


@pytest.mark.parametrize(
    ("url", "answer", "reason"),
    [
        (SLACK, Answer(403, b"invalid_token"), "invalid_token"),
        (PAGERDUTY, Answer(400, b'{"status": "invalid event", "errors": ["no routing key"]}'), "no routing key"),
        (WHATSAPP, Answer(401, b'{"error": {"message": "Session has expired", "code": 190}}'), "Session has expired"),
        (SLACK, Answer(500), "error=500"),
        (SLACK, Answer(cut="before"), "Connection error"),
    ],
)
def test_the_answer_of_a_service_is_the_reason(https: HttpTarget, url: str, answer: Answer, reason: str) -> None:
    https.answer(answer)
    error = target(url).send(notice())
    assert error is not None and reason in error, error


def test_a_certificate_that_nobody_trusts(
    https: HttpTarget, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.other_ca))
    error = target(SLACK).send(notice())
    assert error is not None and "certificate verify failed" in error and https.requests == []


class Mailbox:
    """What a mail server got."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.answer = "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        if self.answer.startswith("250"):
            content = envelope.content
            assert isinstance(content, bytes)
            self.mails.append(BytesParser(_class=EmailMessage, policy=email.policy.default).parsebytes(content))
        return self.answer


@contextlib.contextmanager
def mail_server(box: Mailbox, password: str) -> Iterator[int]:
    def login(_server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, given: Any) -> AuthResult:
        right = (given.login, given.password) == (b"bridge", password.encode())
        return AuthResult(success=right, handled=right)

    controller = Controller(
        box, "127.0.0.1", free_port(), authenticator=login, auth_require_tls=False, auth_required=True
    )
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


def test_mail() -> None:
    box = Mailbox()
    with mail_server(box, "a-secret-password") as port:
        url = "mailto://bridge:{}@localhost:{}/?from=cdcbridge@example.com&to=oncall@example.com&smtp=127.0.0.1"
        good = target(url.format("a-secret-password", port))
        assert good.send(notice()) is None
        (mail,) = box.mails
        assert mail["Subject"] == "shop: dead letters: billing" and mail["To"] == "oncall@example.com"
        part = mail.get_body(("plain", "html"))
        assert part is not None and "billing has 2 dead letters." in part.get_content()
        wrong = target(url.format("a-wrong-password", port)).send(notice())
        assert wrong is not None and "535" in wrong and "a-wrong-password" not in wrong
        assert is_refusal(wrong)
        box.answer = "452 mailbox full"
        full = good.send(notice())
        assert full is not None and "mailbox full" in full and not is_refusal(full), full
        box.answer = "554 looks like spam"
        spam = good.send(notice())
        assert spam is not None and is_refusal(spam), spam
    away = good.send(notice())
    assert away is not None and "Connection refused" in away and not is_refusal(away), away


@pytest.mark.parametrize("url", [SLACK, PAGERDUTY, WHATSAPP, "mailto://me:a-secret-word@127.0.0.1:1/?from=x@mine.de"])
def test_nothing_of_a_url_is_shown(url: str, https: HttpTarget, capfd: pytest.CaptureFixture[str]) -> None:
    https.otherwise = lambda request: Answer(400, f"no: {request.path} {dict(request.headers)}".encode())
    error = target(url).send(notice()) or ""
    parts = [part for part in re.split("[/?@:=#]+", url.partition("://")[2]) if len(part) > 4]
    shown = error + "".join(capfd.readouterr())
    assert error and parts and not [part for part in parts if part in shown], shown


@pytest.mark.parametrize("url", ["nosuch://a-secret", "slack://a-secret", "mailto://a-secret"])
def test_a_url_that_apprise_refuses(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    settings = Alerts.model_validate({"to": [{"name": "team", "urls": ["json://localhost", url]}]})
    with pytest.raises(UsageError, match=r"^alerts\.to\.team\.urls: Apprise does not accept entry 2") as caught:
        urls(settings)
    assert "a-secret" not in f"{caught.value} {caught.value.hint}{''.join(capfd.readouterr())}"


@pytest.mark.parametrize(("status", "refused"), [
    (400, True), (401, True), (403, True), (404, True), (410, True), (413, True), (422, True),
    (408, False), (425, False), (429, False), (500, False), (502, False), (503, False),
])  # fmt: skip
@pytest.mark.parametrize("url", [SLACK, PAGERDUTY, WHATSAPP, "json"])
def test_which_answers_refuse_a_message(https: HttpTarget, url: str, status: int, refused: bool) -> None:
    https.answer(Answer(status, b'{"error": "see error=404"}'))
    reason = target(f"jsons://127.0.0.1:{https.port}/hook" if url == "json" else url).send(notice())
    assert reason is not None and is_refusal(reason) is refused, reason


def test_destinations_that_hang_hold_up_no_other_one(https: HttpTarget, http_target: HttpTarget) -> None:
    https.pause()
    hanging = [target(f"jsons://127.0.0.1:{https.port}/{number}") for number in range(20)]
    threads = [threading.Thread(target=one.send, args=(notice(),), daemon=True) for one in hanging]
    for thread in threads:
        thread.start()
    https.wait(20, patience=10)  # less than the time that a destination has for its answer
    assert target(f"json://127.0.0.1:{http_target.port}/").send(notice()) is None
    https.resume()
    for thread in threads:
        thread.join()
