-- The dashboard: what a bridge keeps for it, and what its pages read. Nothing here counts rows.

-- note_measurement(lag): Keep a measurement, and a sample of it for the present minute.
--
-- Samples are kept for six hours. With 100 consumers these are 36,000 rows.
create or replace function note_measurement(lag json) returns void
language sql volatile set search_path from current as $$
    insert into measurements values (true, moment(), lag)
    on conflict (one) do update set measured_at = excluded.measured_at, lag = excluded.lag;
    insert into samples
    select date_trunc('minute', moment()), x.subject, x.figures
    from (select '' as subject,
                 jsonb_build_object('retained_bytes', s.value -> 'retained_bytes',
                                    'lag_bytes', s.value -> 'lag_bytes',
                                    'lag_seconds', s.value -> 'lag_seconds',
                                    'last_seq', pg_sequence_last_value('messages_seq')) as figures
          from json_array_elements(lag -> 'slots') with ordinality s (value, n) where s.n = 1
          union all
          select c.value ->> 'name',
                 jsonb_build_object('pending', c.value -> 'pending',
                                    'in_flight', c.value -> 'in_flight', 'dead', c.value -> 'dead',
                                    'oldest_age_seconds', c.value -> 'oldest_age_seconds')
          from json_array_elements(lag -> 'consumers') c (value)) x
    on conflict (minute, subject) do update set figures = excluded.figures;
    delete from samples where minute < moment() - interval '6 hours';
$$;

-- leased_messages(consumer_id, most) -> up to `most` messages that are in flight, those of the
-- oldest claims first.
create or replace function leased_messages(consumer_id int, most int)
returns table (seq bigint, key text, deliver_count int, last_delivered_at timestamptz,
               not_visible_until timestamptz)
language sql volatile set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select u.seq, case when l.keys is null then m.key else u.key end, l.deliver_count,
           l.last_delivered_at, l.not_visible_until
    from (select l.* from live_leases($1, newest_hint($1)) l
          where l.not_visible_until > moment()
          order by l.claim_id, l.part limit $2) l
    cross join lateral unsettled(l.consumer_id, l.claim_id, l.part, l.seqs, l.keys) u
    left join messages m on l.keys is null and m.seq = u.seq
    order by l.claim_id, l.part, u.n limit $2
$$;

-- blocked_keys(consumer_id, most) -> up to `most` keys of a fifo consumer whose later messages wait
-- for an earlier one.
--   state   in_flight: a receiver has the earlier message. delayed: it was given back, and is
--           delivered again at the time `until`
--   reason  the reason of the last nack
create or replace function blocked_keys(consumer_id int, most int)
returns table (key text, state text, seq bigint, deliver_count int, since timestamptz,
               until timestamptz, reason text)
language sql volatile set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    (select d.key, 'delayed', d.seq, d.deliver_count, nullif(d.last_delivered_at, '-infinity'),
            d.visible_at, d.history -> -1 ->> 'reason'
     from delayed d
     where d.consumer_id = $1 and d.in_order and d.visible_at > '-infinity'
       and d.visible_at > moment()
     order by d.visible_at desc limit $2)
    union all
    (select l.key, 'in_flight', l.seq, l.deliver_count, l.last_delivered_at, l.not_visible_until,
            null
     from leased_messages($1, $2) l)
    limit $2
$$;

-- letters_page(consumer_id, topic, key, reason, before, most) -> up to `most` dead letters, the
-- newest first, among the 20,000 newest with an id below `before`.
--
-- A filter that is null matches every dead letter. `reason` is the beginning of the reason.
create or replace function letters_page(consumer_id int, topic text, key text, reason text,
                                        before bigint, most int)
returns setof dead_messages
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select d.* from (
        select * from dead_messages d
        where d.consumer_id = $1 and d.id < coalesce($5, 9223372036854775807)
        order by d.id desc limit 20000) d
    where ($2 is null or d.topic = $2) and ($3 is null or d.key = $3)
      and ($4 is null or starts_with(d.reason, $4))
    order by d.id desc limit $6
$$;

-- letter_reasons(consumer_id) -> the reasons of the 1,000 newest dead letters, the most frequent
-- one first, at most ten. A reason is cut after 100 characters.
create or replace function letter_reasons(consumer_id int)
returns table (reason text, letters bigint)
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select left(d.reason, 100), count(*)
    from (select d.reason from dead_messages d where d.consumer_id = $1
          order by d.id desc limit 1000) d
    group by 1 order by 2 desc, 1 limit 10
$$;

-- chosen_letters(consumer_id, topic, key, reason, until, most) -> the number of dead letters that a
-- filter chooses among those with an id up to `until`, but at most `most`.
create or replace function chosen_letters(consumer_id int, topic text, key text, reason text,
                                          until bigint, most int)
returns bigint
language sql stable set search_path from current as $$
    select count(*) from (
        select from dead_messages d
        where d.consumer_id = $1 and d.id <= $5 and ($2 is null or d.topic = $2)
          and ($3 is null or d.key = $3) and ($4 is null or starts_with(d.reason, $4))
        limit $6) d
$$;
