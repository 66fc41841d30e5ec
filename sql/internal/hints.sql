-- Hints: the point in waiting and in leases at which a claim begins to read.
--
-- Rows of finished messages remain in tables and indexes until vacuum removes them. While some old
-- snapshot is held, vacuum removes none of the rows that were finished since. Without a hint every
-- claim would read through all of them.

-- newest_hint(consumer_id) -> the consumer's newest hint, which is at the right end of the index.
create or replace function newest_hint(consumer_id int) returns hints
language plpgsql stable as $$
begin
    return (select h from hints h where h.consumer_id = newest_hint.consumer_id
            order by h.id desc limit 1);
end $$;

-- live_leases(consumer_id, hint) -> the consumer's leases, in flight or expired.
--
-- The function has no SET clause, so PostgreSQL inlines it. A look-up fence makes each
-- claim a separate index look-up.
create or replace function live_leases(consumer_id int, hint hints) returns setof leases
language sql stable as $$
    select l.* from unnest(($2).open_claims) as t (claim_id) cross join lateral (
        select * from leases l where l.consumer_id = $1 and l.claim_id = t.claim_id offset 0) l
    union all
    select l.* from leases l where l.consumer_id = $1 and l.claim_id >= ($2).claim_floor
$$;

-- leases_of(consumer_id, claim_ids) -> the rows of leases of these claims.
--
-- It is inlined and makes separate look-ups, as live_leases() does.
create or replace function leases_of(consumer_id int, claim_ids bigint[]) returns setof leases
language sql stable as $$
    select l.* from (select distinct t as claim_id from unnest($2) t) t cross join lateral (
        select * from leases l where l.consumer_id = $1 and l.claim_id = t.claim_id offset 0) l
$$;

-- held_keys(consumer_id, hint) -> the ids of the claims and the keys that each claim holds.
--
-- A settled message no longer holds its key, although its row of leases may remain for the other
-- messages of the row. A row without settled messages costs one look-up in settled. The function is
-- inlined, as live_leases() is.
create or replace function held_keys(consumer_id int, hint hints)
returns table (claim_id bigint, key text)
language sql stable as $$
    select l.claim_id, u.key
    from (select v.claim_id, v.part, v.seqs, v.keys,
                 exists (select from marks_of($1, v.claim_id, v.part)) as partly
          from live_leases($1, $2) v offset 0) l
    cross join lateral unnest(l.seqs, l.keys) as u (seq, key)
    where u.key is not null
      -- By look-ups. With an array, a claim that has settled 16,000 of 32,000 messages would search
      -- 16,000 elements for each of the 32,000.
      and (not l.partly or not exists (select from settled s
                                       where s.consumer_id = $1 and s.claim_id = l.claim_id
                                         and s.part = l.part and s.seq = u.seq))
$$;

-- renew_hint(consumer_id, hint, front): Replace a hint that begins far before the current claim.
--
-- front is, for example, the last seq that the claim has taken. The new floor of waiting is chosen
-- near front. The gap guard limits both floors, so no message and no lease can still appear below.
-- Locks: the row of the old hint, by SKIP LOCKED.
create or replace function renew_hint(consumer_id int, hint hints, front bigint) returns void
language plpgsql volatile as $$
declare
    safe_claim bigint;
    safe_seq bigint;
    passed bigint[];
    floor bigint;
begin
    -- First the limits below which nothing can still appear, then the rows that are there. This
    -- order needs separate statements.
    safe_claim := max_safe_seq('claim_ids_seq');
    safe_seq := max_safe_seq('messages_seq');
    execute format('select w.passed, w.floor from find_floor_%s($1, $2) w', consumer_id)
    into passed, floor
    using hint, least(front - 512, safe_seq);
    with made as (
        insert into hints (consumer_id, waiting_floor, passed, claim_floor, open_claims)
        select renew_hint.consumer_id, least(floor, safe_seq), passed, safe_claim + 1,
               coalesce(array_agg(distinct l.claim_id), '{}')
        from live_leases(renew_hint.consumer_id, hint) l where l.claim_id <= safe_claim
        having least(floor, safe_seq) > hint.waiting_floor or safe_claim >= hint.claim_floor
        returning id)
    delete from hints h using made
    where h.ctid = (select o.ctid from hints o
                    where o.consumer_id = renew_hint.consumer_id and o.id = hint.id
                    for update skip locked);
end $$;

-- forget_hints(): Delete hints that are older than the newest one of their consumer.
--
-- Such hints remain when two claims renew one hint at the same time.
-- Locks: the rows that it deletes, by SKIP LOCKED, because a receiver that stays in its transaction
-- may have replaced one of them.
create or replace function forget_hints() returns void
language sql as $$
    delete from hints h where h.ctid = any (array(
        select o.ctid from consumers c join hints o on o.consumer_id = c.id
        where o.id < (select n.id from hints n where n.consumer_id = c.id
                      order by n.id desc limit 1)
        for update of o skip locked))
$$;
