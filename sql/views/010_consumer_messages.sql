-- consumer_messages: a row per queue or fifo consumer and unfinished message, from all tables that
-- contain such messages.
--
-- not_visible_until is null for a message that was never delivered, because it has been visible
-- since it was inserted. If the message was published for later, not_visible_until is that time.
create or replace view consumer_messages as
    select w.consumer_id, u.seq,
           case when w.keys is null then m.key when cardinality(w.keys) = 1 then w.keys[1]
                else u.key end as key,
           w.not_before as not_visible_until, 0 as deliver_count,
           null::timestamptz as last_delivered_at, w.inserted_at
    from waiting w
    cross join lateral unnest(w.seqs, w.keys) as u (seq, key)
    left join messages m on w.keys is null and m.seq = u.seq
union all
    select l.consumer_id, u.seq, case when l.keys is null then m.key else u.key end,
           l.not_visible_until,
           l.deliver_count, l.last_delivered_at, l.inserted_at
    from leases l
    cross join lateral unnest(l.seqs, l.keys) as u (seq, key)
    left join messages m on l.keys is null and m.seq = u.seq
    where not exists (select from settled s
                      where s.consumer_id = l.consumer_id and s.claim_id = l.claim_id
                        and s.part = l.part and s.seq = u.seq)
union all
    select d.consumer_id, d.seq, d.key, d.visible_at, d.deliver_count,
           nullif(d.last_delivered_at, '-infinity'),
           d.inserted_at
    from delayed d;
comment on view consumer_messages is 'A row per queue or fifo consumer and unfinished message';
