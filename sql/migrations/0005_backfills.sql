-- Backfills: rows that were in a table before, read in chunks and put into the log for one consumer.

-- reader: the one consumer that a row read by a backfill is for; null: whoever takes the topic.
alter table messages add reader int;
alter type stream_wish add attribute reader int;

-- When the backfills of a consumer with start: snapshot were made.
alter table consumers add snapshot_at timestamptz;

-- state: waiting (for a bridge), running, paused; done, failed, cancelled. note: what it waits for, or why it failed.
-- after_seq: the log's end when the consumer was made, where this is its snapshot: what came behind it came as a change.
-- since: the source's snapshot when it began: row versions that are younger come as changes. early: keys whose changes came before
-- its first rows did. total: rows, as estimated then.
create table backfills (
    id          int         generated always as identity primary key,
    consumer_id int         not null references consumers on delete cascade,
    table_name  text        not null,
    condition   text,
    columns     text[],
    rate        int,
    state       text        not null default 'waiting'
                            check (state in ('waiting', 'running', 'paused', 'done', 'failed', 'cancelled')),
    note        text,
    after_seq   bigint,
    since       text,
    early       jsonb,
    total       bigint,
    created_at  timestamptz not null default now(),
    started_at  timestamptz,
    finished_at timestamptz
);
create unique index backfills_unfinished on backfills (consumer_id, table_name) where state in ('waiting', 'running', 'paused');

-- How far each is. Inserted, and the row before deleted, with each append of its rows: the newest is at the right end of the
-- index. place: the key of the last row that is done, as texts. done: rows looked at; sent: those that became messages.
create table backfill_progress (
    backfill_id int         not null references backfills on delete cascade,
    id          bigint      generated always as identity,
    place       jsonb       not null,
    done        bigint      not null,
    sent        bigint      not null,
    primary key (backfill_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- Those whose arguments are others now come back with this version's code.
drop function if exists wish_of(jsonb), is_wanted(text, json, stream_wish);
