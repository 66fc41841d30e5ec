-- redrive(consumer, ids): put dead letters back at the end of the queue.
--
-- The messages keep their seq, position and data, and their order among each other. They follow all
-- messages that wait now. Their deliveries are counted anew from zero.
--
-- A dead letter stays unchanged if its message waits or is in flight already. A NOTICE reports how
-- many. Another NOTICE counts the messages that were never compared with the consumer's filter,
-- because the filter failed on them. `cdcbridge dead redrive` without ids compares them.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   ids       the ids of dead letters (dead_messages.id), or null for all
-- Returns: the number of dead letters that were redriven.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream, also if it has a sink (docs/SINKS.md, "Dead letters")
--   CB007  an id is not that of a dead letter of this consumer
--   CB008  the caller may not read this consumer
-- Locks: the dead letters, with SKIP LOCKED, and the gap guard's shared lock, until the transaction
-- ends.
-- Example:
--   select cdcbridge.redrive('billing', array[1, 2]);
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
           count(*) filter (where starts_with(d.reason, 'filter_error:')
                            and c.config ->> 'filter' is not null)
    into chosen, uncompared
    from (select d.id, d.seq, d.reason from dead_messages d
          where d.consumer_id = c.id and (ids is null or d.id = any (ids))
          for update skip locked) d;
    revived := bring_back(c, chosen);
    if uncompared > 0 then
        raise notice '% of % dead letters were never compared with the filter of consumer %, '
            'because it failed on them', uncompared, cardinality(chosen), quote_literal(c.name)
            using hint = format('`cdcbridge dead redrive %s` without ids compares them.', c.name);
    end if;
    return revived;
end $$;
