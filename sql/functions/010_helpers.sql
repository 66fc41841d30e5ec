-- What the other functions share. Not part of the public surface.

-- consumer_named(name) → the consumer's row.
-- Raises CB001 where no consumer has that name.
create or replace function consumer_named(name text) returns consumers
language plpgsql stable set search_path from current as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = consumer_named.name;
    if found.id is null then
        raise exception 'no consumer named %', quote_nullable(name)
            using errcode = 'CB001',
                  hint = coalesce('Known: ' || (select string_agg(c.name, ', ' order by c.name) from consumers c),
                                  'No consumer has been applied yet.');
    end if;
    return found;
end $$;

-- queue_named(name) → the consumer's row, which must be one that is read message by message.
-- Raises CB001 (unknown), CB002 (a stream consumer has no queue).
create or replace function queue_named(name text) returns consumers
language plpgsql stable set search_path from current as $$
declare
    found consumers := consumer_named(name);
begin
    if found.mode = 'stream' then
        raise exception 'consumer % reads the log as a stream', quote_literal(name) using errcode = 'CB002';
    end if;
    return found;
end $$;

-- parse_receipts(receipts) → seq and token of each, every receipt once.
-- Raises CB003 for a text that is no receipt.
create or replace function parse_receipts(receipts text[]) returns table (seq bigint, token bigint)
language plpgsql immutable set search_path from current as $$
declare
    bad text;
begin
    select r into bad from unnest(receipts) r where r is null or r !~ '^[0-9]{1,18}-[0-9]{1,18}$' limit 1;
    if found then
        raise exception '% is not a receipt', quote_nullable(bad)
            using errcode = 'CB003', hint = 'A receipt is what receive() returned in the column receipt.';
    end if;
    return query
        select distinct split_part(r, '-', 1)::bigint, split_part(r, '-', 2)::bigint from unnest(receipts) r;
end $$;

-- config_interval(config, path) → a duration of the consumer's configuration, which is kept in seconds.
create or replace function config_interval(config jsonb, variadic path text[]) returns interval
language sql immutable set search_path from current as $$
    select make_interval(secs => (config #>> path)::float8)
$$;

-- project_row(object, columns) → the object with the columns that are let through; null stays null.
create or replace function project_row(object json, columns jsonb) returns json
language sql immutable set search_path from current as $$
    select case when json_typeof(object) is distinct from 'object' then object else (
        select coalesce(json_object_agg(key, value), '{}') from json_each(object)
        where coalesce(columns -> 'include' ? key, true) and not coalesce(columns -> 'exclude' ? key, false)
    ) end
$$;

-- project(data, columns) → data with the columns that the consumer's configuration lets through; null where that
-- cannot be told. Gap messages have no columns and stay whole.
create or replace function project(data json, columns jsonb) returns json
language plpgsql immutable set search_path from current as $$
begin
    if columns is null or (data -> 'op')::text = '"gap"' then
        return data;
    end if;
    return json_build_object(
        'op', data -> 'op',
        'record', project_row(data -> 'record', columns),
        'old', project_row(data -> 'old', columns),
        'unchanged', (select coalesce(json_agg(c), '[]') from json_array_elements_text(data -> 'unchanged') c
                      where coalesce(columns -> 'include' ? c, true) and not coalesce(columns -> 'exclude' ? c, false)));
exception
    when data_exception then
        return null;
end $$;
