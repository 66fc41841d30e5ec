"""The guide of the alerts is followed literally, with destinations on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cdcbridge.config import load
from cdcbridge.config.alerts import RULES
from tests.acceptance.test_docs import BLOCK, ROOT
from tests.alerts.conftest import titles, url
from tests.harness.brokers.http import HttpTarget
from tests.harness.world import World, clean_environment

PAGE = (ROOT / "docs" / "ALERTS.md").read_text()


def test_the_guide_tests_two_destinations_and_silences_a_rule(world18: World, http_target: HttpTarget) -> None:
    with HttpTarget() as oncall:
        environment = {
            **clean_environment(),
            "DATABASE_URL": world18.dsn,
            "PAGERDUTY_URL": url(oncall),
            "SLACK_URL": url(http_target),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        written = ""
        for _, kind, text in BLOCK.findall(PAGE):
            if kind == "yaml":
                (world18.folder / "cdcbridge.yaml").write_text(text)
                continue
            for line in text.splitlines():
                done = subprocess.run(
                    ["sh", "-c", line], cwd=world18.folder, env=environment, capture_output=True, text=True, check=True
                )
                written += done.stdout
        assert "oncall: JSON: ok\nteam: JSON: ok\n" in written
        assert written.count('"rule":"dead_letters"') == 3 and '"undelivered":[]' in written
        assert titles(oncall) == titles(http_target) == ["shop: test of the alerts"]


def test_the_guide_has_every_rule_with_its_severity(tmp_path: Path) -> None:
    path = tmp_path / "cdcbridge.yaml"
    path.write_text("{source: {dsn: x}, alerts: {to: [{name: a, urls: ['json://x']}]}}")
    alerts = load(path).alerts
    assert alerts is not None
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("| `"): row[1] for row in rows if row[0].strip("| `") in RULES}
    assert listed == {name: rule.severity for name, rule in alerts.rules.active()}
