-- show_consumer(consumer): show the settings and the state of a consumer.
--
-- Parameters:
--   consumer  the name of a consumer of any mode
-- Returns: its row of the table consumers.
-- Raises:
--   CB001  no consumer has this name
--   CB008  the caller may not read this consumer
-- Example:
--   select name, mode, paused from cdcbridge.show_consumer('billing');
create or replace function show_consumer(consumer text) returns consumers
language plpgsql stable security definer set search_path from current as $$
declare
    c consumers := consumer_named(consumer);
begin
    perform refuse_stranger(c);
    return c;
end $$;
