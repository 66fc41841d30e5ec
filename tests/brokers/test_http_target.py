"""The HTTP server of the tests answers as told, and the jars of Kafka come through it with their checksums compared."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest

from scripts.kafka_jars import install
from tests.harness.brokers.certificates import Certificates
from tests.harness.brokers.http import Answer, HttpTarget

WEBHOOK: dict[str, Any] = {"webhook-id": "7"}
ROOT = Path(__file__).parents[2]


def post(target: HttpTarget, body: bytes = b"{}", context: ssl.SSLContext | None = None, **headers: Any) -> bytes:
    request = urllib.request.Request(target.url, body, headers)
    with urllib.request.urlopen(request, timeout=20, context=context) as answer:
        content: bytes = answer.read()
        return content


def test_answers_are_scripted_one_by_one(http_target: HttpTarget) -> None:
    http_target.answer(Answer(503, headers={"Retry-After": "7"}), Answer(body=b'{"failed": ["1"]}'))
    with pytest.raises(HTTPError) as refused:
        post(http_target)
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "7")
    refused.value.close()
    assert post(http_target) == b'{"failed": ["1"]}'
    http_target.otherwise = lambda request: Answer(body=request.body.upper())
    assert post(http_target, b"abc", **WEBHOOK) == b"ABC"
    last = http_target.wait(3)[-1]
    assert (last.method, last.path, last.body, last.headers["webhook-id"]) == ("POST", "/", b"abc", "7")


def test_connections_are_cut_and_paused(http_target: HttpTarget) -> None:
    http_target.answer(Answer(cut="before"), Answer(body=b"0123456789", cut="middle"))
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        post(http_target)
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        post(http_target)
    http_target.pause()
    client = threading.Thread(target=post, args=(http_target,))
    client.start()
    http_target.wait(3)
    client.join(0.1)
    assert client.is_alive()
    http_target.resume()
    client.join()
    http_target.stop()
    with pytest.raises(URLError, match="refused"):
        post(http_target)
    http_target.restart()
    assert post(http_target) == b""
    assert len(http_target.requests) == 4


def test_strangers_are_refused(certificates: Certificates) -> None:
    with HttpTarget(token="s3cr3t", tls=certificates) as target:
        context = certificates.client_context()
        assert post(target, context=context, Authorization="Bearer s3cr3t") == b""
        with pytest.raises(HTTPError, match="401") as refused:
            post(target, context=context)
        refused.value.close()
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            post(target, context=ssl.create_default_context(cafile=str(certificates.other_ca)))


def test_a_jar_with_another_checksum_is_refused(http_target: HttpTarget, tmp_path: Path) -> None:
    listed, folder = tmp_path / "list", tmp_path / "jars"
    listed.write_text(f"# one jar\n{hashlib.sha256(b'jar').hexdigest()}  org/a/1/a-1.jar\n")
    http_target.otherwise = Answer(body=b"jar")
    install(listed, folder, http_target.url.rstrip("/"))
    assert (folder / "a-1.jar").read_bytes() == b"jar" and (folder / ".installed").exists()
    assert http_target.requests[0].path == "/org/a/1/a-1.jar"
    http_target.otherwise = Answer(body=b"another")
    with pytest.raises(ValueError, match="checksum"):
        install(listed, folder, http_target.url.rstrip("/"))
    assert not (folder / ".installed").exists()


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_without_maven_the_mock_cluster_must_do_except_in_ci(ci: str, code: int, tmp_path: Path) -> None:
    with HttpTarget() as target:
        target.otherwise = Answer(404)
        run = subprocess.run(
            [sys.executable, "-m", "scripts.kafka_jars", str(ROOT / "docker" / "kafka.txt"), str(tmp_path / "jars")],
            env={**os.environ, "CI": ci, "MAVEN_REPOSITORY": target.url},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == code
    assert run.stderr.count("\n") == 1 and "mock cluster" in run.stderr
