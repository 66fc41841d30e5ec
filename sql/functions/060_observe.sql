-- Looking without touching.

-- peek(consumer, max_messages, delayed) -> the messages that are visible now, with the columns of receive(); receipt is null.
-- delayed: those instead that wait for their time, the next one first; not_visible_until is that time. They were given back by nack,
-- or published for later.
-- Raises CB001, CB002, CB008. Takes nothing and locks nothing.
create or replace function peek(consumer text, max_messages int default 10, delayed boolean default false)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int, commit_time timestamptz,
               inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query execute format($query$
        with visible as (
            %s)
        select null::text, v.seq, coalesce(m.topic, r.topic), case when v.log_key then m.key else v.key end,
               project(coalesce(r.data, m.data), $3), v.deliver_count, v.not_visible_until,
               coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
               coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
        from (select *, row_number() over (order by place, ord, tie, n) as rank from visible order by rank limit $2) v
        left join messages m on m.seq = v.seq
        left join redriven r on r.consumer_id = $1 and r.seq = v.seq
        order by v.rank
        $query$, format(case when delayed then delayed_query() else visible_query() end, c.id))
    using c.id, max_messages, c.config -> 'columns';
end $$;

-- visible_query() -> the part of peek() that finds what is visible now.
create or replace function visible_query() returns text
language sql immutable as $template$
    select $query$
            (select u.seq, u.key, u.deliver_count, u.not_visible_until, false as log_key, 0 as place, u.token as ord, u.ordinal::bigint as tie,
                    0::bigint as n
             from unnest(deliveries_of($1, array(select l.token from live_leases($1, newest_hint($1)) l
                                                 where l.not_visible_until <= moment()))) u
             where u.not_visible_until <= moment()
             order by u.token, u.ordinal limit $2)
            union all
            (select d.seq, d.key, d.deliver_count, d.visible_at, false, 1,
                    (extract(epoch from d.visible_at) * 1000000)::bigint, d.seq, 0
             from delayed d where d.consumer_id = $1 and d.visible_at > '-infinity' and d.visible_at <= moment()
             order by d.visible_at, d.seq limit $2)
            union all
            (select u.seq, case when cardinality(w.keys) = 1 then w.keys[1] else u.key end, 0, null, w.keys is null, 2,
                    w.ord, w.tie, u.n
             from (select * from live_waiting_%s(newest_hint($1)) where not_before is null limit $2) w
             cross join lateral unnest(w.seqs, w.keys) with ordinality as u (seq, key, n)
             order by w.ord, w.tie, u.n limit $2)
    $query$
$template$;

-- delayed_query() -> the part that finds what waits for its time.
create or replace function delayed_query() returns text
language sql immutable as $template$
    select $query$
            select d.seq, d.key, d.deliver_count, d.at as not_visible_until, d.log_key, 0 as place,
                   row_number() over (order by d.at, d.seq) as ord, 0::bigint as tie, 0::bigint as n
            from ((select d.seq, d.key, d.deliver_count, d.visible_at as at, false as log_key
                   from delayed d where d.consumer_id = $1 and d.visible_at > '-infinity' and d.visible_at > moment()
                   order by d.visible_at, d.seq limit $2)
                  union all
                  (select u.seq, case when cardinality(w.keys) = 1 then w.keys[1] else u.key end, 0, w.not_before, w.keys is null
                   from waiting_%s w cross join lateral unnest(w.seqs, w.keys) as u (seq, key)
                   where w.not_before > moment()
                   order by w.not_before, u.seq limit $2)) d
            order by d.at, d.seq limit $2
    $query$
$template$;

-- consumer_lag() -> per consumer that the caller may read, what is left to do. Counts rows: for people and monitors, not for every message.
-- delayed: those of `pending` that wait for their time. oldest_due_age_seconds: how long the oldest message has waited that may be
-- delivered now, or that was delivered and is not settled: since it was inserted, since its time came, or since its delivery. Null if none.
-- held: how many of `pending` are held by open transactions of receivers at least (consumer_holders).
create or replace function consumer_lag()
returns table (name text, mode text, pending bigint, in_flight bigint, dead bigint, oldest_age_seconds float8,
               delayed bigint, oldest_due_age_seconds float8, paused boolean, held bigint)
language sql volatile security definer set search_path from current set jit = off as $$
    select c.name, c.mode, w.messages + d.messages + l.expired + coalesce(s.messages, 0), l.in_flight, x.dead,
           coalesce(s.seconds, extract(epoch from moment() - least(w.oldest, d.oldest, l.oldest))::float8),
           w.later + d.later,
           coalesce(s.seconds, extract(epoch from moment() - least(w.due, d.due, l.due))::float8), c.paused,
           (w.held + d.held + l.held)::bigint
    from consumers c
    cross join lateral (select coalesce(sum(cardinality(w.seqs)), 0) as messages, min(w.inserted_at) as oldest,
                               coalesce(sum(cardinality(w.seqs)) filter (where w.not_before > moment()), 0) as later,
                               min(greatest(w.inserted_at, w.not_before)) filter (where w.not_before is null or w.not_before <= moment()) as due,
                               coalesce(sum(cardinality(w.seqs)) filter (where (w.not_before is null or w.not_before <= moment())
                                                                         and w.xmax <> '0' and is_open(w.xmax)), 0) as held
                        from waiting w where w.consumer_id = c.id) w
    cross join lateral (select count(*) as messages, min(d.inserted_at) as oldest,
                               count(*) filter (where d.visible_at > moment()) as later,
                               min(d.visible_at) filter (where d.visible_at <= moment()) as due,
                               count(*) filter (where d.visible_at <= moment() and d.xmax <> '0' and is_open(d.xmax)) as held
                        from delayed d where d.consumer_id = c.id) d
    cross join lateral (select coalesce(sum(x.size) filter (where x.not_visible_until > moment()), 0) as in_flight,
                               coalesce(sum(x.size) filter (where x.not_visible_until <= moment()), 0) as expired,
                               min(x.inserted_at) filter (where x.size > 0) as oldest,
                               min(x.last_delivered_at) filter (where x.size > 0) as due,
                               coalesce(sum(x.size) filter (where x.not_visible_until <= moment() and x.locked_by <> '0'
                                                            and is_open(x.locked_by)), 0) as held
                        from (select l.not_visible_until, l.inserted_at, l.last_delivered_at, l.xmax as locked_by, cardinality(l.seqs) - (
                                  select count(*) from settled s where s.consumer_id = l.consumer_id
                                  and s.token = l.token and s.part = l.part) as size
                              from leases l where l.consumer_id = c.id) x) l
    cross join lateral (select count(*) as dead from dead_messages x where x.consumer_id = c.id) x
    cross join lateral (select sum(g.messages)::bigint as messages, max(g.seconds) as seconds
                        from group_lag_of(c.id, wish_of(c)) g) s
    where may_read(c.config ->> 'role')
    order by c.name
$$;

-- queue_settings(consumer) -> what a client has to know of its consumer. channel: where appends are notified, with the ids of
-- the consumers that got something, or with nothing where these are many.
-- Raises CB001, CB002, CB008.
create or replace function queue_settings(consumer text, out id int, out mode text, out visibility_timeout interval,
                                          out channel text)
language plpgsql stable security definer set search_path from current as $$
declare
    c consumers := queue_named(consumer);
begin
    id := c.id;
    mode := c.mode;
    visibility_timeout := make_interval(secs => (c.config ->> 'visibility_timeout')::float8);
    channel := current_schema();
end $$;

-- next_visible(consumer) -> when to look again, in seconds from now: when a timeout or a delay ends, of which nothing
-- notifies; null if none will. Soon where messages wait already: their keys are held, or max_in_flight is reached.
-- Raises CB001, CB002, CB008.
create or replace function next_visible(consumer text) returns float8
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    c consumers := queue_named(consumer);
    hint hints := newest_hint(c.id);
    waits boolean;
    published_later timestamptz;
begin
    execute format('select exists (select from live_waiting_%s($1) w
                                   where w.not_before is null or w.not_before <= moment())', c.id)
    into waits using hint;
    if waits then
        return case when c.paused then 1 else 0.1 end;
    end if;
    if c.mode = 'fifo' then
        execute format('select min(w.not_before) from waiting_%s w where w.not_before is not null', c.id)
        into published_later;
    end if;
    -- A day at most: nobody sleeps longer, and infinity would be no number of seconds.
    return (select case when coalesce(published_later, min(n.at)) is not null
                   then extract(epoch from least(published_later, min(n.at), moment() + interval '1 day') - moment()) end
            from (select min(l.not_visible_until) as at from live_leases(c.id, hint) l
                  union all
                  (select d.visible_at from delayed d where d.consumer_id = c.id and d.visible_at > '-infinity'
                   order by d.visible_at limit 1)) n);
end $$;
