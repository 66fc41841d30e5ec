-- Times: the clock, spans of time, and the longest time that a message may wait.

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
