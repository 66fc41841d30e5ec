-- The tables that a mirror needs in its target: its place, and the conflicts that it decided.
--
-- The applier runs this file when it begins, in the schema `target.schema` of the mirror (default:
-- cdcbridge). Nothing is changed if the tables are there. They are not published, so no bridge of
-- the target reads them.

-- The place up to which the target has all changes of a mirror. The applier inserts a row in the
-- transaction that has the changes, and deletes the one before it.
--   mirror      the name of the mirror
--   source      the identity of the source, for example 7412345678901234567/16384
--   seq         the last message of the source's log that the target has
--   commit_lsn  the commit LSN of that message
create table if not exists mirror_places (
    mirror     text        not null,
    source     text        not null,
    id         bigint      generated always as identity,
    seq        bigint      not null,
    commit_lsn pg_lsn      not null,
    updated_at timestamptz not null default now(),
    primary key (mirror, source, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Conflicts: writes of one row on both sides of which neither had seen the other, and rows that a
-- change expected and did not find.
--   kind             as PostgreSQL 18 names it, for example update_origin_differs
--   source_row       the row that the source wrote; null: it deleted the row
--   target_row       the row that the target had; null: it had none
--   source_position  the position of the source's write, for example 16/B374D848#3
--   target_position  the position of the target's last write in its own log; null: not known
--   rule             the rule that decided, for example newest
--   winner           source or target; null: the row is on hold, and nobody has decided yet
--   state            `decided`; `held` until a person or a later write decides; `flipped` by
--                    `cdcbridge mirror conflicts flip`; `superseded` by a later write of the row
--   held_lsn         the place in the target's WAL when the row was put on hold; null: it was not
--   note             the reason, for example the unique constraint that was violated
create table if not exists conflicts (
    id              bigint      generated always as identity primary key,
    at              timestamptz not null default clock_timestamp(),
    mirror          text        not null,
    table_name      text        not null,
    key             text,
    kind            text        not null,
    source_row      json,
    target_row      json,
    source_position text        not null,
    target_position text,
    rule            text        not null,
    winner          text        check (winner in ('source', 'target')),
    state           text        not null default 'decided'
                                check (state in ('decided', 'held', 'flipped', 'superseded')),
    held_lsn        pg_lsn,
    note            text
);
create index if not exists conflicts_held on conflicts (mirror, table_name, key)
    where state = 'held';
