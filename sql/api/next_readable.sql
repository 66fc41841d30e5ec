-- next_readable(consumer) -> when to look again, in seconds from now: messages wait that others read or hold back, or a lease ends,
-- of which nothing notifies; null where nothing is left.
-- Raises CB001, CB002, CB008.
create or replace function next_readable(consumer text) returns float8
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
begin
    return (select case when c.paused then 1 else greatest(0.1, extract(epoch from min(o.leased_until) - moment())) end
            from newest_offsets(c.id) o
            -- Lateral, so that it is a look each: an EXISTS may become a join with all there is.
            cross join lateral (select from messages m where m.partition = o.partition and m.seq > o.seq
                                                         and is_wanted(m.topic, m.data, m.reader, w) limit 1) m
            having count(*) > 0);
end $$;
