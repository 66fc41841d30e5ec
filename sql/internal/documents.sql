-- The JSON of messages: the operation, single columns, and the columns that a consumer receives.
--
-- PostgreSQL stores documents that its own json operators refuse, for example one with "\u0000".
-- Such a document must affect only its own message. Therefore these functions read the text where
-- that is enough. Otherwise they use a copy in which the escapes are plain text.

-- project_row(object, columns) -> the object with only the columns that are let through.
--
-- A value that is no object, for example null, is returned unchanged.
create or replace function project_row(object json, columns jsonb) returns json
language sql immutable as $$
    select case when json_typeof(object) is distinct from 'object' then object else (
        select coalesce(json_object_agg(key, value), '{}') from json_each(object)
        where coalesce(columns -> 'include' ? key, true)
          and not coalesce(columns -> 'exclude' ? key, false)
    ) end
$$;

-- op_of(data) -> the operation of a message, for example insert.
--
-- It is read from the text, because json operators refuse a document that contains "\u0000" or half
-- of a surrogate pair anywhere.
create or replace function op_of(data json) returns text language sql immutable as $$
    select split_part(left(data::text, 30), '"', 4)
$$;

-- harmless(data) -> the document with its escapes made plain text, for json operators.
--
-- For example, "\u0000" becomes "\\u0000", which json operators accept.
create or replace function harmless(data json) returns json language sql immutable as $$
    select replace(replace(data::text, E'\\\\', E'\\u005c'), E'\\u', E'\\\\u')::json
$$;

-- harmful(data) -> the reverse of harmless(), for a part of a document: the escapes are back.
create or replace function harmful(data text) returns text language sql immutable as $$
    select replace(data, E'\\\\u', E'\\u')
$$;

-- project(data, columns) -> the data with only the columns that the consumer's configuration lets
-- through.
--
-- The result is null if the columns cannot be separated. Gap messages and published messages have
-- no columns and are returned unchanged.
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

-- project_columns(data, columns) -> the result of project(), for a change of a table.
--
-- Raises: an error of class 22 for a document that json operators refuse.
create or replace function project_columns(data json, columns jsonb) returns json
language plpgsql immutable as $$
declare
    annotation constant json := data -> 'annotation';
    projected constant json := json_build_object(
        'op', op_of(data),
        'record', project_row(data -> 'record', columns),
        'old', project_row(data -> 'old', columns),
        'unchanged', (select coalesce(json_agg(c), '[]')
                      from json_array_elements_text(data -> 'unchanged') c
                      where coalesce(columns -> 'include' ? c, true)
                        and not coalesce(columns -> 'exclude' ? c, false)));
begin
    return case when annotation is null then projected
                else (rtrim(projected::text, '}') || ', "annotation" : ' || annotation || '}')::json
           end;
end $$;

-- record_values(data, columns) -> the values of these columns in a message's record, as JSON texts.
--
-- It also reads documents that have escapes which json operators refuse.
create or replace function record_values(data json, columns text[]) returns text[]
language plpgsql immutable as $$
begin
    return array(select (data -> 'record' -> c)::text
                 from unnest(columns) with ordinality as k (c, n) order by n);
exception
    when data_exception then
        data := harmless(data);
        return array(select harmful((data -> 'record' -> c)::text)
                     from unnest(columns) with ordinality as k (c, n) order by n);
end $$;
