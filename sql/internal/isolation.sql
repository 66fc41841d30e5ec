-- ack() and nack() of a queue above READ COMMITTED, where all statements of a transaction see what its first statement saw.
--
-- There a message is settled by its mark in `settled` alone. What an old snapshot shows never removes a row of `leases` that
-- others still need.
-- PostgreSQL raises 40001 where another session acked, gave back, extended or took over the message since the snapshot: by the lock
-- of its row of `leases`, or by the unique index of the marks. The application then runs its transaction again.
-- Example: begin isolation level serializable; insert into invoices ...; select ack('billing', '{17-4}', strict => true); commit;

-- require_read_committed(what): raises CB005 in a transaction whose snapshot may be older than the locks it takes.
create or replace function require_read_committed(what text) returns void
language plpgsql stable as $$
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception '% cannot work in a % transaction', what, upper(current_setting('transaction_isolation'))
            using errcode = 'CB005', hint = 'Call it in READ COMMITTED.';
    end if;
end $$;

-- above_read_committed() -> whether the transaction keeps one snapshot. No SET clause, so that it is inlined.
create or replace function above_read_committed() returns boolean
language sql stable as $$
    select current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
$$;

-- refuse_changed(consumer_id, tokens): raises 40001 where another session changed or removed a lease of these claims since the
-- snapshot. A lease that looks expired may have been extended, and one that looks good may have been taken over.
-- Locks: none that last. FOR SHARE, which another session's extend() would wait for, is given back at once.
create or replace function refuse_changed(consumer_id int, tokens bigint[]) returns void
language plpgsql volatile as $$
begin
    perform from (select distinct t as token from unnest(tokens) t order by t) t cross join lateral (
        select from leases l where l.consumer_id = refuse_changed.consumer_id and l.token = t.token order by l.part for share) l;
    raise exception 'unchanged' using errcode = 'CB000'; -- gives the locks back
exception
    when sqlstate 'CB000' then
end $$;

-- settle_by_marks(consumer_id, tokens, seqs, moment) -> the seqs of those deliveries that were in flight, and now are not.
-- Raises 40001 as above. Locks: a share of the leases, as settle_some() does.
create or replace function settle_by_marks(consumer_id int, tokens bigint[], seqs bigint[], moment timestamptz)
returns bigint[]
language plpgsql volatile as $$
begin
    perform refuse_changed(consumer_id, tokens);
    return settle_some(consumer_id, tokens, seqs, '{}', moment, moved => true);
end $$;

-- forget_settled() -> how many rows of leases went of which every message is settled. Two sessions that settled the last ones at once
-- did not see each other's marks. The running bridge calls it.
-- Locks: these rows, by SKIP LOCKED.
create or replace function forget_settled() returns int
language plpgsql volatile
set search_path from current set jit = off as $$
declare
    done record;
    forgotten int := 0;
begin
    for done in
        select l.consumer_id, array_agg(l.token) as tokens, array_agg(l.part) as parts
        from (select s.consumer_id, s.token, s.part, count(*) as marks from settled s group by 1, 2, 3) s
        join leases l on l.consumer_id = s.consumer_id and l.token = s.token and l.part = s.part
        where cardinality(l.seqs) <= s.marks
        group by l.consumer_id order by l.consumer_id
    loop
        perform remove_finished(done.consumer_id, done.tokens, done.parts);
        forgotten := forgotten + cardinality(done.tokens);
    end loop;
    return forgotten;
end $$;
