-- time_of(target, what): return the time that a text names.
--
-- The text is a date and time with a zone (2026-05-01 10:00+02), or now, today, yesterday or
-- tomorrow. A signed duration in ms, s, m, h or d counts from now: -1h is an hour ago. The days
-- begin at midnight in UTC.
--
-- The result does not depend on the session's settings. A text without a zone is refused, because
-- 10:00 is another moment for each reader.
--
-- Parameters:
--   target  the text
--   what    the noun for the target in an error message, default 'place in the log'
-- Raises:
--   CB004  the text is not a time, is a duration without a sign, or names no zone
-- Example:
--   select cdcbridge.time_of('2026-05-01 10:00+02');
create or replace function time_of(target text, what text default 'place in the log')
returns timestamptz
language plpgsql volatile security definer
set search_path from current set datestyle = 'ISO, MDY' set timezone = 'UTC'
set intervalstyle = 'postgres' as $$
declare
    word constant text := lower(btrim(target));
    at timestamptz;
    elsewhere timestamptz;
begin
    if word ~ '^[-+] *[0-9]{1,15}([.][0-9]{1,15})? *(ms|s|m|h|d)$' then
        return later(moment(), word::interval);
    elsif word ~ '^[0-9]{1,15}([.][0-9]{1,15})? *(ms|s|m|h|d)$' then
        raise exception '% is a duration, not a %', quote_literal(target), what
            using errcode = 'CB004',
                  hint = format('Add a sign: -%s is in the past, and +%1$s in the future.', word);
    elsif word in ('now', 'today', 'yesterday', 'tomorrow') then
        return case word when 'now' then moment() else
            date_trunc('day', moment())
            + array_position('{yesterday,today,tomorrow}', word) * interval '1 day'
            - interval '2 days' end;
    end if;
    -- 05.01.2026 is the first of May in one session and the fifth of January in another.
    if target ~ '^ *[0-9]{1,2}[./ -]' then
        raise invalid_datetime_format;
    end if;
    at := target::timestamptz;
    perform set_config('timezone', '+07:30', true); -- until this function returns
    elsewhere := target::timestamptz;
    if at <> elsewhere then
        raise exception '% has no time zone', quote_literal(target)
            using errcode = 'CB004',
                  hint = 'Add one, for example 2026-05-01 10:00+02 or 2026-05-01 08:00Z.';
    end if;
    return at;
exception
    when invalid_datetime_format or datetime_field_overflow or invalid_parameter_value
        or interval_field_overflow
    then
        raise exception '% is not a %', quote_nullable(target), what using errcode = 'CB004',
            hint = case what when 'time' then ''
                        else 'A place is earliest, latest, a seq or a time. ' end
                || 'A time is for example 2026-05-01 10:00+02, -1h (an hour ago) or yesterday.';
end $$;
