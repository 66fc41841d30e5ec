-- register_sequence_transaction(seq): register the transaction with a sequence's gap guard.
--
-- Call it before the transaction's first nextval of the sequence. A reader that stops at
-- max_safe_seq() then misses no row that commits late, for example in a table with a serial key.
--
-- Parameters:
--   seq  the sequence, which must have CACHE 1, or null for the log's
-- Raises:
--   CB004  the caller has no right to use the sequence, or the sequence has a cache
--   42P01  there is no such sequence
-- Locks: a shared advisory lock on the sequence's last value, until the transaction ends
-- (sql/internal/gap_guard.sql).
-- Example:
--   select cdcbridge.register_sequence_transaction('orders_id_seq');
create or replace function register_sequence_transaction(seq regclass default null) returns void
language plpgsql volatile set search_path from current as $$
declare
    guarded constant regclass := coalesce(seq, 'messages_seq');
    setting constant text := 'cdcbridge.registered_' || guarded::oid;
    draw_lock constant bigint := guarded::oid::bigint << 32 | 1;
begin
    if has_sequence_privilege(guarded, 'usage') is not true then
        raise exception 'the role % has no right to use the sequence %', quote_ident(current_user),
            guarded
            using errcode = 'CB004', hint = format(
                'As the owner of the sequence: grant usage on sequence %s to %I',
                guarded, current_user);
    elsif (pg_sequence_parameters(seq)).cache_size <> 1 then
        raise exception 'the sequence % has a cache, and cached values cannot be guarded', seq
            using errcode = 'CB004', hint = format('alter sequence %s cache 1', seq);
    elsif current_setting(setting, true) = pg_current_xact_id()::text then
        return;
    end if;
    perform pg_advisory_lock_shared(draw_lock);
    -- The second half of the key is the low 32 bits of the value, as in low_half().
    perform pg_advisory_xact_lock_shared(
                guarded::oid::int,
                ((coalesce(pg_sequence_last_value(guarded), 0) + 2147483648) % 4294967296
                 - 2147483648)::int),
            set_config(setting, pg_current_xact_id()::text, true);
    perform pg_advisory_unlock_shared(draw_lock);
exception
    when others or query_canceled then
        perform pg_advisory_unlock_shared(draw_lock)
        from pg_locks l
        where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and l.mode = 'ShareLock' and (l.classid::bigint << 32 | l.objid::bigint) = draw_lock;
        raise;
end $$;
