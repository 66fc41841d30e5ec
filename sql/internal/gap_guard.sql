-- The gap guard: what of a sequence is settled, although transactions commit in another order than they drew from it.
--
-- Whoever draws holds, to the end of its transaction, a shared advisory lock on the sequence's last value before its first
-- draw. So nothing at or below the oldest such value can still appear. The sequence must have CACHE 1.
-- The lock's two halves are the sequence's oid and the value's low 32 bits, which is enough while no open transaction
-- is 4 billion values behind.

-- draw(seq, count) -> the first of `count` consecutive values, registered before they are drawn; null for none.
-- Locks: the sequence's draw lock, for this call alone: shared, so that drawers do not wait for each other; whole for a block,
-- which has no stranger's value in it.
create or replace function draw(seq regclass, count int) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    setting constant text := 'cdcbridge.registered_' || seq::oid;
    first bigint;
begin
    if has_sequence_privilege(seq, 'usage') is not true then
        raise exception 'no right to use the sequence %', seq using errcode = 'CB004';
    end if;
    -- Conditions, which are expressions, where a PERFORM each would be a statement.
    if count > 1 then
        perform pg_advisory_lock(draw_lock(seq));
    elsif pg_advisory_lock_shared(draw_lock(seq)) is null then
        null;
    end if;
    if current_setting(setting, true) is distinct from pg_current_xact_id()::text
        and (pg_advisory_xact_lock_shared(seq::oid::int, low_half(coalesce(pg_sequence_last_value(seq), 0))) is null
             or set_config(setting, pg_current_xact_id()::text, true) is null)
    then
        null;
    end if;
    if count > 0 then
        first := nextval(seq);
    end if;
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

-- draw_lock(seq) -> the advisory lock under which a sequence is drawn from.
create or replace function draw_lock(seq regclass) returns bigint
language sql immutable as $$
    select seq::oid::bigint << 32 | 1
$$;

-- low_half(value) -> its low 32 bits, as the second half of an advisory lock. No SET clause, so that it is inlined.
create or replace function low_half(value bigint) returns int
language sql immutable as $$
    select ((value + 2147483648) % 4294967296 - 2147483648)::int
$$;
