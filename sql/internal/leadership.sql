-- Leadership: only one bridge appends to a store. Appends of all earlier leaders fail.
--
-- Only bridges, and the commands that change consumers, call these functions.

-- fence_key() -> the key of the advisory lock "the fence".
--
-- An append and a change of the leader both take it, so they exclude each other.
create or replace function fence_key() returns bigint
language sql stable set search_path from current as $$
    select ('leaders'::regclass::oid::bigint << 32) | 1
$$;

-- advisory_holders(classid, objid, objsubid) -> the sessions that hold this advisory lock.
--
-- The arguments are the columns of pg_locks. Only locks of this database are considered.
create or replace function advisory_holders(classid oid, objid oid, objsubid int)
returns setof pg_stat_activity
language sql stable as $$
    select a.* from pg_locks l join pg_stat_activity a using (pid)
    where l.locktype = 'advisory' and l.granted
      and l.classid = $1 and l.objid = $2 and l.objsubid = $3
      and l.database = (select oid from pg_database where datname = current_database())
$$;

-- evict_leader(silence) -> whether the leader's session was ended because of its silence.
--
-- A session is ended if it has run no statement for longer than `silence`. If the session belongs
-- to another role, the caller may have no right to see or end it. Then the result is false, and the
-- connection must time out.
create or replace function evict_leader(silence interval) returns boolean
language sql volatile set search_path from current as $$
    select coalesce(bool_or(pg_terminate_backend(a.pid)), false)
    from advisory_holders('leaders'::regclass, 0, 2) a
    where clock_timestamp() - a.state_change > silence and pg_has_role(a.usename, 'member')
$$;

-- take_lead(holder, patience) -> the new epoch.
--
-- Once the transaction has committed, no older bridge can append.
-- Raises: CB005 if the isolation level is above READ COMMITTED.
-- Locks: the fence, to the end of the transaction. The function waits up to `patience` for an
-- append in progress, and then ends the session of that append. The bridge that began the append
-- may be suspended or cut off from the store.
create or replace function take_lead(holder text, patience interval default '1 s') returns bigint
language plpgsql set search_path from current set lock_timeout = '1s' as $$
declare
    new_epoch bigint;
begin
    perform require_read_committed('take_lead()');
    begin
        perform set_config('lock_timeout', (extract(epoch from patience) * 1000)::int::text, true);
        perform pg_advisory_xact_lock(fence_key());
    exception when lock_not_available then
        perform set_config('lock_timeout', '10s', true);
        perform pg_terminate_backend(a.pid)
        from advisory_holders('leaders'::regclass, 1, 1) a where pg_has_role(a.usename, 'member');
        perform pg_advisory_xact_lock(fence_key());
    end;
    insert into leaders (holder, pid) values (holder, pg_backend_pid())
    returning epoch into new_epoch;
    delete from leaders where epoch < new_epoch - 20;
    return new_epoch;
end $$;
