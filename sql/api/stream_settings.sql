-- stream_settings(consumer): return the settings of a stream consumer that a client needs.
--
-- Internal: the Python clients call it when they connect.
--
-- Parameters:
--   consumer  the name of a stream consumer
-- Returns: one row.
--   id       the id of the consumer, which notifications contain
--   channel  the NOTIFY channel of appends, as in queue_settings()
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream, or is a mirror
--   CB008  the caller may not read this consumer
create or replace function stream_settings(consumer text, out id int, out channel text)
language plpgsql stable security definer set search_path from current as $$
begin
    id := (stream_named(consumer)).id;
    channel := store_schema();
end $$;
