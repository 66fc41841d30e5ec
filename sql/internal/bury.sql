-- Burying: deliveries become dead letters if they were delivered too often, or if their data cannot
-- be projected to the columns of the consumer.

-- bury(consumer_id, deliveries, reason) -> the number of deliveries that became dead letters.
create or replace function bury(consumer_id int, deliveries delivery[], reason text) returns int
language plpgsql volatile as $$
declare
    buried int;
begin
    if coalesce(cardinality(deliveries), 0) = 0 then
        return 0;
    end if;
    with revived as (
        delete from redriven r using unnest(deliveries) d
        where r.consumer_id = bury.consumer_id and r.seq = d.seq
        returning r.*)
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history,
                               commit_lsn, ordinal, commit_time, inserted_at)
    select bury.consumer_id, d.seq, coalesce(m.topic, r.topic), d.key, coalesce(r.data, m.data),
           d.deliver_count, bury.reason, d.history::json, coalesce(m.commit_lsn, r.commit_lsn),
           coalesce(m.ordinal, r.ordinal), coalesce(m.commit_time, r.commit_time),
           coalesce(m.inserted_at, r.inserted_at)
    from unnest(deliveries) d
    left join messages m
         on m.seq = d.seq and m.seq between (select min(x.seq) from unnest(deliveries) x)
                                        and (select max(x.seq) from unnest(deliveries) x)
    left join revived r on r.seq = d.seq
    order by d.seq;
    get diagnostics buried = row_count;
    return buried;
end $$;

-- bury_unprojectable(consumer, own_claim): Turn those deliveries of a claim into dead letters whose
-- data cannot be reduced to the consumer's columns.
--
-- A json value with \u0000 is an example. The consumer must not receive columns that are withheld
-- from it.
create or replace function bury_unprojectable(consumer consumers, own_claim bigint) returns void
language plpgsql volatile as $$
declare
    bad delivery[];
begin
    select array_agg(d) into bad
    from unnest(deliveries_of(consumer.id, array[own_claim])) d
    left join messages m on m.seq = d.seq
    left join redriven r on r.consumer_id = consumer.id and r.seq = d.seq
    where project(coalesce(r.data, m.data), consumer.config -> 'columns') is null;
    if bad is not null then
        perform remove_locked(consumer.id, bad);
        perform bury(consumer.id, bad, 'undecodable: its columns cannot be separated');
    end if;
end $$;

-- bury_expired() -> the number of messages that became dead letters because their last allowed
-- delivery expired. The running bridge calls it.
--
-- Raises:
--   CB005  the transaction's isolation level is above READ COMMITTED
-- Locks: the rows of leases from which it removes messages, by SKIP LOCKED.
create or replace function bury_expired() returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    total int := 0;
    c consumers;
    expired delivery[];
begin
    perform require_read_committed('bury_expired()');
    for c in select * from consumers where mode <> 'stream' loop
        expired := lock_expired(c.id, newest_hint(c.id), 1000, (c.config ->> 'max_deliveries')::int,
                                0, moment());
        perform remove_locked(c.id, expired);
        perform bury_last(c, expired);
        total := total + cardinality(expired);
    end loop;
    return total;
end $$;
