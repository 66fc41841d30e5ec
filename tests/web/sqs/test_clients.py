"""Clients that users have: two versions of the AWS CLI, the SDK for JavaScript, and a worker of Celery."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness.world import World, clean_environment, eventually
from tests.web.sqs.conftest import OPS, REGION

NODE = Path(__file__).parent / "node"
OLD, NEW = "aws-cli-query", "aws-cli"


def environment(folder: Path) -> dict[str, str]:
    return {
        **clean_environment(),
        "AWS_ACCESS_KEY_ID": OPS[0],
        "AWS_SECRET_ACCESS_KEY": OPS[1],
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_PAGER": "",
        "HOME": str(folder),
    }


class Cli:
    """One version of the AWS CLI, installed by `make servers`."""

    def __init__(self, version: str, url: str, folder: Path) -> None:
        self._url = url
        self._environment = {**environment(folder), "PYTHONPATH": str(Path(sys.prefix) / version)}

    def run(self, action: str, **named: Any) -> subprocess.CompletedProcess[str]:
        options = [
            part
            for name, value in named.items()
            for part in (f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value))
        ]
        return subprocess.run(
            [sys.executable, "-m", "awscli", "sqs", action, "--endpoint-url", self._url, *options],
            env=self._environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def __call__(self, action: str, **named: Any) -> Any:
        done = self.run(action, **named)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout else None


@pytest.mark.parametrize("version", [NEW, OLD])
def test_the_aws_cli(url: str, tmp_path: Path, version: str) -> None:
    aws = Cli(version, url, tmp_path)
    assert len(aws("list-queues")["QueueUrls"]) == 6
    queue = aws("get-queue-url", queue_name="billing")["QueueUrl"]
    attributes = {
        "n": {"DataType": "Number", "StringValue": "1"},
        "bytes": {"DataType": "Binary", "BinaryValue": "abc"},
    }
    body = "<grüße> & \r\n'🐘'"
    sent = aws("send-message", queue_url=queue, message_body=body, message_attributes=attributes)
    (found,) = aws(
        "receive-message", queue_url=queue, attribute_names="All", message_attribute_names="All", wait_time_seconds="5"
    )["Messages"]
    assert found["Body"] == body and found["MessageId"] == sent["MessageId"]
    # This CLI takes bytes as they are, and prints them in base64.
    assert found["MessageAttributes"] == {**attributes, "bytes": {"DataType": "Binary", "BinaryValue": "YWJj"}}
    assert found["MD5OfMessageAttributes"] == sent["MD5OfMessageAttributes"]
    assert found["Attributes"]["ApproximateReceiveCount"] == "1"
    handle = {"queue_url": queue, "receipt_handle": found["ReceiptHandle"]}
    aws("change-message-visibility", **handle, visibility_timeout="60")
    aws("delete-message", **handle)
    shown = aws("get-queue-attributes", queue_url=queue, attribute_names="All")["Attributes"]
    assert shown["ApproximateNumberOfMessages"] == "0" and "maxReceiveCount" in shown["RedrivePolicy"]
    entries = [
        {"Id": "a", "MessageBody": "x", "MessageAttributes": attributes},
        {"Id": "b", "MessageBody": "\ufffe"},
    ]
    answer = aws("send-message-batch", queue_url=queue, entries=entries)
    assert [one["Id"] for one in answer["Successful"]] == ["a"]
    assert [(one["Id"], one["Code"]) for one in answer["Failed"]] == [("b", "InvalidMessageContents")]
    assert answer["Successful"][0]["MD5OfMessageAttributes"] == sent["MD5OfMessageAttributes"]
    (found,) = aws("receive-message", queue_url=queue)["Messages"]
    entry = {"Id": "a", "ReceiptHandle": found["ReceiptHandle"]}
    changes = [{**entry, "VisibilityTimeout": 10}]
    assert aws("change-message-visibility-batch", queue_url=queue, entries=changes)["Successful"] == [{"Id": "a"}]
    assert aws("delete-message-batch", queue_url=queue, entries=[entry])["Successful"] == [{"Id": "a"}]
    aws("set-queue-attributes", queue_url=queue, attributes={"VisibilityTimeout": "40"})
    assert aws("list-dead-letter-source-queues", queue_url=f"{queue}-dead")["queueUrls"] == [queue]
    arn = f"arn:aws:sqs:{REGION}:000000000000:billing-dead"
    assert aws("start-message-move-task", source_arn=arn)["TaskHandle"]
    aws("purge-queue", queue_url=queue)
    assert not aws("receive-message", queue_url=queue)
    assert not aws("list-queues", queue_name_prefix="none")
    failed = aws.run("get-queue-url", queue_name="none")
    assert failed.returncode != 0 and "NonExistentQueue" in failed.stderr and "configuration file" in failed.stderr


def test_the_sdk_for_javascript(url: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["node", NODE / "exchange.mjs", url],
        env=environment(tmp_path),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found.pop("queues")) == 6
    assert found == {
        "first": {"body": "grüße 🐘", "n": "1", "bytes": [0, 255], "count": "1"},
        "again": "2",
        "sent": ["a", "b"],
        "deleted": ["0", "1"],
        "failed": [["x", "ReceiptHandleIsInvalid"]],
        "left": "0",
        "group": "g",
        "error": "QueueDoesNotExist",
    }


TASKS = """
from celery import Celery

app = Celery("tasks", broker="{broker}")
app.conf.update(
    task_default_queue="{queue}",
    broker_transport_options={{"region": "{region}", "is_secure": False, "wait_time_seconds": 5}},
    broker_connection_retry_on_startup=False,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    task_acks_late=True,
)

@app.task
def note(text):
    with open("{out}", "a") as file:
        file.write(text + "\\n")
"""


@contextmanager
def celery(folder: Path, url: str, queue: str) -> Iterator[Path]:
    """The file to which a worker writes the texts of its tasks. The tasks are in the module tasks of the folder."""
    out = folder / "out.txt"
    broker = url.replace("http://", f"sqs://{OPS[0]}:{OPS[1]}@")
    (folder / "tasks.py").write_text(TASKS.format(broker=broker, queue=queue, region=REGION, out=out))
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--pool", "solo", "--loglevel", "INFO"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with (folder / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)
    try:
        yield out
    finally:
        worker.terminate()
        assert worker.wait(40) == 0, (folder / "worker.log").read_text()


def test_a_worker_of_celery(world18: World, url: str, sqs: Any, billing: str, tmp_path: Path) -> None:
    with celery(tmp_path, url, "billing") as out:
        for text in ("one", "two"):
            call = f"import tasks; tasks.note.delay({text!r})"
            subprocess.run([sys.executable, "-c", call], cwd=tmp_path, env=environment(tmp_path), check=True)
        eventually(lambda: out.exists() and sorted(out.read_text().split()) == ["one", "two"], "both tasks ran")
        counts = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")

        def left() -> list[str]:
            found = sqs.get_queue_attributes(QueueUrl=billing, AttributeNames=list(counts))["Attributes"]
            return [found[name] for name in counts]

        eventually(lambda: left() == ["0", "0"], "both messages are deleted")
