-- Streams: groups of members that read the log itself, by partition.

-- How far each group is in each partition: all its messages up to seq are done. Rows are inserted, not updated: the newest is at
-- the right end of the index, with all dead versions that an old snapshot keeps to its left. id rises with each read and
-- each commit of the partition, so the smallest is the least recently read one; under a lease it is the receipt's fence.
-- lost: how many messages retention dropped before the group had read them; until somebody seeks, nothing is read.
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

-- How many partitions the log has from which seq on. Publishers take the number from the sequence, which they see as it is whatever
-- their snapshot.
create table partitionings (
    from_seq   bigint primary key,
    partitions int    not null
);
create sequence partitions_seq;
insert into partitionings (from_seq, partitions) select 0, partitions from settings;
select setval('partitions_seq', partitions) from settings;
drop table settings;

-- What a group reads of the log: topics; tables (null: every schema's) and whole schemas; operations (null: all).
create type stream_wish as (
    topics     text[],
    tables     text[],
    schemas    text[],
    operations text[]
);

-- Those whose arguments or results are others now come back with this version's code.
drop function if exists drop_segments(interval), append_published(bigint, text, text, json, timestamptz);

-- What a replay put there, and no dead letter.
alter table redriven add replayed boolean not null default false;
