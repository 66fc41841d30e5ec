-- Limits that functions check, keys of any length, and times at which the log is known to be complete.

-- max_retention: store.max_retention of the configuration. Nothing may be put off for longer.
create table limits (
    only_row      boolean  primary key default true check (only_row),
    max_retention interval not null default '30 days'
);
insert into limits default values;

-- A hash: an entry of a btree holds 2,700 bytes at most, and a key may be longer.
drop index delayed_key;
create index delayed_key on delayed (consumer_id, hashtextextended(key, 0)) where in_order;

-- safe_points: at this time all up to seq was committed, or never will be. The running bridge adds one every 10 s while the log grows.
create table safe_points (
    seq bigint      primary key,
    at  timestamptz not null
);

-- Of published messages, whose time of commit is not known. publisher: the transaction's id. horizon: all transactions with lower
-- ids had ended at inserted_at.
alter table messages add publisher bigint, add horizon bigint;

-- Those whose arguments are others now come back with this version's code.
drop function if exists claim(consumers, int, bigint, timestamptz, timestamptz), survey(int, hints, int, int, smallint[], timestamptz),
    append_published(bigint, text, text, int, json, timestamptz), seq_at(timestamptz);
