-- purge(consumer, ids) -> how many dead letters (null = all) were deleted for good.
-- Raises CB001, CB002, CB007.
create or replace function purge(consumer text, ids bigint[] default null) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    purged int;
begin
    if ids is not null then
        perform refuse_unknown_dead(c, ids);
    end if;
    delete from dead_messages d where d.consumer_id = c.id and (ids is null or d.id = any (ids));
    get diagnostics purged = row_count;
    return purged;
end $$;
