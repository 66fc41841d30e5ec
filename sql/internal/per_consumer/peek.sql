-- visible___id__(most) -> up to `most` messages that receive() could return now.
--
-- It receives no message and locks no row.
-- Returns:
--   log_key  true if the key is the one of the log
--   rank     the position in the order in which receive() would return the messages, from 1
create or replace function visible___id__(most int)
returns table (seq bigint, key text, log_key boolean, deliver_count int,
               not_visible_until timestamptz, rank bigint)
language sql stable as $$
    select v.seq, v.key, v.log_key, v.deliver_count, v.until,
           row_number() over (order by v.stage, v.ord, v.tie, v.n) as rank
    from ((select u.seq, u.key, false as log_key, u.deliver_count, u.not_visible_until as until,
                  0 as stage, u.claim_id as ord, u.ordinal::bigint as tie, 0::bigint as n
           from unnest(deliveries_of(__id__, array(
               select l.claim_id from live_leases(__id__, newest_hint(__id__)) l
               where l.not_visible_until <= moment()))) u
           where u.not_visible_until <= moment()
           order by u.claim_id, u.ordinal limit most)
          union all
          (select d.seq, d.key, false, d.deliver_count, d.visible_at, 1,
                  (extract(epoch from d.visible_at) * 1000000)::bigint, d.seq, 0
           from delayed d
           where d.consumer_id = __id__ and d.visible_at > '-infinity' and d.visible_at <= moment()
           order by d.visible_at, d.seq limit most)
          union all
          (select u.seq, case when cardinality(w.keys) = 1 then w.keys[1] else u.key end,
                  w.keys is null, 0, null, 2, w.ord, w.tie, u.n
           from (select * from live_waiting___id__(newest_hint(__id__))
                 where not_before is null limit most) w
           cross join lateral unnest(w.seqs, w.keys) with ordinality as u (seq, key, n)
           order by w.ord, w.tie, u.n limit most)) v
    order by rank limit most
$$;

-- delayed___id__(most) -> up to `most` messages that become visible at a later time, the next one
-- first.
--
-- The columns are those of visible___id__(). not_visible_until is the time at which the message
-- becomes visible.
create or replace function delayed___id__(most int)
returns table (seq bigint, key text, log_key boolean, deliver_count int,
               not_visible_until timestamptz, rank bigint)
language sql stable as $$
    select d.seq, d.key, d.log_key, d.deliver_count, d.at, row_number() over (order by d.at, d.seq)
    from ((select d.seq, d.key, false as log_key, d.deliver_count, d.visible_at as at
           from delayed d where d.consumer_id = __id__ and d.visible_at > '-infinity'
                            and d.visible_at > moment()
           order by d.visible_at, d.seq limit most)
          union all
          (select u.seq, case when cardinality(w.keys) = 1 then w.keys[1] else u.key end,
                  w.keys is null, 0, w.not_before
           from waiting___id__ w cross join lateral unnest(w.seqs, w.keys) as u (seq, key)
           where w.not_before > moment()
             -- A queue has no such rows, and no index that says so.
             and exists (select from consumers c where c.id = __id__ and c.mode = 'fifo')
           order by w.not_before, u.seq limit most)) d
    order by d.at, d.seq limit most
$$;
