-- Claims by the batch, order per key, published messages, retention.
--
-- A lease stands for all that one receive took: nothing is written per message when it is claimed, nor when all of it
-- is acked. Only what is settled alone leaves a mark of its own.

-- Functions and views come back with this version's code; some have other arguments and results now.
drop view if exists consumer_messages;
do $$
declare
    code text;
begin
    for code in select p.oid::regprocedure from pg_proc p where p.pronamespace = current_schema()::regnamespace loop
        execute 'drop function ' || code;
    end loop;
end $$;

-- barrier: waits for everything before it, and everything behind waits for it (fifo; a truncate).
-- not_before: a published message that is delivered from then on (fifo; in queue mode it stands in delayed).
-- A row with one key and many seqs is a run: messages of that key alone.
alter table waiting add barrier boolean not null default false, add not_before timestamptz;

alter table leases rename to leases_0001;
alter index leases_pkey rename to leases_0001_pkey;

-- The messages of one claim, in its order: token is the claim, and the fence of its receipts; part is the ordinal in the
-- claim of the row's first message, negative where extend() took that message out of the row that it was claimed in.
-- slot: which share of the consumer's max_in_flight they count against. keys: null where they are the log's.
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

insert into leases (consumer_id, token, part, slot, seqs, keys, deliver_count, history, last_delivered_at,
                    not_visible_until, inserted_at)
select consumer_id, token, 1, slot, array[seq], array[key], deliver_count, history, last_delivered_at,
       not_visible_until, inserted_at
from leases_0001;
drop table leases_0001;

-- Messages of a lease that are done with while others of the same row are not.
create table settled (
    consumer_id int      not null,
    token       bigint   not null,
    part        int      not null,
    seq         bigint   not null,
    primary key (consumer_id, token, part, seq)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off);

-- ord, tie: the message's place among those of its key. in_order: of a fifo consumer.
alter table delayed add ord bigint, add tie bigint not null default 0, add barrier boolean not null default false,
    add in_order boolean not null default false;
update delayed set ord = seq;
alter table delayed alter ord set not null;
create index delayed_key on delayed (consumer_id, key) where in_order;
alter table redriven add ord bigint, add tie bigint not null default 0;
update redriven set ord = seq;
alter table redriven alter ord set not null;

-- Where a claim may begin to look, so that it does not wade through what is finished. Rows are inserted, not updated:
-- the newest is at the right end of the index. Any of them is true for good, the newest saves most. Each consumer has one.
-- What waits below waiting_floor, now or ever, stands at an ord that is among passed: claims have passed it by, because its key
-- is held, its time has not come, or somebody has locked it. Every lease below token_floor is among tokens.
create table hints (
    consumer_id   int      not null,
    id            bigint   generated always as identity,
    waiting_floor bigint   not null,
    passed        bigint[] not null default '{}',
    token_floor   bigint   not null,
    tokens        bigint[] not null,
    primary key (consumer_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = off);
insert into hints (consumer_id, waiting_floor, token_floor, tokens) select id, 0, 0, '{}' from consumers;

-- A delivery on its way from one place to another.
-- ord, tie: the message's place in the consumer's order, which is the log's but for what was redriven.
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

-- What the bridge's configuration says that functions have to know.
create table settings (
    only_row   boolean primary key default true check (only_row),
    partitions int     not null default 16
);
insert into settings default values;

-- The dedup ids of the last minutes.
create table published (
    topic        text        not null,
    dedup_id     text        not null,
    seq          bigint      not null,
    published_at timestamptz not null,
    primary key (topic, dedup_id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = off);
create index published_at on published (published_at);

create index consumers_topics on consumers using gin ((config -> 'topics'));
