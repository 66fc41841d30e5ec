-- consumer_messages: a row per queue consumer and unfinished message, wherever its state is kept.
-- A message that was never delivered is visible since it was inserted: not_visible_until is then null.
create or replace view consumer_messages as
    select w.consumer_id, u.seq, case when w.keys is null then m.key else u.key end as key,
           null::timestamptz as not_visible_until, 0 as deliver_count, null::timestamptz as last_delivered_at,
           w.inserted_at
    from waiting w
    cross join lateral unnest(w.seqs, w.keys) as u (seq, key)
    left join messages m on w.keys is null and m.seq = u.seq
union all
    select l.consumer_id, l.seq, l.key, l.not_visible_until, l.deliver_count, l.last_delivered_at, l.inserted_at
    from leases l
union all
    select d.consumer_id, d.seq, d.key, d.visible_at, d.deliver_count, d.last_delivered_at, d.inserted_at
    from delayed d;
comment on view consumer_messages is 'A row per queue consumer and unfinished message';
