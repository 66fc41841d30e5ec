"""A mirror in the configuration file: what is refused, and how a table finds its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cdcbridge.config import Config, load
from cdcbridge.config.mirror import Mirror
from cdcbridge.errors import ConfigError


def config(folder: Path, *mirrors: dict[str, Any], **more: Any) -> Config:
    path = folder / "cdcbridge.yaml"
    path.write_text(yaml.safe_dump({"source": {"dsn": "dbname=a"}, "mirrors": list(mirrors), **more}))
    return load(path)


def mirror(**settings: Any) -> dict[str, Any]:
    return {"name": "to_b", "target": {"dsn": "dbname=b password=secret"}, "tables": ["public.*"], **settings}


def test_a_mirror_reads_the_log_as_a_stream(tmp_path: Path) -> None:
    (consumer,) = config(tmp_path, mirror(start="adopt", two_way={"peer": "to_a"})).consumers
    assert (consumer.name, consumer.mode, consumer.tables, consumer.start) == (
        "to_b",
        "stream",
        ("public.*",),
        "snapshot",
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tables": []}, "must not be empty"),
        ({"tables": ["orders"]}, "'orders' is not a table"),
        ({"tables": {"public.*": "public.one"}}, "takes several tables, which cannot all become 'public.one'"),
        ({"tables": {"public.a": "r.x", "public.b": "r.x"}}, "two tables become 'r.x'"),
        ({"tables": {"public.a": "x"}}, "'x' is not a table"),
        ({"apply": "append", "two_way": {"peer": "to_a"}}, "a history table has no second direction"),
        ({"triggers": "fire", "two_way": {"peer": "to_a"}}, "would happen twice"),
        ({"conflict": "hold"}, "This mirror has one, so remove them or give two_way"),
        ({"start": "adopt"}, "needs two_way"),
        ({"name": "To B"}, "name"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config(tmp_path, mirror(**settings))
    assert why in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the name of a consumer or of another mirror"):
        config(tmp_path, mirror(), consumers=[{"name": "to_b", "tables": ["public.t"]}])


def test_three_sides_that_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Three sides that write cannot agree"):
        config(
            tmp_path,
            mirror(two_way={"peer": "to_a"}),
            mirror(name="to_c", two_way={"peer": "to_a"}),
        )


def test_each_table_has_its_settings() -> None:
    one = Mirror.model_validate(
        mirror(
            tables={"public.orders": {"to": "r.sales", "columns": {"exclude": ["card"]}}, "public.*": {}},
            two_way={"peer": "to_a"},
            conflict={"public.o*": "hold", "public.orders": "newest"},
        )
    )
    assert one.route("public.orders").to == "r.sales"
    assert one.route("public.other").to == "public.other"
    assert one.rule("public.orders") == "hold"
    assert one.rule("public.x") == "newest"
    assert one.takes("public.x") and not one.takes("other.x")
