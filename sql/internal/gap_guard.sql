-- The gap guard: up to which value a sequence is complete.
--
-- Transactions commit in another order than they draw values from a sequence, so a smaller value
-- may appear after a larger one. The guard finds the value up to which nothing can appear any more.
--
-- A transaction that draws holds a shared advisory lock until it ends. The lock is on the last
-- value that the sequence had before the transaction's first draw. Therefore no value up to the
-- smallest locked one can still appear. The sequence must have CACHE 1.
-- api/register_sequence_transaction.sql takes the lock.
--
-- The two halves of the lock's key are the oid of the sequence and the low 32 bits of the value.
-- That suffices as long as no open transaction is 4 billion values older than the newest one.

-- draw(seq, count) -> the first of `count` consecutive values.
--
-- The transaction is registered with the gap guard before the values are drawn.
-- Raises: CB004 if the caller has no right to use the sequence.
-- Locks: the lock described above, to the end of the transaction. During the call also the draw
-- lock of the sequence. It is shared for one value, so that sessions do not wait for each other. It
-- is exclusive for a block, so that no other session's value lies within the block.
create or replace function draw(seq regclass, count int) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    setting constant text := 'cdcbridge.registered_' || seq::oid;
    first bigint;
begin
    -- Written as conditions: PL/pgSQL evaluates them as expressions. Each PERFORM is a statement.
    if current_setting(setting, true) is distinct from pg_current_xact_id()::text
        and register_sequence_transaction(seq) is null
    then
        null;
    end if;
    if count > 1 then
        perform pg_advisory_lock(draw_lock(seq));
    elsif pg_advisory_lock_shared(draw_lock(seq)) is null then
        null;
    end if;
    first := nextval(seq);
    if count > 1 then
        perform setval(seq, first + count - 1), pg_advisory_unlock(draw_lock(seq));
    elsif pg_advisory_unlock_shared(draw_lock(seq)) then
        null;
    end if;
    return first;
exception
    when others or query_canceled then
        perform case when l.mode = 'ShareLock' then pg_advisory_unlock_shared(draw_lock(seq))
                     else pg_advisory_unlock(draw_lock(seq)) end
        from pg_locks l
        where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 1 and l.granted
          and (l.classid::bigint << 32 | l.objid::bigint) = draw_lock(seq);
        raise;
end $$;

-- draw_lock(seq) -> the key of the advisory lock under which values are drawn from the sequence.
create or replace function draw_lock(seq regclass) returns bigint
language sql immutable as $$
    select seq::oid::bigint << 32 | 1
$$;

-- low_half(value) -> the low 32 bits of the value, as the second half of an advisory lock's key.
--
-- The function has no SET clause, so that PostgreSQL inlines it.
create or replace function low_half(value bigint) returns int
language sql immutable as $$
    select ((value + 2147483648) % 4294967296 - 2147483648)::int
$$;
