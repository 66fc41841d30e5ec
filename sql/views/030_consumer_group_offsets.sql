-- consumer_group_offsets: a row per stream consumer and partition: all up to seq is done.
create or replace view consumer_group_offsets as
    select c.name as consumer_name, o.partition, o.seq, o.updated_at, o.leased_until
    from consumers c cross join lateral newest_offsets(c.id) o
    where c.mode = 'stream';
comment on view consumer_group_offsets is 'How far each group is in each partition';
