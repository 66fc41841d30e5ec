-- next_visible(consumer): return in how many seconds a client should call receive() again.
--
-- No notification is sent when a visibility timeout or a delay ends. A client that got no rows
-- therefore waits for a notification, but at most for this time. While messages wait because their
-- keys are held or max_in_flight is reached, the result is 0.1, or 1 for a paused consumer. The
-- same holds while messages wait whose timeout or delay has ended.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
-- Returns: seconds from now, at most a day. Null if no timeout or delay will end.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB008  the caller may not read this consumer
-- Example:
--   select cdcbridge.next_visible('billing');
create or replace function next_visible(consumer text) returns float8
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
declare
    c consumers := queue_named(consumer);
    hint hints := newest_hint(c.id);
    soon constant float8 := case when c.paused then 1 else 0.1 end;
    waits boolean;
    published_later timestamptz;
    next timestamptz;
    moment timestamptz;
begin
    execute format('select exists (select from live_waiting_%s($1) w
                                   where w.not_before is null or w.not_before <= moment())', c.id)
    into waits using hint;
    if waits then
        return soon;
    end if;
    if c.mode = 'fifo' then
        execute format('select min(w.not_before) from waiting_%s w where w.not_before is not null',
                       c.id)
        into published_later;
    end if;
    select least(published_later, min(n.at)) into next
    from (select min(l.not_visible_until) as at from live_leases(c.id, hint) l
          union all
          (select d.visible_at from delayed d
           where d.consumer_id = c.id and d.visible_at > '-infinity'
           order by d.visible_at limit 1)) n;
    moment := moment();
    -- At most a day: no client sleeps longer, and infinity is not a number of seconds.
    return case when next <= moment then soon when next > moment
                then extract(epoch from least(next, moment + interval '1 day') - moment) end;
end $$;
