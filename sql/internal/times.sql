-- Times: the clock, spans of time, and the longest time that a message may wait.

-- moment() -> the present time. It is a function of its own so that tests can set the clock.
create or replace function moment() returns timestamptz
language sql volatile parallel safe as $$
    select clock_timestamp()
$$;

-- later(moment, span) -> the time one span after the moment.
--
-- The result does not depend on the caller's TimeZone: a day has 24 hours. With America/New_York,
-- moment + span would be an hour off if daylight saving time begins or ends within the span.
-- The function has no SET clause, so that PostgreSQL inlines it.
create or replace function later(moment timestamptz, span interval) returns timestamptz
language sql immutable parallel safe as $$
    select (moment at time zone 'UTC' + span) at time zone 'UTC'
$$;

-- refuse_too_long(name, span): Refuse a span of time that is longer than store.max_retention.
--
-- After that time a message is a dead letter. Examples are a visibility timeout of 3,000,000 days,
-- and an infinite one.
-- Raises: CB004 if the span is too long or infinite.
create or replace function refuse_too_long(name text, span interval) returns void
language plpgsql stable as $$
declare
    most constant interval := (select l.max_retention from limits l);
begin
    if span > most then
        raise exception '% is %, but must be at most %', name, span, justify_hours(most)
            using errcode = 'CB004',
                  hint = 'A message may wait for store.max_retention at most.';
    end if;
end $$;

-- set_max_retention(max_retention): Set the limit of refuse_too_long().
--
-- The bridge calls it when it starts.
create or replace function set_max_retention(max_retention interval) returns void
language sql set search_path from current as $$
    update limits l set max_retention = $1 where l.max_retention <> $1
$$;

-- time_text(at) -> the time in the form of JSON, in UTC, for example 2026-05-01T10:00:00.5+00:00.
create or replace function time_text(at timestamptz) returns text
language sql stable parallel safe as $$
    select (to_jsonb(at at time zone 'UTC') #>> '{}') || '+00:00'
$$;
