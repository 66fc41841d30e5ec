-- max_safe_seq(seq): return the value up to which a sequence is complete.
--
-- The result is the greatest n such that no open transaction can still commit a value of the
-- sequence at or below n. The result never falls. Read the rows in a later statement: only a
-- statement that begins after the call sees all rows up to n.
--
-- Parameters:
--   seq  the sequence, or null for the log's. Transactions that use another sequence must call
--        register_sequence_transaction() first.
-- Returns: that value, or 0 if no value of the sequence was ever drawn.
-- Locks: the draw lock, for this call alone. While the function holds it, no transaction is between
-- reading the sequence's last value and locking that value.
-- Example:
--   select cdcbridge.max_safe_seq('orders_id_seq');
create or replace function max_safe_seq(seq regclass default null) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    guarded constant regclass := coalesce(seq, 'messages_seq');
    draw_lock constant bigint := guarded::oid::bigint << 32 | 1;
    last bigint;
    behind bigint;
begin
    perform pg_advisory_lock(draw_lock);
    last := coalesce(pg_sequence_last_value(guarded), 0);
    select max((last - l.objid::bigint) & 4294967295) into behind
    from pg_locks l
    where l.locktype = 'advisory' and l.classid = guarded::oid and l.objsubid = 2
      and l.mode = 'ShareLock' and l.granted
      and l.database = (select oid from pg_database where datname = current_database());
    perform pg_advisory_unlock(draw_lock);
    return last - coalesce(behind, 0);
exception
    when others or query_canceled then
        perform pg_advisory_unlock(draw_lock)
        from pg_locks l
        where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and l.mode = 'ExclusiveLock'
          and (l.classid::bigint << 32 | l.objid::bigint) = draw_lock;
        raise;
end $$;
