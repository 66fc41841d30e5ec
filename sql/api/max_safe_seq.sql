-- max_safe_seq(seq) -> the greatest n such that no open transaction can still commit a value <= n; null = the log's sequence.
-- 0 on a sequence that was never drawn from. Never falls. Read it in a statement before the one that reads the rows.
-- Locks: the draw lock, for this call alone: so nobody is between reading the last value and holding its lock.
create or replace function max_safe_seq(seq regclass default null) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    guarded constant regclass := coalesce(seq, 'messages_seq');
    last bigint;
    behind bigint;
begin
    perform pg_advisory_lock(draw_lock(guarded));
    last := coalesce(pg_sequence_last_value(guarded), 0);
    select max((last - l.objid::bigint) & 4294967295) into behind
    from pg_locks l
    where l.locktype = 'advisory' and l.classid = guarded::oid and l.objsubid = 2 and l.mode = 'ShareLock' and l.granted
      and l.database = (select oid from pg_database where datname = current_database());
    perform pg_advisory_unlock(draw_lock(guarded));
    return last - coalesce(behind, 0);
exception
    when others or query_canceled then
        perform pg_advisory_unlock(draw_lock(guarded))
        from pg_locks l
        where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and l.mode = 'ExclusiveLock' and (l.classid::bigint << 32 | l.objid::bigint) = draw_lock(guarded);
        raise;
end $$;
