-- What the other functions share. Not part of the public surface.

-- consumer_named(name) -> the consumer's row.
-- Raises CB001 where no consumer has that name. Its hint names the consumers that the caller may read, and no others.
create or replace function consumer_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = consumer_named.name;
    if found.id is null then
        raise exception 'no consumer named %', quote_nullable(name)
            using errcode = 'CB001',
                  hint = coalesce('Known: ' || (select string_agg(c.name, ', ' order by c.name) from consumers c
                                                where may_read(c.config ->> 'role')),
                                  'No consumer has been applied yet, or none that this role may read.');
    end if;
    return found;
end $$;

-- queue_named(name) -> the consumer's row, which must be one that is read message by message.
-- Raises CB001 (unknown), CB002 (a stream consumer has no queue), CB008 (not its role).
create or replace function queue_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = queue_named.name;
    -- One look for all: this is on the way of every call. The owner's own session needs no closer look.
    if found.id is null or found.mode = 'stream' or found.config ? 'role' or session_user <> current_user
        or current_setting('role') <> 'none'
    then
        perform refuse_queue(consumer_named(name));
    end if;
    return found;
end $$;

-- refuse_queue(consumer): raises what queue_named() does, where there is something to raise.
create or replace function refuse_queue(consumer consumers) returns void
language plpgsql stable as $$
begin
    if consumer.mode = 'stream' then
        raise exception 'consumer % reads the log as a stream', quote_literal(consumer.name)
            using errcode = 'CB002', hint = 'A stream is read by read_stream(), by Stream.connect() in Python, and by `cdcbridge read`.';
    end if;
    perform refuse_stranger(consumer);
end $$;

-- refuse_stranger(consumer): raises CB008 where the consumer names a role that is not the caller's, or none, and the caller is not
-- the store's owner.
create or replace function refuse_stranger(consumer consumers) returns void
language plpgsql stable as $$
begin
    if may_read(consumer.config ->> 'role') then
        return;
    elsif consumer.config ? 'role' then
        raise exception 'consumer % may be read by the role % alone', quote_literal(consumer.name),
            quote_ident(consumer.config ->> 'role')
            using errcode = 'CB008';
    end if;
    raise exception 'consumer % names no role, so only the store''s owner % may read it', quote_literal(consumer.name),
        quote_ident(current_user)
        using errcode = 'CB008', hint = 'Set its role in the configuration file, for example role: billing_app.';
end $$;

-- parse_receipts(receipts) -> seq and token of each.
-- Raises CB003 for a text that is no receipt.
create or replace function parse_receipts(receipts text[], out seqs bigint[], out tokens bigint[])
language plpgsql immutable as $$
begin
    select coalesce(array_agg(split_part(r, '-', 1)::bigint), '{}'), coalesce(array_agg(split_part(r, '-', 2)::bigint), '{}')
    into seqs, tokens from unnest(receipts) r;
    if array_position(seqs, null) is not null
        or exists (select from unnest(receipts) r where split_part(r, '-', 3) <> '')
    then
        raise invalid_text_representation;
    end if;
exception
    when invalid_text_representation or numeric_value_out_of_range then
        raise exception '% is not a receipt', quote_nullable((
            select r from unnest(receipts) r where r is null or r !~ '^[0-9]{1,18}-[0-9]{1,18}$' limit 1))
            using errcode = 'CB003', hint = 'A receipt is what receive() returned in the column receipt.';
end $$;

-- moment() -> now. A function of its own, so that tests can set the clock.
create or replace function moment() returns timestamptz
language sql volatile parallel safe as $$
    select clock_timestamp()
$$;

-- later(moment, span) -> the moment after the span, whatever the caller's TimeZone: a day has 24 hours. In America/New_York
-- the sum of the two would be an hour off where daylight saving time begins or ends within the span.
-- No SET clause, so that it is inlined.
create or replace function later(moment timestamptz, span interval) returns timestamptz
language sql immutable parallel safe as $$
    select (moment at time zone 'UTC' + span) at time zone 'UTC'
$$;

-- refuse_too_long(name, span): raises CB004 where a span of time is longer than store.max_retention, or infinite. By then messages are
-- dead letters. For example, a visibility timeout of 3,000,000 days.
create or replace function refuse_too_long(name text, span interval) returns void
language plpgsql stable as $$
declare
    most constant interval := (select l.max_retention from limits l);
begin
    if span > most then
        raise exception '% is %; it must be at most %', name, span, justify_hours(most)
            using errcode = 'CB004', hint = 'store.max_retention is the longest that a message may wait.';
    end if;
end $$;

-- set_max_retention(max_retention): what refuse_too_long() goes by. The bridge calls it when it starts.
create or replace function set_max_retention(max_retention interval) returns void
language sql set search_path from current as $$
    update limits l set max_retention = $1 where l.max_retention <> $1
$$;

-- time_text(at) -> the time as JSON has it in a session whose TimeZone is UTC: 2026-05-01T10:00:00.5+00:00.
create or replace function time_text(at timestamptz) returns text
language sql stable parallel safe as $$
    select (to_jsonb(at at time zone 'UTC') #>> '{}') || '+00:00'
$$;

-- project_row(object, columns) -> the object with the columns that are let through; null stays null.
create or replace function project_row(object json, columns jsonb) returns json
language sql immutable as $$
    select case when json_typeof(object) is distinct from 'object' then object else (
        select coalesce(json_object_agg(key, value), '{}') from json_each(object)
        where coalesce(columns -> 'include' ? key, true) and not coalesce(columns -> 'exclude' ? key, false)
    ) end
$$;

-- op_of(data) -> the operation of a table's message. Goes by its text, because json operators refuse a document that has "\u0000"
-- or half of a surrogate pair anywhere.
create or replace function op_of(data json) returns text language sql immutable as $$
    select split_part(left(data::text, 30), '"', 4)
$$;

-- harmless(data) -> the document with its escapes made plain text, so that json operators take it: "\u0000" becomes "\\u0000".
create or replace function harmless(data json) returns json language sql immutable as $$
    select replace(replace(data::text, E'\\\\', E'\\u005c'), E'\\u', E'\\\\u')::json
$$;

-- harmful(data) -> a part of a document that harmless() gave, with its escapes back.
create or replace function harmful(data text) returns text language sql immutable as $$
    select replace(data, E'\\\\u', E'\\u')
$$;

-- project(data, columns) -> data with the columns that the consumer's configuration lets through; null where that
-- cannot be told. Gap messages and published ones have no columns and stay whole.
create or replace function project(data json, columns jsonb) returns json
language plpgsql immutable as $$
begin
    if columns is null or op_of(data) in ('gap', 'message') then
        return data;
    end if;
    begin
        return project_columns(data, columns);
    exception
        when data_exception then
            return harmful(project_columns(harmless(data), columns)::text)::json;
    end;
exception
    when data_exception then
        return null;
end $$;

-- project_columns(data, columns) -> the same of a table's message. Raises 22... for a document that json operators refuse.
create or replace function project_columns(data json, columns jsonb) returns json
language plpgsql immutable as $$
begin
    return json_build_object(
        'op', op_of(data),
        'record', project_row(data -> 'record', columns),
        'old', project_row(data -> 'old', columns),
        'unchanged', (select coalesce(json_agg(c), '[]') from json_array_elements_text(data -> 'unchanged') c
                      where coalesce(columns -> 'include' ? c, true) and not coalesce(columns -> 'exclude' ? c, false)));
end $$;

-- record_values(data, columns) -> the JSON texts of these members of a message's record, whatever escapes the document has.
create or replace function record_values(data json, columns text[]) returns text[]
language plpgsql immutable as $$
begin
    return array(select (data -> 'record' -> c)::text from unnest(columns) with ordinality as k (c, n) order by n);
exception
    when data_exception then
        data := harmless(data);
        return array(select harmful((data -> 'record' -> c)::text) from unnest(columns) with ordinality as k (c, n) order by n);
end $$;

-- require_read_committed(what): raises CB005 in a transaction whose snapshot may be older than the locks it takes.
create or replace function require_read_committed(what text) returns void
language plpgsql stable as $$
begin
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception '% cannot work in a % transaction', what, upper(current_setting('transaction_isolation'))
            using errcode = 'CB005', hint = 'Call it in READ COMMITTED.';
    end if;
end $$;
