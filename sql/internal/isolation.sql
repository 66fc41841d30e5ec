-- ack() and nack() of a queue consumer above READ COMMITTED, where all statements of a transaction
-- see the snapshot of its first statement.
--
-- At these isolation levels a message is settled only by its mark in `settled`. A decision that is
-- based on an old snapshot never deletes a row of `leases` that other sessions still need.
--
-- PostgreSQL raises 40001 if another session has acked, given back, extended or claimed the message
-- since the snapshot. The conflict is detected by the lock of its row of `leases`, or by the unique
-- index of the marks. The application then runs its transaction again.
--
-- Example:
--   begin isolation level serializable;
--   insert into invoices ...;
--   select ack('billing', '{17-4}', strict => true);
--   commit;

-- require_read_committed(what): Refuse a transaction whose snapshot may be older than the locks
-- that it takes.
--
-- Raises:
--   CB005  the isolation level is above READ COMMITTED (the message names the function `what`)
create or replace function require_read_committed(what text) returns void
language plpgsql stable as $$
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception '% cannot run in a % transaction', what,
            upper(current_setting('transaction_isolation'))
            using errcode = 'CB005', hint = 'Call it in a READ COMMITTED transaction.';
    end if;
end $$;

-- above_read_committed() -> whether the transaction keeps one snapshot.
--
-- The function has no SET clause, so PostgreSQL inlines it.
create or replace function above_read_committed() returns boolean
language sql stable as $$
    select current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
$$;

-- refuse_changed(consumer_id, claim_ids): Raise an error if another session has changed or deleted
-- a lease of these claims since the snapshot.
--
-- A lease that looks expired may have been extended, and one that looks valid may have been claimed
-- by another receiver.
-- Raises:
--   40001  a lease was changed or deleted
-- Locks: the leases, FOR SHARE, released at once, because extend() in another session would wait
-- for them.
create or replace function refuse_changed(consumer_id int, claim_ids bigint[]) returns void
language plpgsql volatile as $$
begin
    perform from (select distinct t as claim_id from unnest(claim_ids) t order by t) t
    cross join lateral (
        select from leases l
        where l.consumer_id = refuse_changed.consumer_id and l.claim_id = t.claim_id
        order by l.part for share) l;
    raise exception 'unchanged' using errcode = 'CB000'; -- releases the locks
exception
    when sqlstate 'CB000' then
end $$;

-- settle_by_marks(consumer_id, receipts, moment) -> the seqs of the deliveries that were in flight
-- and are now settled.
--
-- Raises:
--   40001  another session has changed or settled one of them since the snapshot
-- Locks: the rows of leases, FOR KEY SHARE, as settle_some() does.
create or replace function settle_by_marks(consumer_id int, receipts receipt[], moment timestamptz)
returns bigint[]
language plpgsql volatile as $$
begin
    perform refuse_changed(consumer_id, array(select r.claim_id from unnest(receipts) r));
    return settle_some(consumer_id, receipts, '{}', moment, moved => true);
end $$;

-- forget_settled() -> the number of rows of leases that were deleted because all their messages are
-- settled. The running bridge calls it.
--
-- Such a row remains if two sessions settled its last messages at the same time and did not see the
-- marks of each other.
-- Locks: these rows, by SKIP LOCKED.
create or replace function forget_settled() returns int
language plpgsql volatile
set search_path from current set jit = off as $$
declare
    done record;
    forgotten int := 0;
begin
    for done in
        select l.consumer_id, array_agg(row(l.claim_id, l.part)::lease_id) as ids
        from (select s.consumer_id, s.claim_id, s.part, count(*) as marks from settled s
              group by 1, 2, 3) s
        join leases l on l.consumer_id = s.consumer_id and l.claim_id = s.claim_id
            and l.part = s.part
        where cardinality(l.seqs) <= s.marks
        group by l.consumer_id order by l.consumer_id
    loop
        perform remove_finished(done.consumer_id, done.ids);
        forgotten := forgotten + cardinality(done.ids);
    end loop;
    return forgotten;
end $$;
