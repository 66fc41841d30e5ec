-- consumer_lag(consumer): report the unfinished messages of each consumer that the caller may read.
--
-- The function counts rows, so it is for people and monitors, not for every message.
--
-- Parameters:
--   consumer  the name of the only consumer to report, or null for all, the default
-- Returns: one row per consumer. None if the name is not that of a consumer.
--   pending                 messages that are not finished and not in flight, or in a stream those
--                           not read
--   in_flight               messages that are delivered, and whose visibility timeout has not
--                           passed
--   dead                    dead letters
--   oldest_age_seconds      time since the oldest unfinished message was inserted
--   delayed                 those of pending that wait for their time
--   oldest_due_age_seconds  the longest time that a message has been due, counted from its
--                           insertion, the end of its delay or its unfinished delivery. Null if no
--                           message is due.
--   held                    those of pending that open transactions of receivers hold, at least
--                           (see consumer_holders)
-- Example:
--   select name, pending, in_flight, oldest_due_age_seconds from cdcbridge.consumer_lag();
create or replace function consumer_lag(consumer text default null)
returns table (name text, mode text, pending bigint, in_flight bigint, dead bigint,
               oldest_age_seconds float8, delayed bigint, oldest_due_age_seconds float8,
               paused boolean, held bigint)
language sql volatile security definer set search_path from current set jit = off as $$
    select c.name, c.mode, w.messages + d.messages + l.expired + coalesce(s.messages, 0),
           l.in_flight, x.dead,
           coalesce(s.seconds,
                    extract(epoch from moment() - least(w.oldest, d.oldest, l.oldest))::float8),
           w.later + d.later,
           coalesce(s.seconds, extract(epoch from moment() - least(w.due, d.due, l.due))::float8),
           c.paused, (w.held + d.held + l.held)::bigint
    from consumers c
    cross join lateral (
        select coalesce(sum(cardinality(w.seqs)), 0) as messages, min(w.inserted_at) as oldest,
               coalesce(sum(cardinality(w.seqs))
                            filter (where w.not_before > moment()), 0) as later,
               min(greatest(w.inserted_at, w.not_before))
                   filter (where w.not_before is null or w.not_before <= moment()) as due,
               coalesce(sum(cardinality(w.seqs))
                            filter (where (w.not_before is null or w.not_before <= moment())
                                    and w.xmax <> '0' and is_open(w.xmax)), 0) as held
        from waiting w where w.consumer_id = c.id) w
    cross join lateral (
        select count(*) as messages, min(d.inserted_at) as oldest,
               count(*) filter (where d.visible_at > moment()) as later,
               min(d.visible_at) filter (where d.visible_at <= moment()) as due,
               count(*) filter (where d.visible_at <= moment()
                                and d.xmax <> '0' and is_open(d.xmax)) as held
        from delayed d where d.consumer_id = c.id) d
    cross join lateral (
        select coalesce(sum(x.size) filter (where x.not_visible_until > moment()), 0) as in_flight,
               coalesce(sum(x.size) filter (where x.not_visible_until <= moment()), 0) as expired,
               min(x.inserted_at) filter (where x.size > 0) as oldest,
               min(x.last_delivered_at) filter (where x.size > 0) as due,
               coalesce(sum(x.size) filter (where x.not_visible_until <= moment()
                                            and x.locked_by <> '0'
                                            and is_open(x.locked_by)), 0) as held
        from (select l.not_visible_until, l.inserted_at, l.last_delivered_at, l.xmax as locked_by,
                     cardinality(l.seqs) - (
                         select count(*) from marks_of(l.consumer_id, l.claim_id, l.part)) as size
              from leases l where l.consumer_id = c.id) x) l
    cross join lateral (
        select count(*) as dead from dead_messages x where x.consumer_id = c.id) x
    cross join lateral (
        select sum(g.messages)::bigint as messages, max(g.seconds) as seconds
        from group_lag_of(c.id, wish_of(c)) g) s
    where (consumer is null or c.name = consumer) and may_read(c.config ->> 'role')
    order by c.name
$$;
