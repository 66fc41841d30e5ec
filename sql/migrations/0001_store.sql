-- The store: one log, and what each consumer has yet to finish of it.
--
-- Runs with search_path set to the store's schema (default cdcbridge), in one transaction.
-- A message of a queue consumer is in exactly one of these places, or it is finished:
--   waiting   not delivered yet (or redriven), in log order
--   leases    in flight, or its visibility timeout has passed and nobody has taken it since
--   delayed   given back by nack, visible from a moment on
--   dead_messages
-- The view consumer_messages shows the first three, a row per message.

create table schema_migrations (
    version     int         primary key,
    name        text        not null,
    applied_at  timestamptz not null default now()
);

-- Which functions and views stand here: a checksum over their files.
create table schema_code (
    only_row   boolean     primary key default true check (only_row),
    checksum   text        not null,
    program    text        not null,
    applied_at timestamptz not null default now()
);

-- Which database feeds this store. One row: one store serves one source.
create table source (
    only_row           boolean     primary key default true check (only_row),
    system_identifier  text        not null,
    timeline           int         not null,
    database           text        not null,
    slot               text        not null,
    plugin             text        not null,
    catalog            jsonb       not null default '{}',
    recorded_at        timestamptz not null default now()
);

-- One row per leadership; the newest epoch alone may append. Rows are never rewritten.
create table leaders (
    epoch      bigint      generated always as identity primary key,
    holder     text        not null,
    pid        int         not null,
    started_at timestamptz not null default now()
);

-- How far the log goes. Each append inserts a row and deletes the one before: the newest is found at the right end
-- of the index, however many dead versions some old snapshot keeps alive to its left.
-- unfinished: the position stands inside a transaction; holds the options that it was begun with.
-- commit_time: all that was committed on the source before this moment is in the log, or is nobody's.
create table positions (
    id          bigint      generated always as identity primary key,
    commit_lsn  pg_lsn      not null,
    ordinal     int         not null,
    end_lsn     pg_lsn      not null,
    unfinished  jsonb,
    commit_time timestamptz not null,
    recorded_at timestamptz not null default now()
);

create table consumers (
    id         int         generated always as identity primary key,
    name       text        not null unique check (name ~ '^[a-z0-9][a-z0-9_.-]{0,62}$'),
    mode       text        not null check (mode in ('queue', 'fifo', 'stream')),
    config     jsonb       not null,
    paused     boolean     not null default false,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

-- The log. Order is seq. Segments are its partitions, made ahead of need by create_segments().
create sequence messages_seq cache 1;
create table messages (
    seq         bigint      not null,
    topic       text        not null,
    key         text,
    partition   int         not null,
    data        json        not null,
    commit_lsn  pg_lsn,
    ordinal     int,
    xid         bigint,
    commit_time timestamptz,
    inserted_at timestamptz not null default now(),
    primary key (seq)
) partition by range (seq);
comment on table messages is 'The log: each change once, in position order';

-- Fan-out. A row stands for the messages seqs, rising; a large append writes many to a row, a small one one each.
-- ord is the first seq, or for redriven messages the end of the log at that moment; tie tells redrives apart.
-- keys is null where the consumer uses the log's keys.
create sequence redrives_seq;
create table waiting (
    consumer_id int         not null,
    ord         bigint      not null,
    tie         bigint      not null default 0,
    seqs        bigint[]    not null,
    keys        text[],
    inserted_at timestamptz not null default now(),
    primary key (consumer_id, ord, tie)
) partition by list (consumer_id);

-- slot: which share of the consumer's max_in_flight the lease counts against. token: the delivery's fence.
create sequence tokens_seq;
create table leases (
    consumer_id       int         not null,
    seq               bigint      not null,
    key               text,
    token             bigint      not null,
    slot              smallint    not null,
    deliver_count     int         not null,
    last_delivered_at timestamptz not null,
    not_visible_until timestamptz not null,
    history           jsonb       not null default '[]',
    inserted_at       timestamptz not null,
    primary key (consumer_id, seq)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

create table delayed (
    consumer_id       int         not null,
    seq               bigint      not null,
    key               text,
    deliver_count     int         not null,
    last_delivered_at timestamptz not null,
    visible_at        timestamptz not null,
    history           jsonb       not null,
    inserted_at       timestamptz not null,
    primary key (consumer_id, seq)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);
create index delayed_visible_at on delayed (consumer_id, visible_at, seq);

create sequence dead_messages_id_seq;
create table dead_messages (
    id                bigint      not null default nextval('dead_messages_id_seq'),
    consumer_id       int         not null,
    seq               bigint      not null,
    topic             text        not null,
    key               text,
    data              json        not null,
    deliver_count     int         not null,
    reason            text        not null,
    history           json        not null,
    commit_lsn        pg_lsn,
    ordinal           int,
    commit_time       timestamptz,
    inserted_at       timestamptz not null,
    died_at           timestamptz not null default clock_timestamp(),
    primary key (consumer_id, id)
) partition by list (consumer_id);
alter sequence dead_messages_id_seq owned by dead_messages.id;

-- What redriven messages carry until they are finished: the segment that held them may be gone by then.
create table redriven (
    consumer_id int         not null,
    seq         bigint      not null,
    topic       text        not null,
    key         text,
    data        json        not null,
    commit_lsn  pg_lsn,
    ordinal     int,
    commit_time timestamptz,
    inserted_at timestamptz not null,
    primary key (consumer_id, seq)
);
