-- purge(consumer, ids): delete dead letters for good.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   ids       the ids of dead letters (dead_messages.id), or null for all
-- Returns: the number of dead letters that were deleted.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB007  an id is not that of a dead letter of this consumer
--   CB008  the caller may not read this consumer
-- Example:
--   select cdcbridge.purge('billing', array[1, 2]);
create or replace function purge(consumer text, ids bigint[] default null) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := letters_named(consumer);
    purged int;
begin
    if ids is not null then
        perform refuse_unknown_dead(c, ids);
    end if;
    delete from dead_messages d where d.consumer_id = c.id and (ids is null or d.id = any (ids));
    get diagnostics purged = row_count;
    return purged;
end $$;
