-- consumer_group_offsets: a row per stream consumer and partition. The group has finished all
-- messages up to seq.
create or replace view consumer_group_offsets as
    select c.name as consumer_name, o.partition, o.seq, o.updated_at, o.leased_until
    from consumers c
    cross join generate_series(0, (select max(p.partitions) from partitionings p) - 1) n
    cross join lateral (select * from offsets o where o.consumer_id = c.id and o.partition = n
                        order by o.id desc limit 1) o
    where c.mode = 'stream';
comment on view consumer_group_offsets is 'How far each group is in each partition';
