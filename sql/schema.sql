-- The tables of a store, in the order in which a change meets them.
--
-- `cdcbridge migrate` runs this file once, in one transaction, with search_path set to the schema of the store (default: cdcbridge).
-- Functions and views are in files of their own, which are loaded again whenever they change.
--
-- The bridge appends each change once to the log, the table messages. In the same transaction it notes for each queue and fifo
-- consumer that the change waits. From then on a message of a consumer is in exactly one of these tables, or it is finished:
--
--   waiting         not delivered yet, in log order
--   leases          delivered, and neither acked nor given back
--   delayed         given back by nack, or published for later: visible again from some time on
--   dead_messages   delivered too often, or refused
--
-- Each move from one table to another is one transaction. The view consumer_messages shows the first three tables with a row per
-- message. Streams have no rows of their own per message: they read the log, and the table offsets keeps how far.


-- 1. The version of the store

create table schema_migrations (
    version     int         primary key,
    name        text        not null,
    applied_at  timestamptz not null default now()
);

-- The functions and views that are installed: a checksum of their files, and the version of the program that installed them.
create table schema_code (
    only_row   boolean     primary key default true check (only_row),
    checksum   text        not null,
    program    text        not null,
    applied_at timestamptz not null default now()
);

-- The code of functions that are made anew when consumers are added or removed.
--   per_consumer/...  functions that each queue and fifo consumer has for itself, with __id__ for its id (sql/internal/per_consumer)
--   dispatch/...      functions that call them, with __calls__ for the calls (sql/internal/dispatch)
create table code_templates (
    name text primary key,
    code text not null
);

-- A limit that functions check: no message is delayed for longer than store.max_retention of the configuration.
create table limits (
    only_row      boolean  primary key default true check (only_row),
    max_retention interval not null default '30 days'
);
insert into limits default values;


-- 2. The source, and the bridge that reads it

-- The database that feeds this store. One store serves one source, so there is one row.
--   catalog       the columns and keys of the tables, as the bridge last read them
--   database_oid  the same database keeps it when it is renamed
--   capture       the publications and the tables named in the configuration, as they were when the last session began
--                 (cdcbridge/source/capture.py)
--   feeds         the consumers that the leading bridge feeds (cdcbridge/store/feeds.py); null before its first session
create table source (
    only_row           boolean     primary key default true check (only_row),
    system_identifier  text        not null,
    timeline           int         not null,
    database           text        not null,
    slot               text        not null,
    plugin             text        not null,
    catalog            jsonb       not null default '{}',
    recorded_at        timestamptz not null default now(),
    database_oid       bigint,
    capture            jsonb,
    feeds              jsonb
);

-- One row for each time that a bridge took the lead. Only the bridge with the newest epoch may append. Rows are never updated.
create table leaders (
    epoch      bigint      generated always as identity primary key,
    holder     text        not null,
    pid        int         not null,
    started_at timestamptz not null default now()
);

-- How far the log reaches in the source's WAL. Each append inserts a row and deletes the one before it. The newest row is at the
-- right end of the index, so a look-up stays fast while an old snapshot keeps many dead rows to its left.
--   unfinished   the position is inside a transaction: the options with which its decoding began
--   commit_time  the log contains every wanted change that the source committed before this time
create table positions (
    id          bigint      generated always as identity primary key,
    commit_lsn  pg_lsn      not null,
    ordinal     int         not null,
    end_lsn     pg_lsn      not null,
    unfinished  jsonb,
    commit_time timestamptz not null,
    recorded_at timestamptz not null default now()
);

-- Transactions that the source sends before they commit. No consumer sees them. The table is unlogged: after a crash of the store
-- or the bridge, the source sends them again from their beginning.
--   block  messages of the output plugin, each with its length and its subtransaction
--   n      number of the block within its transaction, from 0
create unlogged table spilled (
    xid   bigint not null,
    n     int    not null,
    block bytea  not null,
    primary key (xid, n)
);
alter table spilled alter column block set storage external; -- compression would cost more than it saves

-- The last error of a bridge, unless the store was out of reach. holder: the host and the process.
create table last_error (
    only_row boolean     primary key default true check (only_row),
    message  text        not null,
    hint     text,
    holder   text        not null,
    at       timestamptz not null default clock_timestamp()
);

-- Tables of the source whose replica identity the event trigger set to FULL. before: pg_class.relreplident before that.
-- `cdcbridge uninstall` restores it after the trigger is gone.
create table given_identities (
    relation oid  primary key,
    before   text not null
);


-- 3. The log

-- How many partitions the log has from which seq on. Publishers read the number from the sequence, because a session sees the
-- current value of a sequence whatever its snapshot.
create table partitionings (
    from_seq   bigint primary key,
    partitions int    not null
);
create sequence partitions_seq;
insert into partitionings (from_seq, partitions) values (0, 16);
select setval('partitions_seq', 16);

-- Each change or published message, once. seq gives the order. Segments are partitions of 1,000,000 seqs, which create_segments()
-- makes before they are needed and retention drops as a whole.
--   old_key    the key before an update that changed it
--   reader     the only consumer for which a backfill read this row; null: every consumer of the topic
--   publisher  the transaction that published the message
--   horizon    all transactions with lower ids had ended at inserted_at; null where commit_time is known
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
    old_key     text,
    reader      int,
    publisher   bigint,
    horizon     bigint,
    primary key (seq)
) partition by range (seq);
comment on table messages is 'The log: each change once, in position order';

-- At the time `at` every seq up to this one was committed, or never will be. A running bridge adds a row every 10 s while the log grows.
create table safe_points (
    seq bigint      primary key,
    at  timestamptz not null
);

-- The dedup ids of the last minutes: publish() with one of them adds nothing and returns its seq.
create table published (
    topic        text        not null,
    dedup_id     text        not null,
    seq          bigint      not null,
    published_at timestamptz not null,
    primary key (topic, dedup_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = off);
create index published_at on published (published_at);

-- The gap messages of the last 30 days, so that `cdcbridge status` can name the latest ones without reading the log.
--   record     the record of the gap message
--   consumers  the names of the consumers that received it
create table gaps (
    id        bigint      generated always as identity primary key,
    at        timestamptz not null default clock_timestamp(),
    record    jsonb       not null,
    consumers text[]      not null
);


-- 4. Consumers

-- snapshot_at: when the backfills of a consumer with `start: snapshot` were made.
create table consumers (
    id          int         generated always as identity primary key,
    name        text        not null unique check (name ~ '^[a-z0-9][a-z0-9_.-]{0,62}$'),
    mode        text        not null check (mode in ('queue', 'fifo', 'stream')),
    config      jsonb       not null,
    paused      boolean     not null default false,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    snapshot_at timestamptz
);
create index consumers_topics on consumers using gin ((config -> 'topics'));

-- The transaction that last added, changed or removed a consumer. A publisher whose snapshot is older would miss that change; it
-- reads the current value here whatever its snapshot, and refuses.
create sequence consumers_xid_seq;


-- 5. The messages of queue and fifo consumers

-- Messages that have not been delivered. A row stands for all messages of seqs, which rise: a large append writes 50 to a row, a
-- small append one. Each consumer has a partition of its own, so that removing it drops a table.
--   ord, tie    place in the consumer's order. ord is the first seq. For redriven messages it is the log's end at that time, and
--               tie distinguishes several redrives.
--   keys        the consumer's own keys; null: the keys of the log. One key with several seqs is a run: all have this key.
--   barrier     fifo: the message waits for all before it, and all after it wait for the message (a truncate)
--   not_before  fifo: a published message that is delivered from this time on. In queue mode it is in delayed.
create sequence redrives_seq;
create table waiting (
    consumer_id int         not null,
    ord         bigint      not null,
    tie         bigint      not null default 0,
    seqs        bigint[]    not null,
    keys        text[],
    inserted_at timestamptz not null default now(),
    barrier     boolean     not null default false,
    not_before  timestamptz,
    primary key (consumer_id, ord, tie)
) partition by list (consumer_id);

-- The messages that one receive() took. It writes a row for all of them, not a row per message. An ack of all deletes the row.
--   token  the claim, and with it the second half of each receipt
--   part   the number of the row's first message in the claim, from 1; negative where extend() took that message out of its row
--   slot   the part of the consumer's max_in_flight that these messages count against
--   keys   the consumer's own keys; null: the keys of the log
create sequence tokens_seq;
create table leases (
    consumer_id       int         not null,
    token             bigint      not null,
    part              int         not null,
    slot              smallint    not null,
    seqs              bigint[]    not null,
    keys              text[],
    barrier           boolean     not null default false,
    deliver_count     int         not null,
    history           jsonb       not null default '[]',
    last_delivered_at timestamptz not null,
    not_visible_until timestamptz not null,
    inserted_at       timestamptz not null,
    primary key (consumer_id, token, part)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- Messages of a lease that are finished while others of the same row are not.
create table settled (
    consumer_id int      not null,
    token       bigint   not null,
    part        int      not null,
    seq         bigint   not null,
    primary key (consumer_id, token, part, seq)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- Messages that were given back by nack, and in queue mode those that were published for later.
--   ord, tie  place in the consumer's order, as in waiting
--   in_order  the message is a fifo consumer's
create table delayed (
    consumer_id       int         not null,
    seq               bigint      not null,
    key               text,
    deliver_count     int         not null,
    last_delivered_at timestamptz not null,
    visible_at        timestamptz not null,
    history           jsonb       not null,
    inserted_at       timestamptz not null,
    ord               bigint      not null,
    tie               bigint      not null default 0,
    barrier           boolean     not null default false,
    in_order          boolean     not null default false,
    primary key (consumer_id, seq)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- Each kind of look-up has one index that can serve it. Statistics of an almost empty table make all indexes look equally cheap, and
-- the wrong one reads all rows of the consumer for each message.
-- By key: statements say `consumer_id + 0 = ...`, which no other index serves. The hash also covers keys of more than 2,700 bytes, which
-- a btree refuses.
create index delayed_key on delayed (hashtextextended(key, consumer_id)) where in_order;
-- By time: statements say `visible_at > '-infinity'`. Those that look for a seq do not, and use the primary key.
create index delayed_visible_at on delayed (consumer_id, visible_at, seq) where visible_at > '-infinity';
-- A fifo claim asks whether a barrier was given back, which is rare.
create index delayed_barrier on delayed (consumer_id) where barrier;

-- Dead letters, each with its data: the segment of the log may be dropped before an operator looks at them.
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

-- The content of redriven and replayed messages until they are finished, for the same reason. Consumers with `on_leave: delete` also
-- have content of their own here.
--   replayed  a replay put the message here, and it was no dead letter
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
    ord         bigint      not null,
    tie         bigint      not null default 0,
    replayed    boolean     not null default false,
    primary key (consumer_id, seq)
);

-- Where a claim begins to look, so that it does not read through what is finished. Rows are inserted and deleted, never updated: the
-- newest is at the right end of the index. Each row stays true for ever; the newest one saves the most work.
--   waiting_floor, passed  a row of waiting with an ord below the floor, now or later, has an ord that is in passed. Claims have passed
--                          it by because its key is held, its time has not come, or another claim had locked it.
--   token_floor, tokens    a lease with a token below the floor has a token that is in tokens
create table hints (
    consumer_id   int      not null,
    id            bigint   generated always as identity,
    waiting_floor bigint   not null,
    passed        bigint[] not null default '{}',
    token_floor   bigint   not null,
    tokens        bigint[] not null,
    primary key (consumer_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = off);

-- A delivery that moves from one table to another, for example from leases to delayed. The columns are those of leases and delayed.
--   ordinal  the number of the message in its claim
create type delivery as (
    token             bigint,
    part              int,
    ordinal           int,
    seq               bigint,
    key               text,
    barrier           boolean,
    deliver_count     int,
    history           jsonb,
    last_delivered_at timestamptz,
    not_visible_until timestamptz,
    inserted_at       timestamptz,
    ord               bigint,
    tie               bigint
);


-- 6. Streams

-- How far each group is in each partition: its members have finished all messages up to seq. Rows are inserted and deleted, never
-- updated, as in positions.
--   id            rises with each read and each commit of the partition. The smallest is the least recently read one; under a lease it is
--                 in the receipt.
--   leased_until  a member reads the partition until then
--   lost          how many messages retention dropped before the group had read them. The group reads nothing until a seek.
create table offsets (
    consumer_id  int         not null,
    partition    int         not null,
    id           bigint      generated always as identity,
    seq          bigint      not null,
    leased_until timestamptz,
    lost         bigint,
    updated_at   timestamptz not null,
    primary key (consumer_id, partition, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- What a group reads of the log.
--   topics      topics of published messages
--   tables      names of tables, for example public.orders; null: all tables of all schemas
--   schemas     schemas whose tables are all wanted
--   operations  for example insert; null: all
--   reader      the group's id, for rows that a backfill read for it
--   taken       patterns of LIKE for names in part, for example sales.o_*; null: there are none
--   left_out    the same for tables that are left out
create type stream_wish as (
    topics     text[],
    tables     text[],
    schemas    text[],
    operations text[],
    reader     int,
    taken      text[],
    left_out   text[]
);


-- 7. Backfills: rows that were in a table before its changes were captured, read in chunks for one consumer

-- state: waiting for a bridge, running or paused; afterwards done, failed or cancelled.
--   note       what it waits for, or why it failed
--   after_seq  the log's end when the consumer was made, if this backfill is its snapshot: later rows arrived as changes
--   since      the source's snapshot when it began: younger versions of a row arrive as changes
--   early      keys whose changes arrived before the first rows of the backfill
--   total      rows of the table, as estimated when it began
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

-- How far each backfill is. An append of its rows inserts a row here and deletes the one before it, as in positions.
--   place  the key of the last row that is done, as texts
--   done   rows read
--   sent   rows that became messages
create table backfill_progress (
    backfill_id int         not null references backfills on delete cascade,
    id          bigint      generated always as identity,
    place       jsonb       not null,
    done        bigint      not null,
    sent        bigint      not null,
    primary key (backfill_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);
