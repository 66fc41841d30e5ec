-- Which messages of a lease row are still unsettled. The table settled has a mark for each message
-- that has left the row, while the row still has its seq.
--
-- These functions have no SET clause, so PostgreSQL inlines them. They return sets, because a
-- scalar function with a query in it is never inlined.
--
-- receive() and deliveries_of() look for marks themselves, because there the plan of unsettled()
-- takes up to half as long again. The view consumer_messages cannot use these functions, because
-- its readers have no right to execute internal functions.

-- unsettled(consumer_id, claim_id, part, seqs, keys) -> the messages of this lease row that are not
-- settled, each with its number in the row, from 1.
--
-- Example:
--   select l.claim_id, u.seq
--   from leases l
--   cross join lateral unsettled(l.consumer_id, l.claim_id, l.part, l.seqs, l.keys) u;
create or replace function unsettled(consumer_id int, claim_id bigint, part int, seqs bigint[],
                                     keys text[])
returns table (seq bigint, key text, n bigint)
language sql stable as $$
    select u.seq, u.key, u.n from unnest($4, $5) with ordinality as u (seq, key, n)
    where not exists (select from settled s
                      where s.consumer_id = $1 and s.claim_id = $2 and s.part = $3
                        and s.seq = u.seq)
$$;

-- marks_of(consumer_id, claim_id, part) -> the marks of the messages of this lease row that are
-- settled.
create or replace function marks_of(consumer_id int, claim_id bigint, part int)
returns setof settled
language sql stable as $$
    select * from settled s where s.consumer_id = $1 and s.claim_id = $2 and s.part = $3
$$;
