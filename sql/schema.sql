-- The tables of a store, in the order in which a change meets them.
--
-- `cdcbridge migrate` runs this file once, in one transaction. It creates the tables in the store's
-- internal schema (default: cdcbridge_internal), which no other role may use. Then it moves
-- messages, consumers, dead_messages and audit, which users read, to the store's schema (default:
-- cdcbridge). Their partitions stay in the internal schema. Functions and views are in files of
-- their own. The same command loads them again whenever they change.
--
-- The bridge appends each change once to the log, the table messages. In the same transaction it
-- records, for each queue and fifo consumer that takes the change, that the message is waiting.
-- From then on, each message of a consumer is in exactly one of these tables until it is finished:
--
--   waiting         not delivered yet, in log order
--   leases          delivered, and neither acked nor given back
--   delayed         given back, or in queue mode published for later: visible again at a later
--                   time. nack() gives a message back, and that delivery counts. A Python client
--                   also gives back messages that it did not begin (give_back()), uncounted.
--   dead_messages   a dead letter: delivered too often, or refused
--
-- Each move from one table to another is one transaction. The view consumer_messages has a row for
-- each message in the first three tables. Streams have no rows per message: a group reads the log,
-- and the table offsets records how far it has read.


-- 1. The version of the store

create table schema_migrations (
    version     int         primary key,
    name        text        not null,
    applied_at  timestamptz not null default now()
);

-- The functions and views that are installed: a checksum of their files, and the version of the
-- program that installed them.
create table schema_code (
    only_row   boolean     primary key default true check (only_row),
    checksum   text        not null,
    program    text        not null,
    applied_at timestamptz not null default now()
);

-- The templates of functions that are created again when consumers are added or removed.
--   per_consumer/...  functions of which each queue and fifo consumer has its own, with __id__ for
--                     its id (sql/internal/per_consumer)
--   dispatch/...      functions that find the function of a consumer and call it, with an IF for
--                     one consumer (sql/internal/dispatch)
create table code_templates (
    name text primary key,
    code text not null
);

-- A limit that functions check: the longest time for which a message may be delayed. It is
-- store.max_retention of the configuration.
create table limits (
    only_row      boolean  primary key default true check (only_row),
    max_retention interval not null default '30 days'
);
insert into limits default values;


-- 2. The source, and the bridge that reads it

-- The database that feeds this store. One store serves one source, so there is one row.
--   catalog       the columns and keys of the tables, as the bridge last read them
--   database_oid  the oid of the database, which stays the same when the database is renamed
--   capture       the publications and the tables named in the configuration, as they were when the
--                 last session began (cdcbridge/source/capture.py)
--   feeds         the consumers that the leading bridge feeds (cdcbridge/store/feeds.py); null
--                 before its first session
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

-- The source's timelines: the one on which each message of the log was committed. The identity of a
-- message contains it, so the identity stays the same after the source is promoted.
--   from_seq    the first seq of the timeline
--   branch_lsn  the LSN at which it left the timeline before; null: not known
create table timelines (
    from_seq   bigint primary key,
    timeline   int    not null,
    branch_lsn pg_lsn
);

-- One row for each epoch. Only the bridge with the newest epoch may append. Each streaming session
-- of a bridge begins an epoch, because it takes the lead anew. Each change of consumers begins one,
-- too, so that the bridge starts its streaming session again. Rows are never updated, and the
-- newest 20 or so are kept.
--   holder  the host and the process of the bridge, or the command, for example
--           `cdcbridge consumers apply`
create table leaders (
    epoch      bigint      generated always as identity primary key,
    holder     text        not null,
    pid        int         not null,
    started_at timestamptz not null default now()
);

-- How far the log reaches in the source's WAL. Each append inserts a row and deletes the one before
-- it. The newest row is at the right end of the index. A look-up therefore stays fast even if an
-- old snapshot keeps many dead rows to its left.
--   unfinished   the options with which decoding began, if the position is inside a transaction;
--                otherwise null
--   commit_time  the log contains every wanted change that the source committed before this time
--   effective_time  the greatest commit time of the transactions up to here, in microseconds since
--                   2000-01-01 UTC, so that mirrors can order the commits of a clock that stepped
--                   back
create table positions (
    id          bigint      generated always as identity primary key,
    commit_lsn  pg_lsn      not null,
    ordinal     int         not null,
    end_lsn     pg_lsn      not null,
    unfinished  jsonb,
    commit_time timestamptz not null,
    recorded_at timestamptz not null default now(),
    effective_time bigint
);

-- Transactions that the source sends before they commit. No consumer sees them. The table is
-- unlogged, because after a crash of the store or the bridge the source sends them again from their
-- beginning.
--   block  messages of the output plugin, each with its length and its subtransaction
--   n      the number of the block within its transaction, from 0
create unlogged table spilled (
    xid   bigint not null,
    n     int    not null,
    block bytea  not null,
    primary key (xid, n)
);
-- Without compression, which would cost more than it saves.
alter table spilled alter column block set storage external;

-- The last error of a bridge. An error is not recorded while the store cannot be reached.
--   holder  the host and the process of the bridge
create table last_error (
    only_row boolean     primary key default true check (only_row),
    message  text        not null,
    hint     text,
    holder   text        not null,
    at       timestamptz not null default clock_timestamp()
);

-- Tables of the source whose replica identity the event trigger set to FULL. `cdcbridge uninstall`
-- restores the identity after it has removed the trigger.
--   before  the value of pg_class.relreplident before the trigger changed it
create table given_identities (
    relation oid  primary key,
    before   text not null
);


-- 3. The log

-- The number of partitions of the log, from each from_seq on. Publishers read the number from the
-- sequence, because a session always sees the current value of a sequence, also with an older
-- snapshot.
create table partitionings (
    from_seq   bigint primary key,
    partitions int    not null
);
create sequence partitions_seq;
insert into partitionings (from_seq, partitions) values (0, 16);
select setval('partitions_seq', 16);

-- Each change or published message, once. seq gives the order. Segments are partitions of 1,000,000
-- seqs. create_segments() makes them before they are needed, and retention drops them as a whole.
--   old_key    the key before an update that changed it
--   reader     the id of the consumer for which a backfill read this row; null: the message is for
--              every consumer of the topic
--   publisher  the transaction that published the message
--   horizon    all transactions with lower ids had ended at inserted_at; null if commit_time is
--              known
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
alter sequence messages_seq owned by messages.seq;
comment on table messages is 'The log: each change once, in position order';

-- A message as the log browser shows it.
create type logged as (
    seq         bigint,
    topic       text,
    key         text,
    data        json,
    commit_lsn  pg_lsn,
    ordinal     int,
    commit_time timestamptz,
    inserted_at timestamptz
);

-- At the time `at`, every seq up to this one was committed, or never will be. While the log grows,
-- a running bridge adds a row every 10 s.
create table safe_points (
    seq bigint      primary key,
    at  timestamptz not null
);

-- The dedup ids of the last 5 minutes. A publish() with one of them adds nothing and returns its
-- seq.
create table published (
    topic        text        not null,
    dedup_id     text        not null,
    seq          bigint      not null,
    published_at timestamptz not null,
    primary key (topic, dedup_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        vacuum_truncate = off);
create index published_at on published (published_at);

-- The gap messages of the last 30 days. `cdcbridge status` names the latest ones without reading
-- the log.
--   record     the record of the gap message
--   consumers  the names of the consumers that received it
create table gaps (
    id        bigint      generated always as identity primary key,
    at        timestamptz not null default clock_timestamp(),
    record    jsonb       not null,
    consumers text[]      not null
);


-- 4. Consumers

--   snapshot_at  when the backfills of a consumer with `start: snapshot` were requested
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

-- The transaction that last added, changed or removed a consumer. A publisher whose snapshot is
-- older would miss that change. It sees the current value of the sequence nevertheless, and refuses
-- to publish.
create sequence consumers_xid_seq;


-- 5. The messages of queue and fifo consumers

-- Messages that have not been delivered. A row contains the messages of all its seqs, in ascending
-- order. A large append writes rows of 50 messages, a small append rows of one. Each consumer has a
-- partition of its own, so that its removal only drops a table.
--   ord, tie    the place in the consumer's order. ord is the first seq that the row had, or for
--               redriven messages the log's end at the time of the redrive. tie distinguishes
--               several redrives, and the pieces of a row that a fifo claim has cut up.
--   keys        the consumer's own keys; null: the keys in the log. One key with several seqs is a
--               run: all messages have this key.
--   barrier     in fifo mode: the message waits for all messages before it, and all messages after
--               it wait for it (a truncate)
--   not_before  in fifo mode: a published message is delivered from this time on. In queue mode
--               such a message is in delayed.
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

-- The messages that one receive() took. A row, a "lease row", has several messages. When all of
-- them are settled (acked, given back or dead), the row is deleted.
--   claim_id  the number of the claim, which is the second half of each receipt
--   part      the number of the row's first message in the claim, from 1; negative if extend()
--             took that message out of its row
--   shard     the shard of the consumer's max_in_flight on which these messages count
--   keys      the consumer's own keys; null: the keys in the log
create sequence claim_ids_seq;
create table leases (
    consumer_id       int         not null,
    claim_id          bigint      not null,
    part              int         not null,
    shard             smallint    not null,
    seqs              bigint[]    not null,
    keys              text[],
    barrier           boolean     not null default false,
    deliver_count     int         not null,
    history           jsonb       not null default '[]',
    last_delivered_at timestamptz not null,
    not_visible_until timestamptz not null,
    inserted_at       timestamptz not null,
    primary key (consumer_id, claim_id, part)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- Messages that have left a lease row while other messages of the same row have not. For example,
-- they were acked, given back by nack, or became dead letters.
create table settled (
    consumer_id int      not null,
    claim_id    bigint   not null,
    part        int      not null,
    seq         bigint   not null,
    primary key (consumer_id, claim_id, part, seq)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- Messages that were given back, by nack (counted) or by a client that did not begin them
-- (uncounted). In queue mode also those that were published for later.
--   ord, tie  place in the consumer's order, as in waiting
--   in_order  the consumer is in fifo mode
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

-- Each kind of look-up has exactly one index that can serve it. While the table is almost empty,
-- its statistics make all indexes look equally cheap. The wrong one would read all rows of the
-- consumer for each message.
-- By key: the statements use `consumer_id + 0 = ...`, which no other index serves. The hash also
-- covers keys of more than 2,700 bytes, which a btree refuses.
create index delayed_key on delayed (hashtextextended(key, consumer_id)) where in_order;
-- By time: the statements use `visible_at > '-infinity'`. Statements that look for a seq do not use
-- it, so they are served by the primary key.
create index delayed_visible_at on delayed (consumer_id, visible_at, seq)
    where visible_at > '-infinity';
-- A fifo claim looks for barriers that were given back, which are rare.
create index delayed_barrier on delayed (consumer_id) where barrier;

-- Dead letters, each with its data, because the segment of the log may be dropped before an
-- operator looks at them. Clients of the SQS endpoint read them as a queue:
--   read_count         how often such a client has read the letter
--   not_visible_until  other clients do not get it before this time
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
    read_count        int         not null default 0,
    not_visible_until timestamptz,
    primary key (consumer_id, id)
) partition by list (consumer_id);
alter sequence dead_messages_id_seq owned by dead_messages.id;
-- For the SQS endpoint, which reads dead letters as a queue (sql/internal/sqs.sql): letters that
-- nobody has read, and those that become visible again.
create index dead_messages_unread on dead_messages (consumer_id, id)
    where not_visible_until is null;
create index dead_messages_read on dead_messages (consumer_id, not_visible_until)
    where not_visible_until is not null;

-- The content of redriven and replayed messages until they are finished. They have their own
-- content here because their segment of the log may be dropped. A consumer with `on_leave: delete`
-- has content of its own here as well: the deletes of rows that left its filter.
--   replayed  a replay inserted the message, which was not a dead letter
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

-- Where a claim begins to scan, so that it does not read finished messages. Rows are inserted and
-- deleted, never updated, so the newest is at the right end of the index. Each row remains correct
-- for ever, and the newest one saves the most work.
--   waiting_floor, passed     Rows of waiting with an ord below the floor have an ord in passed,
--                             now and later. Claims have skipped them because the key was held, the
--                             time had not come, or another claim had locked the row.
--   claim_floor, open_claims  Leases with a claim_id below the floor have one that is in
--                             open_claims.
create table hints (
    consumer_id   int      not null,
    id            bigint   generated always as identity,
    waiting_floor bigint   not null,
    passed        bigint[] not null default '{}',
    claim_floor   bigint   not null,
    open_claims   bigint[] not null,
    primary key (consumer_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        vacuum_truncate = off);

-- A delivery that moves from one table to another, for example from leases to delayed. The columns
-- are those of leases and delayed.
--   ordinal  the number of the message in its claim, from 1. This is not messages.ordinal, the
--            number of a change in its transaction.
create type delivery as (
    claim_id          bigint,
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

-- A receipt without its text.
create type receipt as (
    seq      bigint,
    claim_id bigint
);

-- The rest of the primary key of leases.
create type lease_id as (
    claim_id bigint,
    part     int
);

-- A row of waiting that a claim of a fifo consumer has locked.
--   run   whether the row is a run, which has one key
--   size  the number of its messages that the claim looks at, from the first one on
--   rest  the number of its messages after them
create type front_row as (
    ord  bigint,
    tie  bigint,
    run  boolean,
    size int,
    rest int
);

-- The place of a message of a key.
create type key_place as (
    key text,
    ord bigint,
    tie bigint
);


-- 6. Streams

-- How far each group has read in each partition: its members have finished all messages up to seq.
-- Rows are inserted and deleted, never updated, as in positions.
--   id            rises with each lease and each move of the offset. The partition with the
--                 smallest id is the least recently read one. The receipt of a lease contains the
--                 id.
--   leased_until  a member reads the partition under a lease until this time
--   member        the application_name of the session that took the lease; null: it had none
--   lost          the number of messages that retention dropped before the group had read them. The
--                 group reads nothing more in this partition until a seek.
create table offsets (
    consumer_id  int         not null,
    partition    int         not null,
    id           bigint      generated always as identity,
    seq          bigint      not null,
    leased_until timestamptz,
    lost         bigint,
    updated_at   timestamptz not null,
    member       text,
    primary key (consumer_id, partition, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- The part of the log that a group reads.
--   topics      topics of published messages
--   tables      names of tables, for example public.orders; null: all tables of all schemas
--   schemas     schemas of which all tables are wanted
--   operations  operations, for example insert; null: all
--   reader      the group's id, for rows that a backfill read for the group
--   taken       LIKE patterns made from entries such as sales.o_*; null: none
--   left_out    LIKE patterns made from entries such as !sales.tmp_*; null: none
create type stream_wish as (
    topics     text[],
    tables     text[],
    schemas    text[],
    operations text[],
    reader     int,
    taken      text[],
    left_out   text[]
);


-- 7. Backfills: rows that were in a table before its changes were captured, read in chunks for one
-- consumer

-- One row per backfill. Its state is waiting (for a bridge), running or paused. At the end it is
-- done, failed or cancelled.
--   note       the reason why it waits or has failed
--   after_seq  the log's end when the consumer was added, if the backfill is its snapshot. Later
--              rows arrived as changes.
--   since      the source's snapshot when the backfill began. Younger versions of a row arrive as
--              changes.
--   early      the keys whose changes arrived before the first rows of the backfill
--   total      the number of rows in the table, as estimated when the backfill began
create table backfills (
    id          int         generated always as identity primary key,
    consumer_id int         not null references consumers on delete cascade,
    table_name  text        not null,
    condition   text,
    columns     text[],
    rate        int,
    state       text        not null default 'waiting'
                            check (state in ('waiting', 'running', 'paused', 'done', 'failed',
                                             'cancelled')),
    note        text,
    after_seq   bigint,
    since       text,
    early       jsonb,
    total       bigint,
    created_at  timestamptz not null default now(),
    started_at  timestamptz,
    finished_at timestamptz
);
create unique index backfills_unfinished on backfills (consumer_id, table_name)
    where state in ('waiting', 'running', 'paused');

-- How far each backfill is. An append of its rows inserts a row here and deletes the one before it,
-- as in positions.
--   place  the key of the last row that was read, as texts
--   done   the number of rows read
--   sent   the number of these rows that became messages
create table backfill_progress (
    backfill_id int         not null references backfills on delete cascade,
    id          bigint      generated always as identity,
    place       jsonb       not null,
    done        bigint      not null,
    sent        bigint      not null,
    primary key (backfill_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);


-- 8. Sinks: consumers whose messages cdcbridge itself delivers to another system

-- What the sinks' processes have done for each consumer, since its first delivery. The counters are
-- those of all processes together.
--   delivered   the number of messages that the target has acknowledged
--   failed      the number of messages that became dead letters
--   retried     the number of failed attempts at a message that was tried again
--   batches     the number of batches that were delivered, and the seconds that they took
--   error       the last error, and when it happened; null after the next delivery
--   blocked     the message for which others wait: its seq, topic, key and the target's answer
create table sinks (
    consumer_id  int         primary key references consumers on delete cascade,
    delivered    bigint      not null default 0,
    failed       bigint      not null default 0,
    retried      bigint      not null default 0,
    batches      bigint      not null default 0,
    seconds      float8      not null default 0,
    delivered_at timestamptz,
    error        text,
    error_at     timestamptz,
    blocked      jsonb
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- The processes that deliver for a consumer. A process renews seen_at about once a second.
--   member  the host, the process and a random text, for example db1:4711:9f3a
create table sink_members (
    consumer_id int         not null references consumers on delete cascade,
    member      text        not null,
    seen_at     timestamptz not null,
    primary key (consumer_id, member)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- The lanes of a consumer with mode stream. One process at a time delivers a lane, under a lease.
-- Lane n has the partitions of the log whose number modulo the number of lanes is n.
--   first_seq     where the lane began: it has had every message after this seq. A target that lost
--                 everything gets the messages from here on again.
--   member        the process that delivers the lane; null: none
--   leased_until  when another process may take the lane over
create table sink_lanes (
    consumer_id  int         not null references consumers on delete cascade,
    lane         int         not null,
    first_seq    bigint      not null,
    member       text,
    leased_until timestamptz not null default '-infinity',
    primary key (consumer_id, lane)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);


-- 9. The dashboard, whose pages show figures that are kept, and count nothing

-- The newest measurement of the slot and of all consumers, at most one row. A bridge measures every
-- ten seconds.
--   lag  what `cdcbridge lag --json` prints
create table measurements (
    one         boolean     primary key default true check (one),
    measured_at timestamptz not null,
    lag         json        not null
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- The figures of the last six hours, for charts: the last measurement of each minute.
--   subject  the name of a consumer, or '' for the slot
--   figures  the numbers, for example {"pending": 12, "in_flight": 3, "dead": 0}
create table samples (
    subject text        not null,
    minute  timestamptz not null,
    figures jsonb       not null,
    primary key (subject, minute)
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Who changed something by the dashboard or the HTTP API, and what.
--   caller   the name of the token, for example ops, or local if there are no tokens
--   address  the IP address of the caller
--   action   for example pause, redrive or purge
--   subject  the name of the consumer
--   details  for example the filter of a redrive and the number of its messages
create table audit (
    id      bigint      generated always as identity primary key,
    at      timestamptz not null default clock_timestamp(),
    caller  text        not null,
    role    text        not null,
    address text        not null,
    action  text        not null,
    subject text        not null,
    details jsonb       not null default '{}'
);
create index audit_at on audit (at);

-- Sessions of the dashboard that ended by a logout, before their time was over.
--   digest  the SHA-256 sum of the cookie, in hexadecimal
--   until   when the session would have ended by itself
create table ended_sessions (
    digest text        primary key,
    until  timestamptz not null
);


-- 10. Alerts: conditions that people are told about, and the notifications that are on their way

-- The last judgement of the rules. A bridge locks the row while it judges, so that two bridges
-- never announce a condition twice.
--   leader_seen_at  when a bridge led last
create table alert_state (
    only_row       boolean     primary key default true check (only_row),
    judged_at      timestamptz,
    leader_seen_at timestamptz
);
insert into alert_state default values;

-- A row for each condition that a rule has found, until it is over.
--   rule         the name of the rule, for example dead_letters
--   subject      what the condition is about, for example the name of a consumer
--   message      the condition and the next step, as found last
--   query        the query of the session that is the cause, which may contain data; '' if none
--   since        when it was found first
--   began_at     when it had lasted for long enough to be announced; null: not yet
--   notified_at  when a notification was queued last; null: never, for example in a silence
--   missing_at   when it was not found any more; null: it was found last time
--   told         the highest severity with which its beginning was queued; null: it was not queued
create table alert_conditions (
    rule        text        not null,
    subject     text        not null,
    severity    text        not null check (severity in ('warning', 'critical')),
    message     text        not null,
    query       text        not null default '',
    since       timestamptz not null,
    began_at    timestamptz,
    notified_at timestamptz,
    missing_at  timestamptz,
    told        text        check (told in ('warning', 'critical')),
    primary key (rule, subject)
);

-- Rules of which no notification is queued until a time.
create table alert_silences (
    rule  text        primary key,
    until timestamptz not null
);

-- Notifications that a destination has not received yet, in the order in which they are delivered.
-- They are inserted in the transaction that changes alert_conditions.
--   destination  the name of the destination in the configuration
--   kind         begins, lasts or ends
create table alert_notifications (
    id          bigint      generated always as identity primary key,
    destination text        not null,
    kind        text        not null check (kind in ('begins', 'lasts', 'ends')),
    severity    text        not null check (severity in ('warning', 'critical')),
    title       text        not null,
    body        text        not null,
    created_at  timestamptz not null default now()
);

-- The attempts at a notification, a row for each URL of its destination. The notification is
-- deleted once done_at is set for each URL.
--   url_id        the first characters of the URL's SHA-256, because the URL itself is a secret
--   service       the kind of the URL, for example Slack
--   refusals      how often in succession the service refused the notification, for example by 400
--   error         the error of the last attempt; null: it was delivered
--   done_at       when it was delivered or, with an error, given up here; null: it waits
create table alert_deliveries (
    notification_id bigint      not null references alert_notifications on delete cascade,
    url_id          text        not null,
    service         text        not null,
    attempts        int         not null default 0,
    refusals        int         not null default 0,
    tried_at        timestamptz,
    error           text,
    done_at         timestamptz,
    primary key (notification_id, url_id)
);


-- 11. Mirrors: consumers whose changes cdcbridge applies to another PostgreSQL

-- Notes about transactions, which the bridge inserts as it appends them.
--   source, mirror, lsn  the mirror `mirror` applied the transaction: its changes came from the
--                   database `source`, whose changes were applied up to the commit LSN `lsn`. Null:
--                   it was written here.
--   effective_time  the commit time that decides conflicts, in microseconds since 2000-01-01 UTC;
--                   null: the commit time itself, which is not less than an earlier one
create table transaction_marks (
    commit_lsn     pg_lsn primary key,
    source         text,
    mirror         text,
    lsn            pg_lsn,
    effective_time bigint
);
create index transaction_marks_source on transaction_marks (source, commit_lsn)
    where source is not null;

-- What the applier of each mirror has done. The target itself has the place up to which it has all
-- changes, because that place is committed together with the rows.
--   target_seq    the place that the target had at the last commit. If the target has less now, it
--                 lost its tail, for example in a failover.
--   strict_from   from this seq on, no backfill brings rows any more, so a row that is missing in
--                 the target is a sign of a mistake
--   stopped       why the mirror has stopped until `cdcbridge mirror resume`; null: it runs
--   error         the last error, which is tried again; null after the next commit
--   note          the last finding that is no error, for example a tail that the source has lost
--   transactions, changes, conflicts  how many were applied, and found, since the mirror began
--   held          how many conflicts in the target wait for a decision, at most 1,000
--   commit_time   when the source committed the last applied transaction
create table mirrors (
    consumer_id  int         primary key references consumers on delete cascade,
    target_seq   bigint,
    strict_from  bigint,
    stopped      text,
    hint         text,
    stopped_at   timestamptz,
    error        text,
    error_at     timestamptz,
    note         text,
    note_at      timestamptz,
    transactions bigint      not null default 0,
    changes      bigint      not null default 0,
    conflicts    bigint      not null default 0,
    held         int         not null default 0,
    applied_at   timestamptz,
    commit_time  timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
