-- stream_settings(consumer) -> what a client has to know. channel: where appends are notified, as queue_settings() has it.
-- Raises CB001, CB002, CB008.
create or replace function stream_settings(consumer text, out id int, out channel text)
language plpgsql stable security definer set search_path from current as $$
begin
    id := (stream_named(consumer)).id;
    channel := current_schema();
end $$;
