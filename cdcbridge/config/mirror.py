"""Describe one mirror of the configuration file: another PostgreSQL to which cdcbridge applies changes.

A mirror reads the log as a consumer of mode `stream` does, so Config makes such a consumer of each mirror. This module
never accesses a file, the environment or a database.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from cdcbridge.config.consumer import Columns, Consumer
from cdcbridge.config.sink_base import Model
from cdcbridge.routing.patterns import is_name, matches, refuse_bad_patterns, take

ConflictRule = Literal["newest", "prefer_source", "prefer_target", "hold"]
_EVERY_TABLE: Final = "*.*"


class MirrorTarget(Model):
    """The database to which changes are applied."""

    dsn: Annotated[
        SecretStr,
        Field(
            description="The database to which the changes are applied. Required.",
            examples=["${WAREHOUSE_URL}"],
        ),
    ]
    schema_: Annotated[
        str,
        Field(pattern=r"^[a-z_][a-z0-9_]{0,53}$", alias="schema"),
        Field(
            description="The schema in the target that holds the mirror's place and the table `conflicts`. With "
            "`two_way`, it is the schema of the target's own store.",
            examples=["cdcbridge"],
        ),
    ] = "cdcbridge"
    store_dsn: Annotated[
        SecretStr | None,
        Field(
            description="The database of the target's own store, for `two_way`. Without it, `dsn`.",
            examples=["${WAREHOUSE_STORE_URL}"],
        ),
    ] = None


class MirrorTable(Model):
    """How one table is mirrored."""

    to: Annotated[
        str | None,
        Field(
            description="The table in the target. Without it, the table of the same name.",
            examples=["reporting.orders"],
        ),
    ] = None
    columns: Annotated[
        Columns | None,
        Field(
            description="Which columns are mirrored. Without it, all of them.", examples=["{exclude: [card_number]}"]
        ),
    ] = None

    @field_validator("to")
    @classmethod
    def _is_a_table(cls, value: str | None) -> str | None:
        if value is not None and ("." not in value.strip(".") or "*" in value):
            raise ValueError(f"{value!r} is not a table: write schema.table")
        return value


class CreateTables(Model):
    """How a missing table is created in the target."""

    defaults: Annotated[
        bool,
        Field(
            description="With true, columns also get the source's defaults, except those of sequences.",
            examples=["true"],
        ),
    ] = False


class TwoWay(Model):
    """The other direction of a mirror."""

    peer: Annotated[
        str,
        Field(min_length=1),
        Field(
            description="The name of the mirror that leads back, in the file of the target's own bridge. Required.",
            examples=["to_a"],
        ),
    ]


class Mirror(Model):
    """One mirror: which tables it takes, where it applies them, and how it decides conflicts."""

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$"),
        Field(
            description="The mirror's name, as commands give it. No consumer has the same name. Required.",
            examples=["to_b"],
        ),
    ]
    target: Annotated[
        MirrorTarget,
        Field(description="The database to which the changes are applied.", examples=['{dsn: "${B_DSN}"}']),
    ]
    tables: Annotated[
        tuple[str, ...] | dict[str, str | MirrorTable],
        Field(
            description="The tables to mirror, as in `consumers`. A mapping also gives names of tables in the target, "
            "or the columns to mirror.",
            examples=['["public.*"]', "{public.orders: reporting.orders}"],
        ),
    ]
    start: Annotated[
        Literal["now", "earliest", "snapshot", "adopt"],
        Field(
            description="The place where a new mirror begins. `now`: with the next change. `earliest`: with the oldest "
            "message of the log. `snapshot`: with the rows that are in the tables. `adopt`: as `snapshot`, and both "
            "sides may have rows already.",
            examples=["adopt"],
        ),
    ] = "snapshot"
    apply: Annotated[
        Literal["upsert", "append"],
        Field(
            description="`upsert`: the target's table equals the source's. `append`: the target's table is a history, "
            "with a row for each change.",
            examples=["append"],
        ),
    ] = "upsert"
    create_tables: Annotated[
        bool | CreateTables,
        Field(
            description="Whether tables that the target lacks are created, with columns, types and primary key.",
            examples=["false", "{defaults: true}"],
        ),
    ] = True
    two_way: Annotated[
        TwoWay | None,
        Field(
            description="The mirror that leads back. With it, both sides may write. See docs/TWO_WAY.md.",
            examples=["{peer: to_a}"],
        ),
    ] = None
    conflict: Annotated[
        ConflictRule | dict[str, ConflictRule],
        Field(
            description="With `two_way`: which of two concurrent writes of one row wins. A mapping gives the rule by "
            "table. `newest`: the later commit. `hold`: neither, and a person decides.",
            examples=["newest", "{public.orders: hold}"],
        ),
    ] = "newest"
    unique: Annotated[
        Literal["hold", "newest"],
        Field(
            description="With `two_way`: what happens to a row that violates a unique constraint other than the key. "
            "`hold`: it is not applied, and listed. `newest`: the older of the two rows is removed on both sides.",
            examples=["newest"],
        ),
    ] = "hold"
    triggers: Annotated[
        Literal["replica", "fire"],
        Field(
            description="`replica`: the target's triggers and foreign keys do not run (session_replication_role). "
            "`fire`: they run as for any session.",
            examples=["fire"],
        ),
    ] = "replica"

    @field_validator("tables")
    @classmethod
    def _table_patterns(cls, value: tuple[str, ...] | dict[str, str | MirrorTable]) -> Any:
        if not value:
            raise ValueError("must not be empty")
        refuse_bad_patterns(tuple(value))
        if isinstance(value, dict):
            targets = [_route(one).to for one in value.values()]
            for pattern, target in zip(value, targets, strict=True):
                if target is not None and not is_name(pattern):
                    raise ValueError(f"{pattern!r} takes several tables, which cannot all become {target!r}")
            for target in {one for one in targets if one is not None and targets.count(one) > 1}:
                raise ValueError(f"two tables become {target!r} in the target")
        return value

    @field_validator("conflict")
    @classmethod
    def _conflict_patterns(cls, value: ConflictRule | dict[str, ConflictRule]) -> Any:
        if isinstance(value, dict):
            refuse_bad_patterns(tuple(value))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.two_way is not None and self.apply == "append":
            raise ValueError("a history table has no second direction: apply: append and two_way exclude each other")
        if self.two_way is not None and self.triggers == "fire":
            raise ValueError(
                "with two_way, triggers have run where the row was written. Their changes are mirrored, and would "
                "happen twice with triggers: fire"
            )
        given = {
            name for name in ("conflict", "unique") if getattr(self, name) != type(self).model_fields[name].default
        }
        if self.two_way is None and given:
            raise ValueError(
                f"{' and '.join(sorted(given))} decide between two sides that write. This mirror has one, so remove "
                "them or give two_way"
            )
        if self.start == "adopt" and self.two_way is None:
            raise ValueError("start: adopt joins two databases that both have rows, which needs two_way")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of the tables that the mirror takes."""
        return tuple(self.tables)

    def route(self, topic: str) -> MirrorTable:
        """Return the settings of a table, for example those of `public.orders`. The first pattern that takes it counts.

        `to` of the result is always set.
        """
        found = MirrorTable()
        if isinstance(self.tables, dict):
            exact = self.tables.get(topic)
            fitting = [one for pattern, one in self.tables.items() if _fits(pattern, topic)]
            found = _route(exact if exact is not None else fitting[0] if fitting else topic)
        return found if found.to is not None else found.model_copy(update={"to": topic})

    def topic(self, table: str) -> str:
        """Return the table in the source that becomes a table of the target, for example `reporting.orders`."""
        given = self.tables.items() if isinstance(self.tables, dict) else ()
        return next((topic for topic, one in given if _route(one).to == table), table)

    def rule(self, topic: str) -> ConflictRule:
        """Return the rule for conflicts in a table. The first pattern that takes the table counts."""
        if not isinstance(self.conflict, dict):
            return self.conflict
        return next((rule for pattern, rule in self.conflict.items() if matches(pattern, topic)), "newest")

    def takes(self, topic: str) -> bool:
        """Return whether the mirror takes a table."""
        return take(self.patterns, topic)


def _route(given: str | MirrorTable) -> MirrorTable:
    return MirrorTable(to=given) if isinstance(given, str) else given


def _fits(pattern: str, topic: str) -> bool:
    return not pattern.startswith("!") and matches(pattern, topic)


class MirrorConsumer(Consumer):
    """The consumer by which a mirror reads the log.

    Its settings in the store include those of the mirror, with asterisks for secrets.
    """

    mirror: Mirror


def consumer_of(mirror: Mirror) -> MirrorConsumer:
    """Return the stream consumer by which the mirror reads the log."""
    start = "snapshot" if mirror.start == "adopt" else mirror.start
    return MirrorConsumer.model_validate(
        {"name": mirror.name, "mode": "stream", "tables": mirror.patterns, "start": start, "mirror": mirror}
    )
