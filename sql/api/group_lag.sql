-- group_lag(consumer) -> where the group stands in each partition, and how far behind: messages that it wants, and the age in
-- seconds of the oldest of them (null where there is none). For people and monitors: it counts.
-- Raises CB001, CB002, CB008.
create or replace function group_lag(consumer text)
returns table (partition int, seq bigint, messages bigint, seconds float8, leased_until timestamptz, lost bigint,
               updated_at timestamptz)
language plpgsql volatile security definer set search_path from current as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
begin
    return query select * from group_lag_of(c.id, wish_of(c));
end $$;
