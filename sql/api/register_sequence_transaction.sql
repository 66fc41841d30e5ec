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
begin
    if draw(coalesce(seq, 'messages_seq'), 0) is null
        and (pg_sequence_parameters(seq)).cache_size <> 1
    then
        raise exception 'the sequence % has a cache: values that a session keeps cannot be guarded',
            seq
            using errcode = 'CB004', hint = format('alter sequence %s cache 1', seq);
    end if;
end $$;
