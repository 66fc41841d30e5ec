-- queue_settings(consumer): return the settings of a queue or fifo consumer that a client needs.
--
-- Internal: the Python clients call it when they connect.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
-- Returns: one row.
--   id                  the id of the consumer, which notifications contain
--   mode                queue or fifo
--   visibility_timeout  the consumer's own
--   channel             the NOTIFY channel of appends. The payload is the ids of the consumers that
--                       got messages, or empty if these are many.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB008  the caller may not read this consumer
create or replace function queue_settings(consumer text, out id int, out mode text,
                                          out visibility_timeout interval, out channel text)
language plpgsql stable security definer set search_path from current as $$
declare
    c consumers := queue_named(consumer);
begin
    id := c.id;
    mode := c.mode;
    visibility_timeout := make_interval(secs => (c.config ->> 'visibility_timeout')::float8);
    channel := store_schema();
end $$;
