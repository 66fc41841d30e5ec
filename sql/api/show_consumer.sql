-- show_consumer(consumer) -> its row. Raises CB001, CB008.
create or replace function show_consumer(consumer text) returns consumers
language plpgsql stable security definer set search_path from current as $$
declare
    c consumers := consumer_named(consumer);
begin
    perform refuse_stranger(c);
    return c;
end $$;
