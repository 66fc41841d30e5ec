"""`cdcbridge alerts …`, and what the program says of a configuration that it cannot use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.alerts.conftest import declare, kill_message, received, streams, titles, url
from tests.harness.brokers.http import Answer, HttpTarget
from tests.harness.world import World, clean_environment, eventually


def test_test_says_what_each_destination_answered(world18: World, http_target: HttpTarget) -> None:
    with HttpTarget() as other:
        declare(world18, url(http_target), url(other))
        world18.top_settings["alerts"]["to"].append({"name": "oncall", "urls": [url(other)], "severity": "critical"})
        done = world18.run_program("alerts", "test")
        assert (done.returncode, done.stdout) == (0, "team: JSON: ok\nteam: JSON: ok\noncall: JSON: ok\n")
        assert titles(http_target) == ["shop: test of the alerts"] and len(other.requests) == 2
        assert "Alerts of shop arrive here. Nothing is wrong." in received(http_target)[0]["message"]
        other.answer(Answer(403, b"go away"))
        done = world18.run_program("alerts", "test", "oncall")
        assert (
            done.returncode == 1 and done.stdout.startswith("oncall: JSON: Failed to send") and "go away" in done.stdout
        )
        assert len(http_target.requests) == 1
        other.answer(Answer(500))
        done = world18.run_program("alerts", "test", "oncall", "--json")
        assert done.returncode == 1 and '"ok":false' in done.stdout and '"destination":"oncall"' in done.stdout
        assert "a-secret-path" not in done.stdout + done.stderr


def test_test_of_an_unknown_destination(world18: World) -> None:
    declare(world18, "json://127.0.0.1:1/x")
    done = world18.run_program("alerts", "test", "tem")
    assert done.returncode == 2
    assert "has no destination 'tem'; did you mean team?; it has: team" in done.stderr.replace("\n    ", " ")
    del world18.top_settings["alerts"]
    done = world18.run_program("alerts", "test")
    assert done.returncode == 2 and "has no section `alerts`" in done.stderr


def test_silence_of_an_unknown_rule_lists_the_rules(world18: World) -> None:
    done = world18.run_program("alerts", "silence", "dead_leters", "--for", "2h")
    assert done.returncode == 2
    text = " ".join(done.stderr.split())
    assert (
        "there is no rule 'dead_leters'; did you mean dead_letters?; the rules are: slot_retained, slot_lost," in text
    )


def test_list(world18: World, http_target: HttpTarget) -> None:
    declare(world18, url(http_target))
    http_target.otherwise = Answer(503)
    done = world18.run_program("alerts", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no alert is open\n")
    world18.start_process()
    streams(world18)
    kill_message(world18)
    http_target.wait(1)
    found: Any = eventually(
        lambda: [n for n in world18.json("alerts", "list", "--json")["undelivered"] if n["deliveries"]], "it failed"
    )[0]
    assert (found["destination"], found["kind"], found["title"]) == ("team", "begins", "shop: dead letters: billing")
    (attempt,) = found["deliveries"]
    assert (attempt["service"], attempt["attempts"], attempt["delivered"]) == ("JSON", 1, False)
    assert "error=503" in attempt["error"]
    world18.run_program("alerts", "silence", "slot_lost", "--for", "2h")
    text = world18.run_program("alerts", "list").stdout
    for part in ("warning", "dead_letters", "billing has 1 dead letter.", "SILENCED", "slot_lost", "error=503"):
        assert part in text, text


def test_run_without_apprise(world18: World, tmp_path: Path) -> None:
    declare(world18, "json://127.0.0.1:1/x")
    path = world18.write_config()
    (tmp_path / "without" / "apprise").mkdir(parents=True)
    (tmp_path / "without" / "apprise" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'apprise'\", name='apprise')\n"
    )
    environment = {
        **clean_environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), str(Path(__file__).parents[2])])
    }  # fmt: skip
    for command in (["run"], ["alerts", "test"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "cdcbridge", "-c", path, *command],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        text = " ".join((done.stdout + done.stderr).split())
        assert "`alerts` needs the Python package apprise, which is not installed" in text
        assert "pip install 'cdcbridge[alerts]'" in text
    done = subprocess.run(
        [sys.executable, "-m", "cdcbridge", "-c", path, "alerts", "list"],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, "it needs no Apprise"


def test_run_refuses_a_url_that_apprise_refuses(world18: World) -> None:
    declare(world18, "slack://a-secret")
    done = world18.run_program("run")
    assert done.returncode == 2
    reason = "alerts.to.team.urls: Apprise does not accept entry 1, which begins with slack://"
    assert reason in done.stderr and "a-secret" not in done.stderr
    done = world18.run_program("check", "--json")
    found = [one for one in json.loads(done.stdout)["problems"] if one["code"] == "alerts_unusable"]
    assert done.returncode == 2 and [one["message"] for one in found] == [reason], "`check` reports what `run` refuses"


@pytest.mark.parametrize(
    ("alerts", "message"),
    [
        ({"to": []}, "alerts.to: the list is empty"),
        ({"to": [{"name": "a", "urls": []}]}, "alerts.to.0.urls: the list is empty"),
        ({"to": [{"name": "a", "urls": ["a-secret"]}]}, "entry 1 is not a URL, as in slack://"),
        (
            {"to": [{"name": "a", "urls": "json://a-secret"}]},
            "alerts.to.0.urls: the value is given, but expected a list",
        ),
        ({"to": [{"name": "a", "urls": ["json://a-secret"] * 2}]}, "a URL is given twice"),
        ({"to": [{"name": "a", "urls": ["json://a"]}] * 2}, "two destinations are named 'a'"),
        ({"rules": {"nonsense": {}}}, "alerts.rules.nonsense: unknown key. Known: slot_retained"),
        ({"rules": {"oldest_age": {"above": 10}}}, "alerts.rules.oldest_age.above: 10 is not a duration"),
        ({"rules": {"oldest_age": {"consumers": ["x"]}}}, "alerts.rules.oldest_age lists 'x', which is not a consumer"),
        ({"rules": {"slot_lost": True}}, "alerts.rules.slot_lost: true is given, but expected keys with values"),
        ({"every": "10ms"}, "alerts.every: '10ms' is out of range"),
    ],
)
def test_mistakes_in_the_file(world18: World, alerts: dict[str, Any], message: str) -> None:
    declare(world18, "json://127.0.0.1:1/x")
    world18.top_settings["alerts"] = {**world18.top_settings["alerts"], **alerts}
    done = world18.run_program("config", "check")
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr
    assert "a-secret" not in done.stderr


def test_urls_are_masked_and_rules_can_be_off(world18: World) -> None:
    declare(world18, "json://127.0.0.1:1/a-secret-path", dead_letters=False, xmin_held="off")
    shown = world18.run_program("config", "show").stdout
    assert "json://" not in shown and "**********" in shown
    assert "dead_letters: false" in shown and "xmin_held: 'off'" in shown
