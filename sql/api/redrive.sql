-- redrive(consumer, ids) -> how many dead letters (dead_messages.id; null = all) went back to the end of the queue.
-- They keep seq, position and data, start with a fresh count, come after everything that waits now, and keep their order.
-- One whose message waits or is in flight already is left where it is; a NOTICE counts those. Another NOTICE counts messages
-- that were never compared with the consumer's filter, because it failed on them. `cdcbridge dead redrive` compares them.
-- Raises CB001, CB002, CB007 (an id that is no dead letter of this consumer). Locks: the dead letters.
create or replace function redrive(consumer text, ids bigint[] default null) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    chosen bigint[];
    revived int;
    uncompared int;
begin
    if ids is not null then
        perform refuse_unknown_dead(c, ids);
    end if;
    select coalesce(array_agg(d.id order by d.seq, d.id), '{}'),
           count(*) filter (where starts_with(d.reason, 'filter_error:') and c.config ->> 'filter' is not null)
    into chosen, uncompared
    from (select d.id, d.seq, d.reason from dead_messages d
          where d.consumer_id = c.id and (ids is null or d.id = any (ids)) for update skip locked) d;
    revived := bring_back(c, chosen);
    if uncompared > 0 then
        raise notice '% of % were never compared with the filter of consumer %, which failed on them; without ids, `cdcbridge dead redrive %` compares',
            uncompared, cardinality(chosen), quote_literal(c.name), c.name;
    end if;
    return revived;
end $$;
