-- The dashboard: what a bridge keeps for it, and what its pages read. Nothing here counts rows.

-- note_measurement(lag): Keep a measurement, and a sample of it for the present minute.
--
-- If another bridge has just kept one, nothing happens. Samples are kept for six hours. With 100
-- consumers these are 36,000 rows.
create or replace function note_measurement(lag json) returns void
language plpgsql volatile set search_path from current as $$
begin
    insert into measurements as m values (true, moment(), lag)
    on conflict (one) do update set measured_at = excluded.measured_at, lag = excluded.lag
        where m.measured_at < moment() - interval '4 seconds';
    if not found then
        return;
    end if;
    insert into samples (minute, subject, figures)
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
                                    'delayed', c.value -> 'delayed',
                                    'oldest_age_seconds', c.value -> 'oldest_age_seconds',
                                    'at', extract(epoch from moment()),
                                    'finished', finished_messages(c.value ->> 'name'))
          from json_array_elements(lag -> 'consumers') c (value)) x
    on conflict (subject, minute) do update set figures = excluded.figures;
    -- Once an hour, since this reads all samples.
    if extract(minute from moment()) = 0 then
        delete from samples where minute < moment() - interval '6 hours';
    end if;
end $$;

-- forget_changes(keep) -> how many rows of the audit log were deleted, at most 10,000.
--
-- These are the rows that are older than the interval.
create or replace function forget_changes(keep interval) returns bigint
language sql volatile set search_path from current as $$
    with gone as (
        delete from audit a using (select o.id from audit o where o.at < moment() - keep
                                   order by o.at limit 10000) o
        where a.id = o.id returning 1)
    select count(*) from gone
$$;

-- end_session(digest, lasts): End a session of the dashboard. Also forget the ended sessions whose
-- time is over.
create or replace function end_session(digest text, lasts interval) returns void
language sql volatile set search_path from current as $$
    delete from ended_sessions where until < moment();
    insert into ended_sessions values (digest, moment() + lasts) on conflict do nothing;
$$;

-- finished_messages(consumer) -> how many messages of a consumer were acked, or delivered by its
-- sink, since the consumer was added.
--
-- Returns: null for a stream without a sink, and for an unknown name.
create or replace function finished_messages(consumer text) returns bigint
language sql stable set search_path from current as $$
    select case when c.mode = 'stream' then s.delivered + s.failed else acked_messages(c.id) end
    from consumers c left join sinks s on s.consumer_id = c.id where c.name = $1
$$;

-- consumer_rates(subject) -> messages per second of a consumer, or of all if the name is null.
--
-- The rates are those between the newest sample and one that is at least a minute older.
-- Nothing is counted: the messages that arrived are the ones that were finished, plus the change of
-- the unfinished ones.
-- Returns: one row for each consumer with two such samples, of which the newest is at most five
-- minutes old.
--   per_second_in   arrivals, at least 0. A purge makes them fewer. Null if per_second_out is null
--   per_second_out  acks, or deliveries of the sink. Null for a stream without a sink
--   growth          change of the unfinished messages and dead letters
--   seconds         time between the two samples
create or replace function consumer_rates(subject text default null)
returns table (name text, per_second_in float8, per_second_out float8, growth float8,
               seconds float8)
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    with recent as materialized (
        select s.subject, (s.figures ->> 'at')::float8 as at,
               (s.figures ->> 'finished')::float8 as finished,
               (s.figures ->> 'pending')::float8 + (s.figures ->> 'in_flight')::float8
                   + (s.figures ->> 'dead')::float8 as unfinished
        from consumers c cross join lateral (
            select * from samples s where s.subject = c.name
            and s.minute > moment() - interval '8 minutes' order by s.minute desc limit 9) s
        where ($1 is null or c.name = $1) and may_read(c.config ->> 'role')
    ), pairs as (
        select n.subject, n.at - b.at as seconds, n.unfinished - b.unfinished as grown,
               case when n.finished >= b.finished then n.finished - b.finished end as finished
        from (select distinct on (r.subject) r.* from recent r order by r.subject, r.at desc) n
        cross join lateral (select * from recent r where r.subject = n.subject
                            and r.at <= n.at - 60 order by r.at desc limit 1) b
        where n.at > extract(epoch from moment()) - 300
    )
    select p.subject,
           case when p.finished is not null
                then greatest(0, (p.finished + p.grown) / p.seconds) end,
           p.finished / p.seconds, p.grown / p.seconds, p.seconds
    from pairs p where p.grown is not null order by p.subject
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

-- blocked_keys(consumer_id, most) -> up to `most` messages of a fifo consumer that were given back,
-- so that the later messages of their keys wait for them, too. The longest wait is first.
--   until   when the message is delivered again
--   reason  the reason of the last nack
create or replace function blocked_keys(consumer_id int, most int)
returns table (key text, seq bigint, deliver_count int, since timestamptz, until timestamptz,
               reason text)
language sql volatile set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select d.key, d.seq, d.deliver_count, nullif(d.last_delivered_at, '-infinity'), d.visible_at,
           d.history -> -1 ->> 'reason'
    from delayed d
    where d.consumer_id = $1 and d.in_order and d.visible_at > '-infinity'
      and d.visible_at > moment()
    order by d.visible_at desc limit $2
$$;

-- letters_page(consumer_id, topic, key, reason, before, most) -> up to `most` dead letters, the
-- newest first, among the 20,000 newest with an id below `before`, without their data.
--
-- A filter that is null matches every dead letter, and `reason` is the beginning of one. If there
-- are older letters to look at, the last row has an id alone: the `before` of the next page.
create or replace function letters_page(consumer_id int, topic text, key text, reason text,
                                        before bigint, most int)
returns table (id bigint, seq bigint, topic text, key text, deliver_count int, reason text,
               died_at timestamptz)
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    with looked as materialized (
        select d.id, d.seq, d.topic, d.key, d.deliver_count, d.reason, d.died_at
        from dead_messages d
        where d.consumer_id = $1 and d.id < coalesce($5, 9223372036854775807)
        order by d.id desc limit 20000
    ), page as materialized (
        select l.* from looked l
        where ($2 is null or l.topic = $2) and ($3 is null or l.key = $3)
          and ($4 is null or starts_with(l.reason, $4))
        order by l.id desc limit $6
    ), ended as (
        select case when (select count(*) from page) = $6 then (select min(p.id) from page p)
                    else (select min(l.id) from looked l) end as at
    )
    select p.* from page p
    union all
    select e.at, null, null, null, null, null, null from ended e
    where exists (select from dead_messages d where d.consumer_id = $1 and d.id < e.at)
    order by id desc, seq nulls last
$$;

-- letter_reasons(consumer_id) -> the first lines of the reasons of the 1,000 newest dead letters,
-- the most frequent one first, at most ten. A line is cut after 100 characters.
create or replace function letter_reasons(consumer_id int)
returns table (reason text, letters bigint)
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select left(split_part(translate(d.reason, chr(13), chr(10)), chr(10), 1), 100), count(*)
    from (select d.reason from dead_messages d where d.consumer_id = $1
          order by d.id desc limit 1000) d
    group by 1 order by 2 desc, 1 limit 10
$$;

-- letters_after(consumer_id, topic, key, reason, after, until, most) -> the dead letters that a
-- filter chooses among the first `most` with an id above `after` and up to `until`.
--
-- Returns: one row.
--   ids     the ids of the chosen letters, in log order
--   failed  for each of them, whether the consumer's filter failed on it
--   last    the highest id that was looked at; null: there is none
create or replace function letters_after(consumer_id int, topic text, key text, reason text,
                                         after bigint, until bigint, most int)
returns table (ids bigint[], failed boolean[], last bigint)
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select coalesce(array_agg(d.id order by d.seq, d.id) filter (where d.chosen), '{}'),
           coalesce(array_agg(starts_with(d.reason, 'filter_error:') order by d.seq, d.id)
                        filter (where d.chosen), '{}'),
           max(d.id)
    from (select d.id, d.seq, d.reason,
                 ($2 is null or d.topic = $2) and ($3 is null or coalesce(d.key = $3, false))
                     and ($4 is null or starts_with(d.reason, $4)) as chosen
          from dead_messages d
          where d.consumer_id = $1 and d.id > $5 and d.id <= $6
          order by d.id limit $7) d
$$;

-- chosen_letters(consumer_id, topic, key, reason) -> how many dead letters a filter chooses among
-- the 100,000 newest, and whether these are all.
create or replace function chosen_letters(consumer_id int, topic text, key text, reason text)
returns table (letters bigint, complete boolean, first bigint, last bigint)
language sql stable set search_path from current
set enable_seqscan = off set enable_bitmapscan = off as $$
    select count(*) filter (where ($2 is null or d.topic = $2) and ($3 is null or d.key = $3)
                            and ($4 is null or starts_with(d.reason, $4))),
           count(*) < 100000,
           coalesce((select l.id from dead_messages l where l.consumer_id = $1
                     order by l.id limit 1), 0),
           coalesce(max(d.id), 0)
    from (select * from dead_messages d where d.consumer_id = $1 order by d.id desc limit 100000) d
$$;
