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
