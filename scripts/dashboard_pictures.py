"""Draw the pictures of docs/DASHBOARD.md: a store with life, a bridge, `serve`, and a browser that looks.

    python -m scripts.dashboard_pictures

The figures of the past six hours are made up. Everything else is what the pages show of a real server.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import yaml
from playwright.sync_api import sync_playwright

from cdcbridge.demo.embedded import EmbeddedServer, wheel_binaries

FOLDER: Final = Path(__file__).parents[1] / "docs" / "pictures"
PORT: Final = 9188
PICTURES: Final = {
    "overview": "/",
    "consumer": "/consumers/search",
    "letters": "/consumers/billing/dead",
    "history": "/log/history?topic=public.orders&key=17",
    "filter": "/consumers/billing/filter?filter=record.status+%3D%3D+%27paid%27",
}
PAST: Final = """
    insert into cdcbridge_internal.samples (minute, subject, figures)
    select date_trunc('minute', now()) - make_interval(mins => n), s.name, jsonb_build_object(
        'pending', greatest(0, round(s.size * (1 + sin(n / 40.0 + s.size)) + (n * 37 % 11) * s.size / 90)),
        'in_flight', 5, 'dead', greatest(0, round(s.size / 20 - n / 30.0)),
        'oldest_age_seconds', abs(200 * sin(n / 60.0)), 'retained_bytes', 4e5 + 2e6 * abs(sin(n / 30.0)),
        'lag_seconds', (n * 31 % 17) / 60.0, 'last_seq', 400000 - n * 1000 - round(200 * sin(n / 9.0)))
    from generate_series(1, 355) n, (values ('', 0), ('billing', 200), ('search', 300), ('audit', 20), ('mail', 40)) s (name, size)
    on conflict do nothing"""


def main() -> None:
    """Draw all pictures."""
    with EmbeddedServer(wheel_binaries()) as server, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "cdcbridge.yaml"
        config.write_text(yaml.safe_dump(settings(server.dsn())))
        with psycopg.connect(server.dsn(), autocommit=True) as sql, psycopg.connect(server.dsn()) as worker:
            sql.execute("create table orders (id int primary key, customer text, status text, amount numeric(10, 2))")
            sql.execute("create table customers (id int primary key, name text)")
            with program(config, "run"):
                while sql.execute("select 1 from pg_stat_replication where state = 'streaming'").fetchone() is None:
                    time.sleep(0.1)
                live(sql, worker)
                with program(config, "serve"):
                    time.sleep(12)  # the bridge measures every ten seconds
                    look()


def settings(dsn: str) -> dict[str, Any]:
    """Return the configuration, whose one sink cannot reach its target."""
    orders = ["public.orders"]
    return {
        "source": {"dsn": dsn},
        "api": {"listen": f"127.0.0.1:{PORT}"},
        "http": None,
        "consumers": [
            {"name": "billing", "tables": orders, "max_deliveries": 3},
            {"name": "search", "mode": "fifo", "tables": ["public.orders", "public.customers"]},
            {"name": "audit", "mode": "stream", "tables": ["public.*"]},
            {"name": "mail", "tables": ["public.customers"]},
            {"name": "hook", "tables": orders, "sink": {"type": "http", "url": "http://127.0.0.1:9/orders"}},
        ],
    }


@contextmanager
def program(config: Path, *arguments: str) -> Iterator[None]:
    """Run cdcbridge for the duration of a `with` block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cdcbridge", "-c", str(config), *arguments], stderr=subprocess.DEVNULL
    )
    time.sleep(2)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def live(sql: psycopg.Connection[Any], worker: psycopg.Connection[Any]) -> None:
    """Write orders, and let receivers take, fail and hold messages."""
    sql.execute("insert into customers select n, 'customer ' || n from generate_series(1, 60) n")
    for number in range(1, 300):
        status = "paid" if number % 2 else "open"
        sql.execute(
            "insert into orders values (%s, %s, %s, %s)", (number, f"customer {number % 17}", status, 1.5 * number)
        )
    for status in ("packed", "sent", "returned"):
        sql.execute("update orders set status = %s, amount = amount + 0.5 where id = 17", (status,))
    time.sleep(3)
    sql.execute("set search_path = cdcbridge")
    take = "select nack('billing', array(select receipt from receive('billing', %s)), '0', %s, %s)"
    for _ in range(3):
        sql.execute(take, (20, "card declined: the bank does not answer", False))
    sql.execute(take, (7, "the template is missing", True))
    taken = [row[0] for row in sql.execute("select receipt from receive('search', 6, '1 hour')")]
    sql.execute("select nack('search', %s, '10 min', 'the index is locked')", (taken[:2],))
    worker.execute("set application_name = 'worker 3'")
    worker.execute("select count(*) from cdcbridge.receive('mail', 10)")
    sql.execute(PAST)


def look() -> None:
    """Open the pages, and keep what the browser shows."""
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_context(color_scheme=scheme, viewport={"width": 1180, "height": 800}).new_page()
            for name, path in PICTURES.items():
                page.goto(f"http://127.0.0.1:{PORT}{path}")
                page.screenshot(path=FOLDER / f"dashboard-{name}-{scheme}.png", full_page=name == "overview")
        browser.close()


if __name__ == "__main__":
    main()
